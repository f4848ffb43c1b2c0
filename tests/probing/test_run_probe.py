"""run_probe on an encoder in memory: what it returns, and that it leaves no trace."""

import random
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from bestrq2.config import ProbeConfig, load_config
from bestrq2.models import build_encoder
from bestrq2.probing import ProbeTask, packaged_task, run_probe
from bestrq2.probing.features import untrained_copy
from bestrq2.probing.in_memory import _prepared
from bestrq2.training.evaluation import probe_task

SMALL = ["model.front_end.normalize=global", "model.front_end.mean=-47", "model.front_end.std=31"]
SMALL += ["model.encoder.depth=2", "model.encoder.width=64", "model.encoder.dropout=0.1", "model.encoder.drop_path=0.2"]


@pytest.fixture
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_encoder(load_config("best_rq2_tiny", SMALL).model)


@pytest.fixture(autouse=True)
def forget():
    _prepared.clear()


def test_leaves_no_trace(encoder):
    encoder.train()
    encoder.encoder.blocks[0].eval()  # a part that the trainer keeps in evaluation mode
    encoder.encode(torch.randn(1, 16000))[0].sum().backward()
    modes = [module.training for module in encoder.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in encoder.parameters()]
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    values = run_probe(encoder, packaged_task(head="mlp"))
    assert 0 <= values["balanced_accuracy"] <= 1
    assert [module.training for module in encoder.modules()] == modes
    for parameter, grad in zip(encoder.parameters(), grads):
        assert parameter.requires_grad
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.equal(parameter.grad, grad)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()
    assert random.getstate() == generators[2]
    # Training goes on: nothing the encoder keeps was made where gradients are impossible.
    encoder.encode(torch.randn(1, 16000))[0].sum().backward()


def test_modes_return_after_an_error(encoder):
    encoder.train()
    with pytest.raises(ValueError, match="column 'mood'"):
        run_probe(encoder, ProbeTask(label="mood"))
    encoder.encode_layers = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run_probe(encoder)
    assert encoder.training


def test_is_a_function_of_weights_and_task(encoder):
    untrained = untrained_copy(encoder, 3)
    first = run_probe(encoder, untrained=untrained, detailed=True)
    torch.manual_seed(99)
    np.random.seed(99)
    second = run_probe(encoder.train(), untrained=untrained, batch_size=5, detailed=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        third = run_probe(encoder, untrained=untrained, detailed=True)
    for other in (second, third):
        assert {k: v for k, v in first.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in other.items() if k != "seconds"}
        )
    for name in ("balanced_accuracy", "accuracy", "macro_F1", "mAP"):
        for baseline in ("", "random/", "log_mel/"):
            low, value, high = (first[f"{baseline}{name}{end}"] for end in ("_low", "", "_high"))
            assert 0 <= low <= value <= high <= 1
    assert first["clips"] == 24
    assert first["chance"] == pytest.approx(1 / 3)
    main = "balanced_accuracy"
    short = [main, f"{main}_low", f"{main}_high", f"log_mel/{main}", f"random/{main}", "chance"]
    assert run_probe(encoder, untrained=untrained) == {name: first[name] for name in short}


def test_baselines_are_computed_once(encoder, monkeypatch):
    built = []

    def untrained():
        built.append(1)
        return untrained_copy(encoder)

    decoded = []
    from bestrq2.probing import in_memory as hook

    original = hook.iterate_clips
    monkeypatch.setattr(hook, "iterate_clips", lambda *a: decoded.append(1) or original(*a))
    for _ in range(3):
        run_probe(encoder, packaged_task(head="knn"), untrained=untrained)
    assert (len(built), len(decoded)) == (1, 1)
    wider = build_encoder(load_config("best_rq2_tiny", [*SMALL, "model.encoder.width=32"]).model)
    values = run_probe(wider, packaged_task(head="knn"))
    _prepared.clear()
    assert run_probe(wider, packaged_task(head="knn")) == values  # not with the baseline of another encoder


def test_untrained_copy_knows_nothing_of_the_weights(encoder):
    """An encoder that was trained to give a constant does not hand it down."""
    before = untrained_copy(encoder, 0)
    for parameter in encoder.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    after = untrained_copy(encoder, 0)
    waveform = torch.randn(1, 16000)
    assert torch.equal(before.encode(waveform)[0], after.encode(waveform)[0])
    assert not torch.equal(untrained_copy(encoder, 1).encode(waveform)[0], after.encode(waveform)[0])
    assert (encoder.patch_embed.proj.weight == 0.5).all()


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_untrained_copy_of_reparametrised_layers(name):
    """``reset_parameters`` of a layer under the older ``weight_norm`` writes to what the next pass overwrites."""
    layer = getattr(torch.nn.utils, name)(torch.nn.Linear(8, 8)).eval().requires_grad_(False)
    kept = {key: parameter.clone() for key, parameter in layer.named_parameters()}
    fresh = untrained_copy(layer, 3)
    assert not any(torch.equal(parameter, kept[key]) for key, parameter in fresh.named_parameters())
    assert all(torch.equal(parameter, kept[key]) for key, parameter in layer.named_parameters())


