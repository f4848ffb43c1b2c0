"""Options of the training loop: precision, averaging, schedules, saves by time and by score, validation, probes."""

import itertools
import math
import re
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_training import SMALL_MODEL, leave_out

from bestrq2 import load
from bestrq2.config import ConfigError, OptimizerConfig, load_config
from bestrq2.data import tiny_dataset
from bestrq2.errors import CheckpointError
from bestrq2.layers.conformer_convolution import MaskedBatchNorm
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main, seeded_model
from bestrq2.training import batch_finder
from bestrq2.training.averaging import WeightAverage
from bestrq2.training.loss_scale import LossScale
from bestrq2.training.optimizer import learning_rate, make_optimizer, set_schedule, weight_decay
from bestrq2.training.saver import Saver

QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=6",
    "train.batch_size=4",
    "train.save_every=2",
    "train.pictures_every=0",
    *SMALL_MODEL,
]


def losses(run: Path) -> list[float]:
    return [float(row["loss"]) for row in read_metrics(run) if row["loss"]]


def test_fp16_follows_fp32(tmp_path):
    assert main(["--runs", str(tmp_path), "--name", "full", *QUICK]) == 0
    assert main(["--runs", str(tmp_path), "--name", "half", *QUICK, "train.precision=fp16"]) == 0
    skipped = int(read_metrics(tmp_path / "half")[-1]["skipped_steps"])
    assert skipped < 6
    full, half = losses(tmp_path / "full"), losses(tmp_path / "half")
    assert half[0] == pytest.approx(full[0], rel=2e-3)
    if not skipped:
        assert half == pytest.approx(full, rel=5e-3)
    state = read_checkpoint(list_checkpoints(tmp_path / "half" / "checkpoints")[-1]).extra["loss_scale"]
    assert state["value"] >= 1


def test_loss_scale_falls_on_overflow_and_grows_after_patience():
    scale = LossScale(enabled=True, value=8.0, patience=3)
    assert [scale.update(finite) for finite in (True, False)] == [False, True]
    assert scale.value == 4.0
    for _ in range(3):
        scale.update(True)
    assert scale.value == 8.0
    for _ in range(3):
        assert scale.update(False)
    assert scale.value == 1.0
    assert not scale.update(False), "at scale 1 it is not the scale's fault"
    other = LossScale(enabled=True)
    other.restore(scale.state())
    assert other.state() == scale.state()
    assert LossScale(enabled=False).update(False) is False


def test_a_run_that_goes_on_in_fp16_begins_with_the_scale_of_a_new_one():
    before = LossScale(enabled=False).state()
    old_checkpoint = {"value": 1.0, "good_steps": 0}
    for state in (before, old_checkpoint, None):
        scale = LossScale(enabled=True)
        scale.restore(state)
        assert scale.value == LossScale(enabled=True).value
    fallen = LossScale(enabled=True, value=1.0)
    scale = LossScale(enabled=True)
    scale.restore(fallen.state())
    assert scale.value == 1.0
    scale.restore({"value": 512.0, "good_steps": 7})
    assert (scale.value, scale.good_steps) == (512.0, 7)


def test_averaged_weights_are_the_stated_recursion_and_can_be_opened(tmp_path):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    average = WeightAverage(layer, 0.5)
    expected = layer.weight.detach().double()
    for step in range(20):
        with torch.no_grad():
            layer.weight += torch.randn_like(layer.weight)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    torch.testing.assert_close(average.average["weight"].double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"bias: expected \(2,\), found None"):
        average.restore({"weight": layer.weight.detach()}, 1)

    assert main(["--runs", str(tmp_path), "--name", "ema", *QUICK, "train.ema_decay=0.9"]) == 0
    folder = tmp_path / "ema" / "checkpoints" / "step-00000006"
    plain, averaged = load(folder), load(folder / "ema.safetensors")
    weights = dict(plain.named_parameters())
    name = next(key for key in weights if "blocks.0.mlp" in key and key.endswith("weight"))
    assert not torch.equal(weights[name], dict(averaged.named_parameters())[name])
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or ema\.safetensors"):
        load(folder / "training.safetensors")


