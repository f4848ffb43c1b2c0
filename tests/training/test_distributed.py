"""Several ranks train the same curve as one, restart after a killed rank, and resume with another number of ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import pytest
import soundfile
import torch
from plain_training import SMALL_MODEL
from torch.distributed import HashStore

from bestrq2.config import ConfigError, load_config
from bestrq2.data import CropDataset, batches, tiny_dataset
from bestrq2.errors import TrainingError
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.folder import RunFolder, read_metrics
from bestrq2.train import lost_ranks_told, main, run, seeded_model
from bestrq2.training.distributed import Ranks
from bestrq2.training.open_data import open_dataset
from bestrq2.training.step import micro_batches
from bestrq2.training.trainer import Trainer

from .undisturbed import PLAIN

SMALL = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=8",
    "train.batch_size=6",
    "train.save_every=4",
    "train.ema_decay=0.9",
    "train.pictures_every=0",
    "optimizer.max_grad_norm=1.0",
    *SMALL_MODEL,
    "validation.source=DATA",
    "validation.every=4",
    "validation.clips=5",
]
COLUMNS = ("loss", "accuracy", "unigram", "perplexity", "grad_norm", "learning_rate", "mask_ratio")
VALUES = (*COLUMNS, "validation/loss", "validation/accuracy")


def ragged_folder(folder: Path) -> Path:
    """Clips of different lengths, so that ranks and micro-batches have different numbers of targets; one is broken."""
    folder.mkdir()
    for number, file in enumerate(tiny_dataset()[:7]):
        samples, rate = soundfile.read(file.path)
        soundfile.write(folder / f"{number}.wav", samples[: 9000 + 3000 * number], rate)
    (folder / "broken.wav").write_bytes((folder / "6.wav").read_bytes()[:44] + b"")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return ragged_folder(tmp_path_factory.mktemp("data") / "audio")


def options(data: Path, runs: Path, name: str, *more: str) -> list[str]:
    small = [value.replace("DATA", str(data)) for value in SMALL]
    return ["--runs", str(runs), "--name", name, "--config", "best_rq2_tiny", "--data", str(data), *small, *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert main(options(data, runs, "alone")) == 0
    return runs / "alone"


@pytest.fixture(scope="module")
def two_ranks(nursery, tmp_path_factory) -> Callable[[list[str]], None]:
    """Train with two ranks. The tests of signals and restarts start theirs by torchrun."""
    folder = tmp_path_factory.mktemp("ranks")

    def train(arguments: list[str]) -> None:
        code, output = nursery.run(folder, arguments, PLAIN, ranks=2)
        assert code == 0, output

    return train


def assert_same_curve(run: Path, expected: Path, rtol: float = 2e-5) -> None:
    rows, wanted = read_metrics(run), read_metrics(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted):
        for name in VALUES:
            if want.get(name):
                assert float(row[name]) == pytest.approx(float(want[name]), rel=rtol, abs=1e-7), (row["step"], name)


def assert_same_checkpoint(run: Path, expected: Path) -> None:
    """AdamW divides by the root of tiny second moments, which magnifies rounding: hence the absolute tolerance."""
    found, wanted = (read_checkpoint(list_checkpoints(path / "checkpoints")[-1]) for path in (run, expected))
    for of in ("weights", "averaged_weights"):
        ours, theirs = getattr(found, of)(), getattr(wanted, of)()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5, msg=name)
    assert found.training_state().keys() == wanted.training_state().keys()
    assert found.extra["audio_seconds"] == pytest.approx(wanted.extra["audio_seconds"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_the_curve_of_one(tmp_path, data, alone, two_ranks, strategy):
    two_ranks(options(data, tmp_path, "two", f"train.strategy={strategy}", "train.accumulate=2", "data.workers=1"))
    assert_same_curve(tmp_path / "two", alone)
    assert_same_checkpoint(tmp_path / "two", alone)


def test_two_ranks_share_batches_of_similar_lengths(tmp_path, data, two_ranks, capsys):
    """Steps of any number of clips: each rank takes its part, and the curve is that of one rank."""
    buckets = ["data.batching=buckets", "data.batch_seconds=10", "data.workers=1"]
    assert main(options(data, tmp_path, "one", *buckets)) == 0
    two_ranks(options(data, tmp_path, "two", *buckets))
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    seconds = [float(row["audio_seconds"]) for row in read_metrics(tmp_path / "two") if row["audio_seconds"]]
    assert len({round(after - before, 3) for before, after in pairwise(seconds)}) > 1
    too_small = ["data.batching=buckets", "data.batch_seconds=2", "train.accumulate=2", "data.crop_seconds=2"]
    assert main(options(data, tmp_path, "small", *too_small)) == 2
    assert "data.batch_seconds: expected room for 2 clips of full length" in capsys.readouterr().err


def test_accumulation_is_the_same_update(tmp_path, data, alone):
    assert main(options(data, tmp_path, "parts", "train.accumulate=4")) == 0
    assert_same_curve(tmp_path / "parts", alone)
    assert_same_checkpoint(tmp_path / "parts", alone)


def test_equal_weights_of_micro_batches_would_be_seen(data, alone):
    """The tests above notice if every part counted the same instead of by its targets."""
    config = load_config("best_rq2_tiny", [value.replace("DATA", str(data)) for value in SMALL])
    config.data.source = str(data)
    model = seeded_model(config).eval()
    batch = next(batches(open_dataset(config), 6, num_steps=1))
    parts = micro_batches(batch, 4)
    counts = [model.num_predicted(part.lengths, 0) for part in parts]
    losses = [model(part.waveform, part.lengths, step=0, index=part.index).loss.item() for part in parts]
    whole = model(batch.waveform, batch.lengths, step=0, index=batch.index)
    assert sum(counts) == int(whole.plan.predicted_lengths.sum())
    weighted = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    assert weighted == pytest.approx(whole.loss.item(), rel=1e-6)
    assert abs(sum(losses) / len(losses) - whole.loss.item()) > 5 * 2e-5 * whole.loss.item()


def test_resume_with_another_number_of_ranks(tmp_path, data, alone, two_ranks):
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    two_ranks(["--resume", str(tmp_path / "run"), "train.strategy=fsdp"])  # one rank until step 4, then two
    assert_same_curve(tmp_path / "run", alone)
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_curve(tmp_path / "run", alone)
    assert_same_checkpoint(tmp_path / "run", alone)


def test_killed_rank_restarts_from_the_last_checkpoint(tmp_path, data, alone):
    slow = options(data, tmp_path, "killed", "--resume")
    launcher = ["--nproc-per-node", "2", "--max-restarts", "2", "--monitor-interval", "0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "bestrq2.train", *slow]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "killed" / "checkpoints"):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "Resuming" in output
    assert_same_curve(tmp_path / "killed", alone)


def test_ranks_that_are_left_tell_from_where_the_run_goes_on(tmp_path, alone):
    """They get errors of gloo where one is killed. A single process has no other rank to lose."""
    gone = "[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:18612"
    for folder, told in ((alone, "goes on from step 8"), (tmp_path, "begins again: nothing was saved yet")):
        message = rf"^another rank ended; see the messages of the other ranks; bestrq2 train --resume \S+ {told}$"
        with pytest.raises(TrainingError, match=message), lost_ranks_told(RunFolder(folder), Ranks(0, 2)):
            raise RuntimeError(gone)
    for ranks, error in ((Ranks(), RuntimeError(gone)), (Ranks(0, 2), RuntimeError("a fault"))):
        with pytest.raises(RuntimeError, match=re.escape(str(error))), lost_ranks_told(RunFolder(alone), ranks):
            raise error


def test_sigterm_reaches_all_ranks(tmp_path, data, alone):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bestrq2.train"]
    process = subprocess.Popen(
        [*command, *options(data, tmp_path, "stopped", "train.steps=100000")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(read_metrics(tmp_path / "stopped")) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)  # one rank alone: they stop together, after the same step
    output, _ = process.communicate(timeout=60)
    assert "continue with: bestrq2 train --resume" in output, output
    step = int(read_metrics(tmp_path / "stopped")[-1]["step"])
    assert list_checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == f"step-{step:08d}"


ON_RANK_1 = """
import os
if os.environ["RANK"] == "1":
    from bestrq2.errors import CheckpointError, DataError
    from bestrq2.runs.checkpoint import Checkpoint
    from bestrq2.training.trainer import Trainer
    def fail(*_):
        raise {error}
    {place} = fail
