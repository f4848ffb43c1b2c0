"""Nothing that happens to a run loses work: kills, signals, full disks, vanishing files, damage, memory, clocks.

Runs that die are children of a :class:`Nursery`; what they resume to is compared bit for bit with an undisturbed run of
the same settings, which use data workers, accumulation, a weight average and bf16.
"""

import itertools
import os
import pickle
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import torch

from bestrq2.checkpoint import list_checkpoints, newest_intact, read_checkpoint
from bestrq2.data import tiny_dataset
from bestrq2.train import main
from bestrq2.training import trainer as trainer_module
from bestrq2.training.bad_batches import load_bad_batch
from bestrq2.training.metrics_log import read_metrics
from bestrq2.training.trainer import Trainer

from .nursery import Nursery

pytestmark = pytest.mark.fault

TINY = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.encoder.depth=1",
    "model.encoder.dropout=0.1",
    "model.predictor.width=32",
    "model.predictor.hidden=48",
    "model.predictor.depth=1",
    "train.batch_size=4",
    "train.accumulate=2",
    "train.precision=bf16",
    "train.ema_decay=0.9",
    "train.steps=9",
    "train.save_every=3",
    "train.keep_last=2",
    "train.keep_best=1",
    "train.pictures_every=0",
]
# In front of every child: nothing that takes time and says nothing about faults.
PLAIN = """
from bestrq2.training import trainer
trainer.peak_flops = lambda *_: (1e12, "not measured")
trainer.save_report = lambda *_: None
"""
OF_THE_MACHINE = {"audio_seconds_per_second", "data_wait", "mfu", "memory_gib", "elapsed_seconds", "padding_share"}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(trainer_module, "peak_flops", lambda *_: (1e12, "not measured"))
    monkeypatch.setattr(trainer_module, "save_report", lambda *_: None)


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = nursery.run(folder, ["--runs", str(folder), "--name", "whole", *TINY, "data.workers=1"], PLAIN)
    assert code == 0, output
    return folder / "whole"


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A copy of the undisturbed run that ended after step 6."""
    run = tmp_path / "half"
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    return run


def curve(run: Path):
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(run)]


def assert_same(run: Path, whole: Path):
    """Loss curve, and of the checkpoints that both keep the weights, their average, the optimizer and the counters."""
    assert curve(run) == curve(whole)
    found = list_checkpoints(run / "checkpoints")
    assert found[-1].name == "step-00000009"
    for folder in found:
        if not (whole / "checkpoints" / folder.name).is_dir():
            continue
        first, second = read_checkpoint(folder), read_checkpoint(whole / "checkpoints" / folder.name)
        for kind in ("weights", "averaged_weights", "training_state"):
            a, b = getattr(first, kind)(), getattr(second, kind)()
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]), f"{folder.name}: {kind} {name}"
        ours, theirs = first.extra, second.extra
        assert ours | {"elapsed_seconds": 0} == theirs | {"elapsed_seconds": 0}
    hidden = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not hidden


def begin(folder: Path, *options: str) -> list[str]:
    return ["--runs", str(folder), "--name", "run", *TINY, *options]


KILL_AT = """
import os, signal
from bestrq2 import checkpoint
from bestrq2.training import saver, trainer
real, calls = {place}, []
def dying(*arguments, **options):
    calls.append(1)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
{place} = dying
"""


@pytest.mark.parametrize(
    ("place", "number", "resumed"),
    [
        ("trainer.first_look", 1, 0),  # before the first checkpoint: the run begins again
        ("checkpoint.save_file", 2, 0),
        ("checkpoint.save_file", 6, 3),  # the averaged weights of step 6
        ("checkpoint._flush", 16, 6),  # step 6 has its name, its folder is not flushed
        ("saver.write_best", 2, 6),
        ("trainer.Trainer._clip", 8, None),  # in step 8, perhaps while step 6 is being written
    ],
)
def test_killed_and_resumed_is_undisturbed(nursery, tmp_path, whole, place, number, resumed):
    fault = PLAIN + KILL_AT.format(place=place, number=number)
    code, output = nursery.run(tmp_path, begin(tmp_path, "data.workers=1"), fault)
    assert code == -signal.SIGKILL, output
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run")], PLAIN)
    assert code == 0, output
    if resumed is not None:
        assert ("from step" in output) == (resumed > 0), output
        assert f"from step {resumed} " in output or "begins again" in output
    assert_same(tmp_path / "run", whole)


SIGNAL_IN_SAVE = """
import os, signal, time
from bestrq2 import checkpoint
from bestrq2.training import interrupt
interrupt.IMPATIENCE_SECONDS = 0.0
real, calls = checkpoint._flush, []
def flush(path):
    calls.append(1)
    if len(calls) == 7:  # in the middle of step 6
        for number in {signals}:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
    real(path)
