"""Batches: step k is the same audio with any workers, ranks and starting point; faults arrive as they are."""

import errno
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, dataloader

from bestrq2.data import AudioFile, CropDataset, DataError, Sample, Skip, batches, collate, collect
from bestrq2.data.workers import _worker_batches


@pytest.fixture(scope="module")
def dataset():
    files, _ = collect()
    absent = AudioFile("absent.wav", 2.0, 16000, "speech")
    return CropDataset([*files, absent], crop_seconds=1.3, seed=11)


def _assert_equal(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert torch.equal(one.waveform, other.waveform)
        assert torch.equal(one.lengths, other.lengths)
        assert torch.equal(one.index, other.index)
        assert one.skips == other.skips


def test_collate_pads_with_zeros():
    samples = [Sample(np.full(n, n, np.float32), index, (Skip("x", "missing"),)) for index, n in ((5, 3), (6, 1))]
    batch = collate(samples)
    assert batch.waveform.tolist() == [[3, 3, 3], [1, 0, 0]]
    assert batch.waveform.dtype == torch.float32
    assert batch.lengths.tolist() == [3, 1]
    assert batch.index.tolist() == [5, 6]
    assert batch.lengths.dtype == batch.index.dtype == torch.int64
    assert batch.skips == [Skip("x", "missing")] * 2
    assert len(batch) == 2
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_batch_to_moves_the_waveform_only():
    batch = collate([Sample(np.zeros(4, np.float32), 0)])
    moved = batch.to("meta", non_blocking=True)
    assert moved.waveform.device.type == "meta"
    assert moved.lengths.device.type == moved.index.device.type == "cpu"
    assert batch.waveform.device.type == "cpu"


def test_steps_hold_consecutive_indices_across_epochs(dataset):
    size = 7
    steps = list(batches(dataset, size, num_steps=2 * dataset.num_slots // size))
    indices = torch.cat([batch.index for batch in steps])
    assert torch.equal(indices, torch.arange(len(indices)))
    assert len(indices) > dataset.num_slots


@pytest.mark.filterwarnings("error:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batches(dataset, workers, monkeypatch):
    """Three on one core, too, without a word."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    expected = list(batches(dataset, 6, num_steps=9))
    assert any(batch.skips for batch in expected)
    _assert_equal(batches(dataset, 6, num_steps=9, workers=workers), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step(dataset, workers):
    whole = list(batches(dataset, 4, num_steps=15))
    for start in (1, 6, 13):
        _assert_equal(batches(dataset, 4, start_step=start, num_steps=15 - start, workers=workers), whole[start:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_step(dataset, world_size):
    whole = list(batches(dataset, 6, start_step=2, num_steps=5))
    share = {"start_step": 2, "num_steps": 5, "world_size": world_size}
    ranks = [list(batches(dataset, 6, rank=rank, **share)) for rank in range(world_size)]
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert all(len(part) == 6 // world_size for part in parts)
        assert torch.equal(torch.cat([part.waveform for part in parts]), expected.waveform)
        assert torch.equal(torch.cat([part.index for part in parts]), expected.index)
        assert [skip for part in parts for skip in part.skips] == expected.skips


def test_global_random_state_is_untouched(dataset):
    """Else a resumed run would draw other dropout masks than the run it continues."""
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(batches(dataset, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_endless_without_num_steps(dataset):
    stream = batches(dataset, 2, start_step=10**6)
    assert next(stream).index.tolist() == [2 * 10**6, 2 * 10**6 + 1]
    assert next(stream).index.tolist() == [2 * 10**6 + 2, 2 * 10**6 + 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_errors_arrive_whole(tmp_path, workers):
    broken = CropDataset([AudioFile(str(tmp_path / "absent.wav"), 1.0)])
    with pytest.raises(DataError, match=r"gave up on training sample 0: 1 files .*\n.*absent.wav: missing$"):
        next(batches(broken, 2, workers=workers))


class _Dies(Dataset):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(np.zeros(8, np.float32), index)


def test_killed_worker():
    stream = batches(_Dies(), 2, workers=1, start_method="fork")  # this class cannot be imported by a fresh process
    with pytest.raises(DataError, match="a data worker died"):
        list(stream)


def test_a_dead_worker_is_told_once(monkeypatch):
    """Torch tells it where it waits for a batch and in a handler of SIGCHLD, which may come later than our error."""
    wait = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.2,))  # seconds until it looks for the dead
    stream = batches(_Dies(), 2, workers=2, start_method="fork")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        with pytest.raises(DataError, match="a data worker died") as _held:
            list(stream)
        assert not multiprocessing.active_children()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.raise_signal(signal.SIGCHLD)


def test_rejects_bad_arguments_at_the_call(dataset):
    for arguments in (
        {"batch_size": 0},
        {"batch_size": 5, "world_size": 2},
        {"batch_size": 4, "world_size": 2, "rank": 2},
        {"batch_size": 4, "start_step": -1},
        {"batch_size": 4, "workers": -1},
    ):
        with pytest.raises(ValueError, match="must be"):
            batches(dataset, **arguments)


_ENDLESS = """
import signal, sys
from bestrq2.data import CropDataset, batches, collect

stopping = False

def stop(*_):
    global stopping
    stopping = True

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    dataset = CropDataset(collect()[0], crop_seconds=1.0)
    try:
        after = 0
        for batch in batches(dataset, 4, workers=2):
            print(batch.index[0].item(), flush=True)
            after += stopping
            if after == 50:  # far more than was decoded ahead
                sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def _group_ends(group: int) -> bool:
    for _ in range(150):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status"), [("SIGINT", 130), ("SIGTERM", 0), ("SIGKILL", -signal.SIGKILL)], ids=lambda value: str(value)
)
def test_signals(tmp_path, signals, status):
    """Ctrl-C ends the run at once, SIGTERM lets it finish; no tracebacks of workers, nothing left running."""
    (tmp_path / "endless.py").write_text(_ENDLESS)
    paths = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    with open(tmp_path / "errors.txt", "w+") as errors:
        run = subprocess.Popen(
            # On one core torch warns of more workers than cores.
            [sys.executable, "-W", "ignore::UserWarning", str(tmp_path / "endless.py")],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        try:
            for _ in range(20):
                assert run.stdout.readline()
            if signals == "SIGKILL":
                run.kill()  # only the main process: its workers must notice
            else:
                os.killpg(run.pid, getattr(signal, signals))  # as a terminal or a scheduler does
            while run.stdout.readline():
                pass
            assert run.wait(timeout=30) == status
            assert _group_ends(run.pid), "workers are still running"
            errors.seek(0)
            printed = errors.read()
            assert "Traceback" not in printed
            # Python itself reports the semaphores that it removes after a process that was killed.
            strange = [line for line in printed.splitlines() if "resource_tracker" not in line and line[:2] != "  "]
            assert not strange
        finally:
            run.stdout.close()
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def test_process_ends_although_a_stream_was_never_closed(tmp_path):
    script = tmp_path / "abandon.py"
    script.write_text(
        "import builtins\n"
        "from bestrq2.data import CropDataset, batches, tiny_dataset\n"
        "if __name__ == '__main__':\n"
        "    builtins.kept = batches(CropDataset(tiny_dataset(), 1.0), 4, workers=1)\n"
        "    next(builtins.kept)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), EOFError(), PermissionError(13, "denied")])
def test_a_worker_that_cannot_be_started(dataset, monkeypatch, error):
    def iterate(loader):
        raise error

    monkeypatch.setattr("bestrq2.data.workers.DataLoader.__iter__", iterate)
    with pytest.raises(DataError, match=r"a data worker could not be started: .*; data\.workers=0 decodes"):
        next(batches(dataset, 2, workers=1))
    with pytest.raises(type(error)):  # no worker, another fault
        next(batches(dataset, 2))


def test_a_folder_for_temporary_files_with_a_name_too_long_for_sockets(dataset, monkeypatch):
    def iterate(loader):
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr("bestrq2.data.workers.DataLoader.__iter__", iterate)
    with pytest.raises(DataError, match=r"too long: TMPDIR=/tmp helps, or data\.workers=0"):
        next(batches(dataset, 2, workers=1))


@pytest.mark.parametrize("started", [0, 1])
def test_workers_of_which_one_cannot_be_started(dataset, monkeypatch, started):
    """One sentence: no traceback of the loader's cleanup beside it, and no worker that goes on."""
    real, left, unraised = multiprocessing.context.ForkProcess.start, [None] * started, []
    before = set(multiprocessing.active_children())

    def start(process):
        if not left:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        left.pop()
        real(process)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", start)
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    with pytest.raises(DataError, match=r"could not be started: .*Resource temporarily unavailable.*data\.workers=0"):
        next(batches(dataset, 2, workers=2, start_method="fork"))
    gc.collect()
    assert unraised == []
    assert set(multiprocessing.active_children()) <= before


def _no_threads(thread):
    raise RuntimeError("can't start new thread")


def test_a_worker_that_may_not_start_a_thread(dataset, monkeypatch, capfd):
    start = multiprocessing.context.ForkProcess._bootstrap

    def bootstrap(process, **options):
        threading.Thread.start = _no_threads  # in the child
        return start(process, **options)

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "_bootstrap", bootstrap)
    with pytest.raises(DataError, match=r"thread of a data worker could not be started: the limit .* ulimit -u"):
        next(batches(dataset, 2, workers=1, start_method="fork"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_batch_that_cannot_be_handed_over(dataset, monkeypatch, capfd):
    """Shared memory is full (64 MB in a container): PyTorch prints it, drops the batch and waits for it without end."""

    def full(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    with pytest.raises(DataError, match=r"a data worker died: shared memory .*data\.workers=0"):
        next(batches(dataset, 2, workers=1, start_method="fork"))
    printed = capfd.readouterr().err
    assert "No space left on device" in printed
    assert "Traceback" not in printed


def test_a_torch_whose_iterator_has_another_name(dataset, monkeypatch):
    assert _worker_batches(SimpleNamespace()) is None
    assert _worker_batches(SimpleNamespace(_MultiProcessingDataLoaderIter=object)) is None
    expected = next(batches(dataset, 2))
    monkeypatch.setattr("bestrq2.data.workers._WorkerBatches", None)
    assert torch.equal(next(batches(dataset, 2, workers=1)).waveform, expected.waveform)


def test_a_main_process_that_may_not_start_a_thread(dataset, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", _no_threads)
    # The worker, a fork, may not either: whichever ends first is named, or that the worker is gone.
    refused = r"thread (for the data workers|of a data worker) could not be started: .*\(data\.workers=0"
    words = rf"{refused}|a data worker died: .*workers=0"
    with pytest.raises(DataError, match=words):
        next(batches(dataset, 2, workers=1, start_method="fork"))