def test_untrained_copy_knows_nothing_of_running_statistics():
    settings = ["model.encoder.conformer.conv_norm=batch_norm"]
    conformer = build_encoder(load_config("best_rq_conformer_tiny", settings).model).eval()
    before = untrained_copy(conformer).encode(torch.ones(1, 16000))[0]
    for buffer in (b for name, b in conformer.named_buffers() if "running" in name):
        buffer.fill_(7.0)
    assert torch.equal(untrained_copy(conformer).encode(torch.ones(1, 16000))[0], before)


def test_other_settings_have_other_baselines():
    """None of them is in the text of a module, and no weight has another shape."""
    task = packaged_task(head="knn")
    settings = ([], ["model.encoder.join_rows=concatenate"], ["model.front_end.f_min=2000"], ["model.front_end.std=3"])
    encoders = [build_encoder(load_config("best_rq2_grid_tiny", [*SMALL, *more]).model) for more in settings]
    kept = [run_probe(encoder, task, detailed=True) for encoder in encoders]
    for encoder, values in zip(encoders, kept):
        _prepared.clear()
        fresh = run_probe(encoder, task, detailed=True)
        assert {k: v for k, v in fresh.items() if k != "seconds"} == {k: v for k, v in values.items() if k != "seconds"}


def test_diverged_encoder_gives_nan(encoder):
    run_probe(encoder, packaged_task(head="knn"))
    with torch.no_grad():
        encoder.patch_embed.proj.bias.fill_(float("nan"))
    values = run_probe(encoder, packaged_task(head="knn"))
    assert np.isnan(values["balanced_accuracy"])
    assert np.isfinite(values["log_mel/balanced_accuracy"])


def test_changed_labels_are_read_again(encoder, tmp_path):
    from bestrq2.data.manifest import read_rows

    manifest = tmp_path / "clips.csv"
    rows = read_rows(packaged_task().path)
    manifest.write_text("path,kind\n" + "".join(f"{f.path},{r['domain']}\n" for f, r in rows if r["domain"] != "env"))
    task = ProbeTask(manifest=str(manifest), label="kind", head="knn")
    assert run_probe(encoder, task, detailed=True)["clips"] == 16
    manifest.write_text("path,kind\n" + "".join(f"{f.path},{r['domain']}\n" for f, r in rows))
    assert run_probe(encoder, task, detailed=True)["clips"] == 24


def test_replaced_audio_is_read_again(encoder, tmp_path):
    from bestrq2.data.manifest import read_rows

    rows = read_rows(packaged_task().path)
    files = [shutil.copyfile(file.path, tmp_path / f"{number}.ogg") for number, (file, _) in enumerate(rows)]
    lines = (f"{file},{row['domain']}\n" for file, (_, row) in zip(files, rows))
    (tmp_path / "clips.csv").write_text("path,kind\n" + "".join(lines))
    task = ProbeTask(manifest=str(tmp_path / "clips.csv"), label="kind", head="knn")
    first = run_probe(encoder, task)
    for file in files:
        shutil.copyfile(rows[0][0].path, file)
    same = run_probe(encoder, task)
    _prepared.clear()
    again = run_probe(encoder, task)
    for values in (first, same, again):
        values.pop("seconds", None)
    assert same == again != first


def test_another_untrained_encoder_has_other_baselines(encoder):
    task, zeros = packaged_task(head="knn"), untrained_copy(encoder)
    with torch.no_grad():
        for parameter in zeros.parameters():
            parameter.zero_()
    first = run_probe(encoder, task, untrained=untrained_copy(encoder))
    second = run_probe(encoder, task, untrained=zeros)
    assert first["random/balanced_accuracy"] != second["random/balanced_accuracy"]
    assert run_probe(encoder, task, untrained=untrained_copy(encoder)) == first


def test_choices_without_a_manifest():
    """A probe during training on the packaged clips is read and fitted as the configuration says."""
    assert probe_task(ProbeConfig(every=1)) == packaged_task(combine="average")
    task = probe_task(ProbeConfig(every=1, head="ridge", layers="all", pooling="max", rows="concatenate"))
    assert task == packaged_task(head="ridge", layers="all", combine="average", pooling="max", rows="concatenate")
    assert probe_task(ProbeConfig(every=1, label="item", group="path")) == packaged_task(
        combine="average", label="item", group="path"
    )