checkpoint._flush = flush
"""


@pytest.mark.parametrize("signals", [[15], [2], [15, 15], [2, 15]])
def test_signals_during_an_asynchronous_save(nursery, tmp_path, whole, signals):
    """One signal: finish the step and save. A second one: leave at once, but with the checkpoint in hand whole."""
    code, output = nursery.run(
        tmp_path, begin(tmp_path, "data.workers=1"), PLAIN + SIGNAL_IN_SAVE.format(signals=signals)
    )
    assert code == 128 + signals[-1], output
    assert "Traceback" not in output
    checkpoint, problems = newest_intact(tmp_path / "run" / "checkpoints")
    assert not problems
    assert checkpoint.step >= 6
    if len(signals) == 1:
        assert f"after step {checkpoint.step}; continue with --resume" in output
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run")], PLAIN)
    assert code == 0, output
    assert curve(tmp_path / "run") == curve(whole)
    assert_equal_weights(tmp_path / "run", whole)


def assert_equal_weights(run: Path, whole: Path):
    first, second = (read_checkpoint(list_checkpoints(p / "checkpoints")[-1]) for p in (run, whole))
    for kind in ("weights", "averaged_weights", "training_state"):
        a, b = getattr(first, kind)(), getattr(second, kind)()
        assert all(torch.equal(a[name], b[name]) for name in a | b)


SMALL_FILES = """
import resource, signal
from bestrq2.training.saver import Saver
real = Saver.save
def save(self, snapshot, *rest, **options):
    if snapshot.step > 3:  # no file of more than 50 kB fits any more
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    real(self, snapshot, *rest, **options)
Saver.save = save
"""


def test_the_system_refuses_to_write_a_checkpoint(nursery, tmp_path, whole):
    code, output = nursery.run(tmp_path, begin(tmp_path, "data.workers=0"), PLAIN + SMALL_FILES)
    assert code == 2, output
    assert "could not save the checkpoint of step 6" in output
    assert "error: could not save the checkpoint of step 9" in output
    assert "MiB needed" in output
    assert "Traceback" not in output
    assert len(read_metrics(tmp_path / "run")) == 10  # training and its log went on
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


def test_failed_save_is_said_and_the_next_one_succeeds(tmp_path, whole, monkeypatch, capfd):
    from bestrq2 import checkpoint

    real, calls = checkpoint.save_file, []

    def save(tensors, path, *rest, **options):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(tensors, path, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_file", save)
    assert main(begin(tmp_path, "data.workers=0")) == 0
    assert "could not save the checkpoint of step 6" in capfd.readouterr().out
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003", "step-00000009"]
    assert_same(tmp_path / "run", whole)


def test_full_disk_in_the_log(tmp_path, whole, monkeypatch, capfd):
    calls = []

    def append(self, text):
        calls.append(text)
        if 3 <= len(calls) <= 6:
            raise OSError(28, "No space left on device")
        self._file.write(text)

    monkeypatch.setattr("bestrq2.training.metrics_log.MetricsLog._append", append)
    assert main(begin(tmp_path, "data.workers=0")) == 0
    assert "rows are kept in memory" in capfd.readouterr().err
    assert_same(tmp_path / "run", whole)


@contextmanager
def no_superuser():
    """Permissions bind this process."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_read_only_folder(half, capfd):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        os.chmod(folder, 0o755)
        run = Path(shutil.copytree(half, Path(folder) / "run", symlinks=True))
        for path in [run, *run.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
        before = sorted((str(p), p.stat().st_mtime_ns) for p in run.rglob("*") if not p.is_symlink())
        with no_superuser():
            assert main(["--resume", str(run)]) == 2
            assert "the log cannot be written" in capfd.readouterr().err
            assert main(["--resume", str(run), "train.steps=12"]) == 2
            assert "config.yaml cannot be written" in capfd.readouterr().err
            assert main(["--runs", folder, "--name", "new", *TINY]) == 2
            assert "cannot make a run folder" in capfd.readouterr().err
        assert sorted((str(p), p.stat().st_mtime_ns) for p in run.rglob("*") if not p.is_symlink()) == before
        for path in [run, *run.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)


def own_clips(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number, item in enumerate(tiny_dataset()[:count]):
        samples, rate = soundfile.read(item.path)
        soundfile.write(folder / f"{number}.wav", samples, rate)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_files_vanish_during_training(nursery, tmp_path, workers):
    """One: replaced and reported. All of them: what was trained is saved, and continues once they are back."""
    data = own_clips(tmp_path / "audio")
    options = ["--data", str(data), "train.save_every=100", "train.steps=9", f"data.workers={workers}"]
    assert nursery.run(tmp_path, [*begin(tmp_path / "calm"), *options], PLAIN)[0] == 0
    after = f"""
import os, shutil
from bestrq2.training.trainer import Trainer
real = Trainer._count
def count(self, *arguments):
    real(self, *arguments)
    if self.state.progress.step == 3:
        for name in {{names}}:
            os.rename({str(data)!r} + "/" + name, {str(tmp_path)!r} + "/" + name)
Trainer._count = count
"""
    one = PLAIN + after.format(names=["2.wav"])
    code, output = nursery.run(tmp_path, [*begin(tmp_path / "one"), *options], one)
    assert code == 0, output
    assert "2.wav: missing" in output
    last = read_metrics(tmp_path / "one" / "run")[-1]
    reported = (tmp_path / "one" / "run" / "skipped.txt").read_text().splitlines()
    assert int(last["skipped_files"]) == int(last["skipped/missing"]) == len(reported) > 0
    shutil.move(tmp_path / "2.wav", data)

    names = sorted(path.name for path in data.iterdir())
    code, output = nursery.run(tmp_path, [*begin(tmp_path / "all"), *options], PLAIN + after.format(names=names))
    assert code == 2, output
    assert "error: gave up on training sample" in output
    assert "missing" in output
    assert "Traceback" not in output
    checkpoint, _ = newest_intact(tmp_path / "all" / "run" / "checkpoints")
    assert checkpoint.step >= 3
    for name in names:
        shutil.move(tmp_path / name, data)
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "all" / "run")], PLAIN)
    assert code == 0, output
    assert curve(tmp_path / "all" / "run") == curve(tmp_path / "calm" / "run")
    assert_equal_weights(tmp_path / "all" / "run", tmp_path / "calm" / "run")


