"""Nothing that happens to a run loses work: kills, signals, full disks, vanishing files, memory, clocks.

Runs that die are children of a :class:`Nursery`; what they resume to is compared bit for bit with an undisturbed run of
the same settings, which use data workers, accumulation, a weight average and bf16.
"""

import itertools
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import soundfile
import torch

from bestrq2.data import tiny_dataset
from bestrq2.runs.bad_batches import load_bad_batch
from bestrq2.runs.checkpoint import list_checkpoints, newest_intact, read_checkpoint
from bestrq2.runs.metrics import read_metrics
from bestrq2.train import main
from bestrq2.training.trainer import Trainer

from .undisturbed import PLAIN, assert_equal_weights, assert_same, begin, curve

pytestmark = pytest.mark.fault

KILL_AT = """
import os, signal
from bestrq2.runs import checkpoint
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
    ("workers", "place", "number", "resumed"),
    [
        (0, "trainer.first_look", 1, 0),  # before the first checkpoint: the run begins again
        (0, "checkpoint.save_file", 2, 0),
        (1, "checkpoint.save_file", 6, 3),  # the averaged weights of step 6
        (0, "checkpoint.flush_folder", 4, 6),  # step 6 has its name, its folder is not flushed
        (0, "saver.write_best", 2, 6),
        (1, "trainer.clip_gradients", 8, None),  # in step 8, perhaps while step 6 is being written
    ],
)
def test_killed_and_resumed_is_undisturbed(nursery, tmp_path, whole, workers, place, number, resumed):
    fault = PLAIN + KILL_AT.format(place=place, number=number)
    code, output = nursery.run(tmp_path, begin(tmp_path, f"data.workers={workers}"), fault)
    assert code == -signal.SIGKILL, output
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run")], PLAIN)
    assert code == 0, output
    if resumed is not None:
        assert ("from step" in output) == (resumed > 0), output
        assert f"from step {resumed} " in output or "begins again" in output
    assert_same(tmp_path / "run", whole)


SIGNAL_IN_SAVE = """
import os, signal, time
from bestrq2.runs import checkpoint
from bestrq2.training import interrupt
interrupt.DEBOUNCE_SECONDS = 0.0
real, calls = checkpoint.flush_file, []
def flush(path):
    calls.append(1)
    if len(calls) == 7:  # in the middle of step 6
        for number in {signals}:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
    real(path)