"""
FAULTS = [
    ("Checkpoint.weights", "CheckpointError('not on this machine')", "error: not on this machine"),
    ("Checkpoint.training_state", "CheckpointError('not on this machine')", "error: not on this machine"),
    ("Trainer._stream", "DataError('not on this machine')", "error: rank 1: not on this machine"),
    ("Trainer._stream", "OSError(28, 'not on this machine', 'x')", "error: rank 1: x: not on this machine"),
]


@pytest.mark.parametrize(("place", "error", "message"), FAULTS)
def test_what_one_rank_cannot_do_is_told(tmp_path, alone, nursery, place, error, message):
    """The first rank knows no more than that another one has ended, unless they agreed on it."""
    shutil.copytree(alone, tmp_path / "run")
    code = ON_RANK_1.format(place=place, error=error)
    result, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run"), "train.steps=9"], code, ranks=2)
    assert result == 2
    assert output.count(message) == 1, output
    assert output.count("not on this machine") == 1, output
    assert "Traceback" not in output, output


def test_what_all_ranks_raise_is_told_by_the_first_and_once(tmp_path, alone, nursery):
    shutil.copytree(alone, tmp_path / "run")
    for error, told, code in (("OSError(28, 'no room', 'x')", "error: x: no room", 2), ("ValueError('own')", "own", 1)):
        place = ON_RANK_1.replace('== "1"', '== "0"').format(place="Trainer._finish", error=error)
        result, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run"), "train.steps=9"], place, ranks=2)
        assert (result, output.count(told)) == (code, 1), output


def test_ranks_that_are_left_say_once_that_one_is_gone(monkeypatch, capsys):
    store, gone = HashStore(), RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    for rank, error in ((2, gone), (0, gone), (1, OSError(28, "no room", "x")), (3, gone)):
        monkeypatch.setattr(Ranks, "start", lambda rank=rank: Ranks(rank, 4, store=store))
        monkeypatch.setattr("bestrq2.train.run", Mock(side_effect=error))
        assert main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: rank 2: another rank ended; see the messages of the other ranks")
    assert second.startswith("error: rank 1: x: no room")


LOST = """
from pathlib import Path
from bestrq2.training.evaluation import Evaluation
run = Evaluation.run
def lose(self, step, last, log):
    if step == 4 and self.ranks.is_first:
        for file in Path({folder!r}).iterdir():
            file.write_bytes(file.read_bytes()[:100])
    return run(self, step, last, log)