def test_data_worker_killed(nursery, tmp_path, whole):
    """As the system does when memory runs out."""
    fault = """
import multiprocessing, os, signal
from bestrq2.training.trainer import Trainer
real = Trainer._count
def count(self, *arguments):
    real(self, *arguments)
    if self.state.progress.step == 2:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
Trainer._count = count
"""
    long = ["train.steps=40", "data.workers=1"]  # more than the worker has prepared
    code, output = nursery.run(tmp_path, begin(tmp_path, *long), PLAIN + fault)
    assert code == 2, output
    assert "error: a data worker died: most often the machine ran out of memory" in output
    assert "Traceback" not in output
    checkpoint, _ = newest_intact(tmp_path / "run" / "checkpoints")
    assert checkpoint.step == int(read_metrics(tmp_path / "run")[-1]["step"]) >= 2  # saved when it was noticed
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run"), "train.steps=40"], PLAIN)
    assert code == 0, output


def test_out_of_memory(tmp_path, whole, monkeypatch, capfd):
    real, calls = Trainer._forward_backward, []

    def forward(self, *arguments):
        calls.append(1)
        if len(calls) == 10:  # the second micro-batch of step 5
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_forward_backward", forward)
        assert main(begin(tmp_path, "data.workers=0")) == 2
    error = capfd.readouterr().err
    assert "error: out of memory on cpu: 2 clips of up to 1.8 s in one pass" in error
    for part in ("MiB", "train.accumulate=2", "activation_checkpointing=true", "train.batch_size", "--find-batch"):
        assert part in error
    assert "(CUDA out of memory. Tried to allocate 20.00 GiB.)" in error
    assert "Traceback" not in error
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000004"
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_equal_weights(tmp_path / "run", whole)


def test_non_finite_gradient_keeps_the_batch(tmp_path, monkeypatch):
    real, calls = Trainer._clip, []

    def clip(self):
        calls.append(1)
        return real(self) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(Trainer, "_clip", clip)
    assert main(begin(tmp_path, "data.workers=0")) == 0
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["skipped_steps"] == "1"
    assert rows[4]["grad_norm"] == "nan"
    kept = load_bad_batch(tmp_path / "run" / "bad_batches" / "step-00000004-rank-0.safetensors")
    assert kept.step == 4
    assert kept.waveform.shape[0] == 4
    assert kept.index.tolist() == [12, 13, 14, 15]
    assert all(torch.isfinite(t).all() for t in read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
               .weights().values())  # fmt: skip


def test_clock_jumps(tmp_path, whole, monkeypatch):
    jumps = itertools.cycle([-1e9, 86400.0, 3e9, 0.0, -5.0])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: max(0.0, real() + next(jumps)))
    assert main(begin(tmp_path, "data.workers=0")) == 0
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)
    elapsed = [float(row["elapsed_seconds"]) for row in read_metrics(tmp_path / "run")[1:]]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[-1] < 600