def test_running_statistics_are_averaged_with_the_weights():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"norm": MaskedBatchNorm(3), "frozen": MaskedBatchNorm(3).requires_grad_(False)})
    average = WeightAverage(model, 0.5)
    expected, seen = torch.zeros(3), []
    for step in range(4):
        model["norm"](torch.randn(2, 5, 3) + step, None)
        seen.append(model["norm"].running_mean.clone())
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * seen[-1]
    torch.testing.assert_close(average.average["norm.running_mean"], expected)
    assert not torch.allclose(expected, seen[-1])
    assert average.average.keys() == {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}

    earlier = {name: torch.full((3,), 7.0) for name in ("norm.weight", "norm.bias")}  # of a version without them
    resumed = WeightAverage(model, 0.5)
    resumed.restore(earlier, 4)
    assert resumed.average["norm.weight"].tolist() == [7.0] * 3
    assert torch.equal(resumed.average["norm.running_mean"], model["norm"].running_mean)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "stable"])
def test_learning_rate_schedules(schedule):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, final_ratio=0.1, warmup=0.1, cooldown=0.25)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    middle = {"cosine": 1.1 + 0.9 * math.cos(math.pi * 44 / 89), "linear": 2.0 - 1.8 * 44 / 89}.get(schedule, 2.0)
    assert rates[54] == pytest.approx(middle)
    assert rates[99] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    if schedule == "stable":
        assert rates[75] == pytest.approx(2.0)
        assert rates[87] == pytest.approx(2.0 - 1.8 * 12 / 24)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(rates[10:]))


def test_steps_of_a_share_are_those_that_it_says():
    """0.29 * 100 is 28.999999999999996."""
    config = OptimizerConfig(learning_rate=1.0, schedule="stable", final_ratio=0.0, warmup=0.29, cooldown=0.57)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[27] == 28 / 29
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == list(range(28, 44))


def test_weight_decay_schedule_reaches_only_decayed_groups():
    config = OptimizerConfig(weight_decay=0.04, final_weight_decay=0.4, decay_all=False)
    assert weight_decay(0, 11, config) == pytest.approx(0.04)
    assert weight_decay(5, 11, config) == pytest.approx(0.22)
    assert weight_decay(10, 11, config) == pytest.approx(0.4)
    assert weight_decay(5, 11, replace(config, final_weight_decay=None)) == 0.04
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, config)
    set_schedule(optimizer, 10, 11, config)
    by_size = {group["params"][0].dim(): group["weight_decay"] for group in optimizer.param_groups}
    assert by_size == {2: pytest.approx(0.4), 1: 0.0}


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("best_rq2_tiny", ["model.targets.num_codebooks=4", "model.clip_weight=1"]), ("best_rq_conformer_tiny", [])],
)
def test_no_bias_norm_or_token_is_decayed(recipe, overrides):
    """Biases of four codebooks, of a Conformer's heads and of its norms, by their names and not by their shapes."""
    config = load_config(recipe, [*overrides, "optimizer.decay_all=false"])
    model = seeded_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    (decayed,) = (group for group in make_optimizer(model, config.optimizer).param_groups if group["decayed"])
    spared = [name for name in names.values() if re.search(r"bias$|norm\w*\.weight$|token$", name)]
    assert {names[p] for p in decayed["params"]}.isdisjoint(spared)
    assert any(names[p] == "head.weight" for p in decayed["params"])
    assert any(min(p.shape) > 1 < p.dim() for p, name in names.items() if name in spared)  # as matrices are


@pytest.mark.parametrize(
    "override", ["optimizer.schedule=step", "train.ema_decay=1", "train.accumulate=0", "train.strategy=dp"]
)
def test_impossible_options_name_the_key(override):
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config("best_rq2_tiny", [override])


def test_copies_of_clips_that_are_trained_on_are_told(tmp_path, caplog):
    for number, item in enumerate(tiny_dataset()[:3]):
        (tmp_path / "held").mkdir(exist_ok=True)
        (tmp_path / "held" / f"{number}.ogg").write_bytes(Path(item.path).read_bytes())
    options = [f"validation.source={tmp_path}/held", "validation.every=1", "validation.clips=2", "train.steps=1"]
    assert main(["--runs", str(tmp_path), "--name", "run", *QUICK, *options]) == 0
    assert "3 of 3 clips of validation.source are also trained on, first /" in caplog.text