checkpoint.flush_file = flush
"""


@pytest.mark.parametrize("signals", [[15], [2], [15, 15], [2, 15]])
def test_signals_during_an_asynchronous_save(nursery, tmp_path, whole, signals):
    """One signal: finish the step and save. A second one: leave at once, but with the checkpoint in hand whole."""
    code, output = nursery.run(
        tmp_path, begin(tmp_path, f"data.workers={len(signals) - 1}"), PLAIN + SIGNAL_IN_SAVE.format(signals=signals)
    )
    assert code == 128 + signals[-1], output
    assert "Traceback" not in output
    checkpoint, problems = newest_intact(tmp_path / "run" / "checkpoints")
    assert not problems
    assert checkpoint.step >= 6
    if len(signals) == 1:
        assert f"after step {checkpoint.step}; continue with: bestrq2 train --resume" in output
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run")], PLAIN)
    assert code == 0, output
    assert curve(tmp_path / "run") == curve(whole)
    assert_equal_weights(tmp_path / "run", whole)


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
    assert output.count("error: could not save the checkpoint of step 9") == 1
    assert (
        "error: the checkpoint of step 9 could not be written, see above; once there is room, continue with" in output
    )
    assert "B needed" in output
    assert "Traceback" not in output
    assert len(read_metrics(tmp_path / "run")) == 10  # training and its log went on
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


def test_failed_save_is_said_and_the_next_one_succeeds(tmp_path, whole, monkeypatch, capfd):
    from bestrq2.runs import checkpoint

    real, calls = checkpoint.save_file, []

    def save(tensors, path, *rest, **options):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(tensors, path, *rest, **options)

    monkeypatch.setattr(checkpoint, "save_file", save)
    assert main(begin(tmp_path, "data.workers=0")) == 0
    assert "could not save the checkpoint of step 6" in capfd.readouterr().err
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003", "step-00000009"]
    assert_same(tmp_path / "run", whole)


def test_full_disk_in_the_log(tmp_path, whole, monkeypatch, capfd):
    calls = []

    def append(self, text):
        calls.append(text)
        if 3 <= len(calls) <= 6:
            raise OSError(28, "No space left on device")
        self._file.write(text)

    monkeypatch.setattr("bestrq2.runs.metrics.MetricsLog._append", append)
    assert main(begin(tmp_path, "data.workers=0")) == 0
    assert "rows are kept in memory" in capfd.readouterr().err
    assert_same(tmp_path / "run", whole)


def own_clips(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number, item in enumerate(tiny_dataset()[:count]):
        samples, rate = soundfile.read(item.path)
        soundfile.write(folder / f"{number}.wav", samples, rate)
    return folder


def test_files_vanish_during_training(nursery, tmp_path):
    """One: replaced and reported. All of them: what was trained is saved, and continues once they are back."""
    data = own_clips(tmp_path / "audio")
    options = ["--config", "best_rq2_tiny", "--data", str(data), "train.save_every=100", "data.workers=0"]
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
    assert int(last["skipped_files"]) == int(last["skipped/missing"]) >= len(reported) == 1  # a file once
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
    long = ["train.steps=16", "data.workers=1"]  # more than the worker has prepared
    code, output = nursery.run(tmp_path, begin(tmp_path, *long), PLAIN + fault)
    assert code == 2, output
    assert "error: a data worker died: " in output
    assert "Traceback" not in output
    checkpoint, _ = newest_intact(tmp_path / "run" / "checkpoints")
    assert checkpoint.step == int(read_metrics(tmp_path / "run")[-1]["step"]) >= 2  # saved when it was noticed
    code, output = nursery.run(tmp_path, ["--resume", str(tmp_path / "run")], PLAIN)
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
    from bestrq2.training import trainer

    real, calls = trainer.clip_gradients, []

    def clip(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(trainer, "clip_gradients", clip)
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


TWO_RANKS = """
import os, socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", LOCAL_RANK="0")
if os.fork() == 0:
    os.environ.update(RANK="1", LOCAL_RANK="1")
from bestrq2.data import AudioError, dataset
from bestrq2.training.trainer import Trainer
done, count, load = [], Trainer._count, dataset.load_clip
def counted(self, *arguments):
    count(self, *arguments)
    done.append(1)
def failing(item, *arguments, **options):
    if len(done) == 3 and os.environ["RANK"] == "1":
        raise AudioError(item.path, "not readable", "the network drive is gone")
    return load(item, *arguments, **options)
Trainer._count, dataset.load_clip = counted, failing
"""


def test_data_fails_on_one_of_two_ranks(nursery, tmp_path):
    """Both save and stop together, and say once what the failing one met."""
    data = own_clips(tmp_path / "audio", 16)
    options = ["--config", "best_rq2_tiny", "--data", str(data), "train.save_every=100", "data.workers=0"]
    code, output = nursery.run(tmp_path, [*begin(tmp_path), *options], PLAIN + TWO_RANKS)
    assert code == 2, output
    assert output.count("error: gave up on training sample") == 1
    assert "the network drive is gone" in output
    assert "Traceback" not in output
    assert newest_intact(tmp_path / "run" / "checkpoints")[0].step == 4  # the batch of step 5 was the first to fail
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [str(step) for step in range(10)]


def test_validation_left_out_by_a_stop_is_made_up(tmp_path, monkeypatch):
    data = own_clips(tmp_path / "audio")
    options = ["data.workers=0", f"validation.source={data}", "validation.every=3", "validation.clips=4"]
    assert main([*begin(tmp_path / "calm"), *options]) == 0
    real = Trainer._count

    def count(self, *arguments):
        real(self, *arguments)
        if self.state.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_count", count)
        assert main([*begin(tmp_path / "stopped"), *options]) == 128 + signal.SIGTERM
    calm, stopped = tmp_path / "calm" / "run", tmp_path / "stopped" / "run"
    assert [row["step"] for row in read_metrics(stopped)] == list("001233456")
    again = Path(shutil.copytree(stopped, tmp_path / "again", symlinks=True))
    monkeypatch.setattr(Trainer, "_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--resume", str(again)]) == 130  # ended after the validation, before the next checkpoint
    monkeypatch.undo()
    for run in (stopped, again):
        assert main(["--resume", str(run)]) == 0
        assert curve(run) == curve(calm)
        assert_equal_weights(run, calm)
