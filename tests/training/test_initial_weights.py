"""Runs that begin with the weights of an earlier one (``train.init_from``)."""

import shutil

import pytest
import torch
from plain_training import SMALL_MODEL
from safetensors.torch import load_file

from bestrq2.config import ConfigError, load_config
from bestrq2.interchange.opening import open_source
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.runs.checkpoint import list_checkpoints
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main, seeded_model
from bestrq2.training.initial_weights import load_initial, settle_initial

pytestmark = pytest.mark.usefixtures("plain_training")
QUICK = ["train.steps=4", "train.batch_size=8", "train.save_every=4", "data.workers=0", *SMALL_MODEL]
GLOBAL = ["model.targets.normalize=none", "model.front_end.normalize=global"]


def train(runs, name, *overrides):
    assert main(["--runs", str(runs), "--name", name, *QUICK, *overrides]) == 0
    return runs / name


def weights_of(run):
    return load_file(list_checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def begun(*overrides):
    """Weights of a model as its run begins, and the sentence about them."""
    config = settle_initial(load_config("best_rq2_tiny", [*QUICK, *overrides]))
    model = seeded_model(config)
    return load_initial(model, config), model.state_dict()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return train(tmp_path_factory.mktemp("first"), "first", *GLOBAL)


@pytest.mark.parametrize(
    ("overrides", "anew"),
    [
        ([], []),
        (["model.targets.seed=5"], ["head"]),
        (["model.targets.normalize=utterance"], ["head"]),
        (["model.front_end.mean=-40", "model.front_end.std=20"], ["head"]),
        (["model.targets.codebook_size=64"], ["head"]),
        (["model.predictor.depth=2"], ["predictor", "head"]),
        (["model.clip_weight=0.5"], ["clip_head"]),
    ],
)
def test_what_fits_is_taken(first, overrides, anew):
    told, found = begun(*GLOBAL, *overrides, f"train.init_from={first}", "train.seed=9")
    saved = weights_of(first)
    assert f"Weights of {first} (step 4): encoder" in told
    assert told.endswith(f"drawn anew: {', '.join(anew)}") if anew else "anew" not in told
    for name in found:
        part = name.partition(".")[0]
        if part in ("encoder", "predictor", "head", "clip_head") and ".front_end." not in name:
            same = name in saved and saved[name].shape == found[name].shape and torch.equal(saved[name], found[name])
            assert same or part in anew, name
            if part in anew and name.endswith("weight") and found[name].dim() > 1:
                assert not same, name


def test_a_run_begins_where_the_other_ended(first, tmp_path):
    """With the statistics of its input, and then goes on by itself, also when the other run is gone."""
    source = tmp_path / "source"
    shutil.copytree(first, source)
    run = train(tmp_path, "next", *GLOBAL, f"train.init_from={source}")
    losses = [[float(row["loss"]) for row in read_metrics(path) if row["loss"]] for path in (first, run)]
    assert losses[1][0] < losses[0][0] - 0.1
    for name in ("mean", "std"):
        assert torch.equal(weights_of(run)[f"encoder.front_end.{name}"], weights_of(first)[f"encoder.front_end.{name}"])
    shutil.rmtree(source)
    assert main(["--resume", str(run), "train.steps=6"]) == 0
    assert read_metrics(run)[-1]["step"] == "6"


@pytest.mark.parametrize(("layer", "end"), [(1, "encoder, predictor, head"), (0, "drawn anew: head")])
def test_a_head_stays_with_its_teacher(first, tmp_path, caplog, layer, end):
    """Other features of the teacher are other codes, though the quantizer is the same."""
    teacher = [f"model.targets.encoder={first}", "model.targets.layer=1", "model.front_end.normalize=none"]
    source = train(tmp_path, "source", *teacher)
    train(tmp_path, "next", *teacher, f"model.targets.layer={layer}", f"train.init_from={source}")
    told = [line for line in caplog.messages if line.startswith("Weights of ")]
    assert len(told) == 1
    assert told[0].endswith(end)


def test_an_encoder_alone_and_a_run_of_another_kind(first, tmp_path):
    source = open_source(first)
    write_encoder_file(tmp_path / "encoder.safetensors", source.config, source.weights)
    told, found = begun(*GLOBAL, f"train.init_from={tmp_path / 'encoder.safetensors'}")
    assert told.endswith("encoder; drawn anew: predictor, head")
    assert torch.equal(found["encoder.patch_embed.proj.weight"], weights_of(first)["encoder.patch_embed.proj.weight"])
    told, _ = begun(*GLOBAL, f"train.init_from={first}", "model.name=best_rq")
    assert told.endswith("encoder; drawn anew: mask_token, head")


def test_refusals(first, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"its encoder has model\.encoder\.depth=2 \(here 3\)"):
        begun(*GLOBAL, f"train.init_from={first}", "model.encoder.depth=3")
    with pytest.raises(ConfigError, match=r"model\.front_end\.normalize='?global'? \(here '?none'?\)"):
        begun(f"train.init_from={first}", "model.front_end.normalize=none")
    broken = tmp_path / "weights.pt"
    torch.save({"a": torch.ones(1)}, broken)
    with pytest.raises(ConfigError, match=r"train\.init_from: .*pickled checkpoints are never opened"):
        begun(f"train.init_from={broken}")
    options = ["--runs", str(tmp_path), "--name", "none", *QUICK]
    assert main([*options, f"train.init_from={tmp_path / 'nothing'}"]) == 2
    assert f"error: train.init_from: {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert main([*options, "--frozen-encoder", ""]) == 2
    assert "--frozen-encoder: expected the place of an encoder, got an empty name" in capsys.readouterr().err
    assert main([*options, "train.init_from=x", "frozen.source=y"]) == 2
    assert "train.init_from: expected null with frozen.source" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["--resume", str(first), f"train.init_from={tmp_path}"]) == 2
    assert "train.init_from: expected null, with which this run began" in capsys.readouterr().err