@pytest.mark.parametrize("damage", ["empty", "half", "binary", "not a mapping"])
def test_damaged_configuration(half, whole, damage, capfd):
    """A configuration cut short would be valid YAML with defaults for the rest."""
    path = half / "config.yaml"
    text = path.read_text()
    path.write_bytes(
        {
            "empty": b"",
            "half": text[: text.index("train:") + 60].rsplit("\n", 1)[0].encode(),
            "binary": bytes(300) + b"\xff\xfe",
            "not a mapping": b"- a\n- b\n",
        }[damage]
    )
    assert main(["--resume", str(half)]) == 0
    assert "config.yaml is damaged or cut short" in capfd.readouterr().err
    assert_same(half, whole)


def test_torn_log_and_damaged_notes(half, whole, capfd):
    log = half / "metrics.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:8]) + b"\xff\xfe\x00garbage\n" + lines[8][:30])
    (half / "checkpoints" / "best.json").write_text("[{")
    (half / "versions.json").write_text("{")
    (half / "checkpoints" / "best").unlink()
    for name in (".writing-step-00000007", ".discarded-step-00000003"):
        (half / "checkpoints" / name).mkdir()
        (half / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    assert main(["--resume", str(half)]) == 0
    assert "metrics.csv is damaged: its readable rows are kept, and the file as metrics.damaged.csv" in (
        capfd.readouterr().err
    )
    assert_same(half, whole)
    for name in ("best.json", "best/state.json"):
        assert (half / "checkpoints" / name).read_text() == (whole / "checkpoints" / name).read_text() or "/" in name
    assert os.readlink(half / "checkpoints" / "best") == os.readlink(whole / "checkpoints" / "best")


class Marker:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "ema.safetensors", "state.json"])
def test_foreign_pickle_is_refused_without_running_it(half, whole, tmp_path, file, capfd):
    """Even with a state.json that vouches for it."""
    import json

    from bestrq2.checkpoint import _digest, _sha256

    for folder in list_checkpoints(half / "checkpoints"):
        torch.save({"state": Marker(str(tmp_path / "executed"))}, folder / file)
        if file != "state.json":
            state = json.loads((folder / "state.json").read_text())["state"]
            state["files"][file] = _sha256(folder / file)
            (folder / "state.json").write_text(json.dumps({"sha256": _digest(state), "state": state}))
    assert main(["--resume", str(half)]) == 2
    error = capfd.readouterr().err
    assert f"{file}: cannot be read" in error
    assert "Traceback" not in error
    assert not (tmp_path / "executed").exists()
    with open(folder / file, "rb") as opened, pytest.raises((pickle.UnpicklingError, RuntimeError, AttributeError)):
        torch.load(opened, weights_only=True)  # it is one indeed


def test_wrong_shapes_name_the_first_mismatch(half, capfd):
    assert main(["--resume", str(half), "model.encoder.width=64", "model.encoder.hidden=96"]) == 2
    error = capfd.readouterr().err
    assert "has shape" in error
    assert "expected" in error
    assert "step-00000006" in error
    assert "Traceback" not in error


def test_settings_changed_midway(half, whole, tmp_path, capfd):
    other = Path(shutil.copytree(half, tmp_path / "other", symlinks=True))
    assert main(["--resume", str(half), "data.workers=0", "train.async_save=false", "train.log_every=1"]) == 0
    assert curve(half) == curve(whole)
    assert_equal_weights(half, whole)
    changes = ["train.accumulate=1", "train.precision=fp32", "train.ema_decay=0", "train.keep_best=0"]
    assert main(["--resume", str(other), *changes, "data.workers=0"]) == 0
    last = read_checkpoint(list_checkpoints(other / "checkpoints")[-1])
    assert last.averaged_weights() is None
    assert len(read_metrics(other)) == 10
    assert main(["--resume", str(other), "train.ema_decay=0.9", "train.steps=11", "data.workers=0"]) == 0
    last = read_checkpoint(list_checkpoints(other / "checkpoints")[-1])
    assert last.extra["ema_updates"] == 2
    assert last.averaged_weights() is not None
    assert capfd.readouterr().err.count("Traceback") == 0


def test_two_processes_in_one_folder(half, whole, nursery, tmp_path, capfd):
    import fcntl

    with open(half / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = nursery.run(tmp_path, ["--resume", str(half)], PLAIN)
        assert code == 2
        assert "another process trains in this run folder" in output
    assert nursery.run(tmp_path, ["--resume", str(half)], PLAIN)[0] == 0
    assert_same(half, whole)