Evaluation.run = lose
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_audio_that_is_lost_costs_no_training(tmp_path, data, nursery, ranks):
    shutil.copytree(data, tmp_path / "held out")
    more = [f"validation.source={tmp_path / 'held out'}", "train.save_every=100", "data.workers=0"]
    code = LOST.format(folder=str(tmp_path / "held out"))
    result, output = nursery.run(tmp_path, options(data, tmp_path, "run", *more), code, ranks=ranks)
    assert result == 0, output
    for step in (4, 8):
        assert output.count(f"step {step}: no validation: ") == 1, output
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("validation/loss")] == ["0"]
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000008"


def test_validation_clips_that_are_replaced_are_told(tmp_path, data, nursery):
    shutil.copytree(data, tmp_path / "held out")
    code = LOST.format(folder=str(tmp_path / "held out")).replace(".iterdir()", ".glob('[0-4].wav')")
    more = [f"validation.source={tmp_path / 'held out'}", "data.workers=0"]
    result, output = nursery.run(tmp_path, options(data, tmp_path, "run", *more), code)
    assert result == 0, output
    assert output.count("others are measured in their place") == 1, output


def test_validation_audio_that_is_not_there_is_refused_before_anything_is_written(tmp_path, data, alone, capsys):
    missing = f"validation.source={tmp_path / 'nothing'}"
    assert main(options(data, tmp_path, "new", missing)) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    shutil.copytree(alone, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert main(["--resume", str(tmp_path / "run"), missing, "train.steps=9"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=5"], "train.batch_size: expected a multiple of 2 ranks"),
        (["train.batch_size=6", "train.accumulate=4"], "at least 8 for train.accumulate=4, got 6"),
    ],
)
def test_unfit_batch_sizes_are_refused(tmp_path, overrides, message):
    config = load_config("best_rq2_tiny", overrides)
    with pytest.raises(TrainingError, match=message):
        Trainer(config, seeded_model(config), CropDataset(tiny_dataset()), RunFolder(tmp_path), Ranks(0, 2))


def test_restarts_need_a_name_to_resume(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ConfigError, match="--name NAME --resume"):
        run(Namespace(resume=None), Ranks(0, 2))