def test_validation_disturbs_nothing(tmp_path, plain_training):
    drops = ["model.encoder.dropout=0.1", "model.encoder.drop_path=0.2", "train.steps=4"]
    assert main(["--runs", str(tmp_path), "--name", "without", *QUICK, *drops]) == 0
    data = str(Path(__file__).parents[2] / "bestrq2" / "data" / "tiny")
    seen = [f"validation.source={data}", "validation.every=2", "train.pictures_every=2", "train.async_save=false"]
    plain_training.undo()
    assert main(["--runs", str(tmp_path), "--name", "with", *QUICK, *drops, *seen]) == 0
    leave_out(plain_training)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert (tmp_path / "with" / "pictures" / "step-00000002.png").stat().st_size > 10_000


def test_saves_by_time(tmp_path, monkeypatch):
    clock = time.monotonic
    monkeypatch.setattr("bestrq2.training.saver.time.monotonic", lambda: clock() * 1e6)
    command = ["--runs", str(tmp_path), *QUICK, "train.save_every=1000", "--name"]
    assert main([*command, "run", "train.keep_last=9"]) == 0
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) > 1
    assert main([*command, "off", "train.save_minutes=0"]) == 0
    assert len(list_checkpoints(tmp_path / "off" / "checkpoints")) == 1


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """An asynchronous save holds the weights of its own step, however far training has come when it is written."""
    written = Saver._write

    def slowly(self, snapshot, value):
        time.sleep(0.3)
        written(self, snapshot, value)

    monkeypatch.setattr(Saver, "_write", slowly)
    common = ["--runs", str(tmp_path), *QUICK, "train.keep_last=9"]
    assert main([*common, "--name", "beside"]) == 0
    monkeypatch.undo()
    assert main([*common, "--name", "waiting", "train.async_save=false"]) == 0
    for name in ("step-00000002", "step-00000004", "step-00000006"):
        ours, theirs = (read_checkpoint(tmp_path / run / "checkpoints" / name) for run in ("beside", "waiting"))
        for tensors in ("weights", "training_state"):
            a, b = getattr(ours, tensors)(), getattr(theirs, tensors)()
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_probe_beside_training(tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert main(["--runs", str(tmp_path), "--name", "run", *QUICK, "probe.every=4"]) == 0
    rows = [row for row in read_metrics(tmp_path / "run") if row.get("probe/balanced_accuracy")]
    assert [int(row["step"]) for row in rows] == [0, 4, 6]
    assert all(0 <= float(row["probe/balanced_accuracy"]) <= 1 for row in rows)
    assert rows[0]["probe/log_mel/balanced_accuracy"] == rows[-1]["probe/log_mel/balanced_accuracy"]
    assert main(["--runs", str(tmp_path), "--name", "bad", *QUICK, "probe.every=4", "probe.manifest=nowhere.csv"]) == 2
    told = capsys.readouterr().err
    assert "error: probe: " in told
    assert "nowhere.csv: No such file or directory; check the name" in told
    assert not (tmp_path / "bad").exists()


def test_mask_ratio_counts_what_is_masked_and_not_predicted(tmp_path):
    for share in (1.0, 0.25):
        options = ["model.masking.ratio=[0.5,0.5]", f"model.predictor.share={share}", "train.steps=2"]
        assert main(["--runs", str(tmp_path), "--name", f"run{share}", *QUICK, *options, "train.log_every=1"]) == 0
    whole, part = ([row["mask_ratio"] for row in read_metrics(tmp_path / f"run{share}")] for share in (1.0, 0.25))
    assert whole == part
    assert 0.45 < float(part[-1]) <= 0.5


@pytest.mark.parametrize("option", ["--find-batch", "--show-config"])
def test_questions_about_a_new_run_start_no_old_one(tmp_path, option, capsys):
    for resumed in (["--resume", str(tmp_path)], ["--resume"], ["--name", "a", "--resume"]):
        with pytest.raises(SystemExit):
            main([option, *resumed])
        assert f"{option} is about a new run: drop --resume" in capsys.readouterr().err
    assert main(["--find-batch", "--frozen-encoder", str(tmp_path), "--config", "best_rq2_tiny"]) == 2
    assert "drop --frozen-encoder" in capsys.readouterr().err


def test_batch_finder_prints_a_table_and_the_settings(capsys, monkeypatch):
    monkeypatch.setattr("bestrq2.training.batch_finder.TIMED_SECONDS", 0.05)
    monkeypatch.setattr("bestrq2.training.batch_finder.LARGEST", 8)
    assert main(["--find-batch", *QUICK, "train.batch_size=64"]) == 0
    output = capsys.readouterr().out
    assert "clips/s" in output
    shares = re.findall(r"^ +\d+ +[\d.]+ +[\d.]+ +\d+ +(\d+)%$", output, re.MULTILINE)
    assert len(shares) >= 3
    assert "TFLOP/s (measured" in output
    assert "For train.batch_size=64 on one rank: train.accumulate=" in output
    assert "MiB for the gradients, which DDP keeps" in output


def test_batch_finder_times_what_will_run(capsys, monkeypatch):
    """Blocks are compiled where training would compile them, and gradients clipped as in training."""
    compiled, clipped = [], []
    monkeypatch.setattr("bestrq2.training.batch_finder.TIMED_SECONDS", 0.01)
    monkeypatch.setattr("bestrq2.training.batch_finder.LARGEST", 1)
    monkeypatch.setattr("bestrq2.training.batch_finder.compile_blocks", compiled.append)
    real = batch_finder.clip_gradients
    monkeypatch.setattr(
        "bestrq2.training.batch_finder.clip_gradients",
        lambda model, most, **more: clipped.append(most) or real(model, most, **more),
    )
    assert main(["--find-batch", *QUICK, "train.compile=true", "optimizer.max_grad_norm=0.5"]) == 0
    assert len(compiled) == 1
    assert set(clipped) == {0.5}
    assert main(["--find-batch", *QUICK]) == 0
    assert len(compiled) == 1


def test_batch_finder_stops_where_memory_ends(capsys, monkeypatch):
    config = load_config("best_rq2_tiny", QUICK)
    model = seeded_model(config)
    forward = type(model).forward

    def limited(self, waveform, *rest, **options):
        if len(waveform) > 2:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return forward(self, waveform, *rest, **options)

    monkeypatch.setattr(type(model), "forward", limited)
    monkeypatch.setattr("bestrq2.training.batch_finder.TIMED_SECONDS", 0.05)
    assert main(["--find-batch", *QUICK]) == 0
    output = capsys.readouterr().out
    assert "4   out of memory" in output
    assert "Largest tried: 2 clips (4 clips do not fit)" in output
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    assert main(["--find-batch", *QUICK]) == 2
    assert "not one clip of 1.8 s fits" in capsys.readouterr().err


def test_batch_finder_has_the_next_batch_in_hand_as_training_has(capsys, monkeypatch):
    class Crowded(batch_finder.Feeder):
        def prefetch(self):
            super().prefetch()
            if len(self._next.batch) > 2:
                self._next = torch.OutOfMemoryError("simulated: out of memory")

    monkeypatch.setattr("bestrq2.training.batch_finder.TIMED_SECONDS", 0.01)
    monkeypatch.setattr("bestrq2.training.batch_finder.Feeder", Crowded)
    assert main(["--find-batch", *QUICK, "train.batch_size=8"]) == 0
    output = capsys.readouterr().out
    assert "Largest tried: 2 clips (4 clips do not fit)" in output
    assert "train.accumulate=" in output
    samples = round(1.8 * 16000)
    assert f"; {2 * 8 * samples * 4 / 2**20:.0f} MiB for the waveforms of this step and the next" in output


@pytest.mark.parametrize("message", ["simulated: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_batch_finder_gives_back_the_memory_of_a_backward_pass_that_failed(monkeypatch, message):
    """The graph of a pass holds most of a GPU; the next trial must not begin beside it."""
    config = load_config("best_rq2_tiny", QUICK)
    model = seeded_model(config).train()
    held, alive = [], []

    def fail(*_, **__):
        raise RuntimeError(message)

    real = batch_finder._release_memory
    monkeypatch.setattr(batch_finder, "_release_memory", lambda device: real(device) or alive.append(held[-1]()))
    hook = model.register_forward_hook(lambda *of: held.append(weakref.ref(of[2])))
    monkeypatch.setattr(batch_finder, "clip_gradients", fail)
    with hook:
        assert batch_finder.measure(config, model, 2, torch.device("cpu"), None) is None
    assert len(held) == 1
    assert alive == [None]
    assert all(p.grad is None for p in model.parameters())


def test_batch_finder_names_the_memory_of_the_trial_itself(monkeypatch):
    """CUDA's peak is of the process; a trial that failed was larger than those after it."""
    config = load_config("best_rq2_tiny", QUICK)
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(batch_finder, "_release_memory", lambda device: None)
    monkeypatch.setattr(batch_finder, "_time_steps", lambda *_: reset.append("steps"))
    batch_finder.measure(config, seeded_model(config), 2, torch.device("cuda"), None)
    assert reset == [torch.device("cuda"), "steps"]
