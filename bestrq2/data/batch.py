"""Batches of training samples: batch k of a run is a pure function of (dataset, batch size, k)."""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing import active_children, get_all_start_methods, get_context, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.spawn import get_executable
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, dataloader

from bestrq2.data.dataset import Sample
from bestrq2.data.steps import EqualSteps, StepPlan, plan_of, rank_share
from bestrq2.errors import DataError, Skip, check_open_files
from bestrq2.signals import kept_from_children

__all__ = ["Batch", "batches", "collate"]

_workers: WeakSet[BaseProcess] = WeakSet()
_NO_THREAD = 75  # exit code of a worker that may not start a thread


@atexit.register
def _end_workers() -> None:
    """End the workers of a stream that was not closed.

    They ignore SIGTERM (see below), which is all that multiprocessing sends at the end of the main process before it
    waits for them: without this it would wait forever.
    """
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


@dataclass(frozen=True)
class Batch:
    """Samples padded with zeros to the longest: ``waveform`` (B, S) float32, ``lengths`` and ``index`` (B,) int64.

    On its way from a cache the waveform is int16, half as many bytes; :meth:`as_float` makes it float32.

    ``lengths`` counts the samples before the padding and stays on the CPU; ``index`` is the global sample index (CPU);
    ``skips`` are the files that could not be read on the way; ``domains`` has the domain of every sample; ``prepared``
    is what the model computed of the whole batch ahead of its step, or None.
    """

    waveform: Tensor
    lengths: Tensor
    index: Tensor
    skips: list[Skip] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    prepared: Any = None

    def __len__(self) -> int:
        return self.waveform.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of a pretraining model, besides step and index: waveform and lengths."""
        return self.waveform, self.lengths

    def part(self, begin: int, end: int) -> "Batch":
        """Samples ``begin`` ... ``end - 1``, padded to the longest of them, without the skips."""
        lengths = self.lengths[begin:end]
        waveform = self.waveform[begin:end, : int(lengths.max())]
        return replace(
            self,
            waveform=waveform,
            lengths=lengths,
            index=self.index[begin:end],
            skips=[],
            domains=self.domains[begin:end],
            prepared=None,
        )

    def as_float(self) -> "Batch":
        """The same batch with a float32 waveform: int16 over 32768, which is exact."""
        if self.waveform.dtype != torch.int16:
            return self
        return replace(self, waveform=self.waveform.float().mul_(1 / 32768))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its waveform on ``device``."""
        return replace(self, waveform=self.waveform.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch with its waveform in page-locked memory, from where a copy to a GPU can run alongside."""
        return replace(self, waveform=self.waveform.pin_memory())


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into one zero-padded batch, in the given order; int16 if all of them are.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    lengths = [len(sample.waveform) for sample in samples]
    integers = all(sample.waveform.dtype == np.int16 for sample in samples)
    waveform = np.zeros((len(samples), max(lengths)), np.int16 if integers else np.float32)
    for row, sample in zip(waveform, samples):
        row[: len(sample.waveform)] = sample.waveform
    return Batch(
        waveform=torch.from_numpy(waveform),
        lengths=torch.tensor(lengths),
        index=torch.tensor([sample.index for sample in samples]),
        skips=[skip for sample in samples for skip in sample.skips],
        domains=[sample.domain for sample in samples],
    )


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    prefetch: int = 4,
    start_method: str | None = None,
    as_float: bool = True,
) -> Generator[Batch, None, None]:
    """Deliver the batches of steps ``start_step`` ... ``start_step + num_steps - 1``.

    Step k of all ranks together holds the samples of ``dataset.plan(batch_size).samples(k)``, for a ``CropDataset``
    those with global index k * batch_size ... (k + 1) * batch_size - 1, and rank r its contiguous share, so the audio
    of a step depends neither on ``workers`` nor on ``world_size``, and a run may resume at any step with other values
    of both. Every rank has at least one sample in every step. Epochs pass without a pause.

    Args:
        dataset: a map from global index to :class:`Sample`, such as ``CropDataset``; picklable if ``workers`` > 0.
        batch_size: samples of a step over all ranks; a multiple of ``world_size``. A ``BucketDataset`` multiplies it by
            its seconds per row, takes as many samples as fit, and needs no multiple, only as many samples as ranks.
        start_step: first step.
        num_steps: None for no end.
        workers: processes that decode ahead; 0 decodes in this one, when asked. Each uses one thread.
        rank, world_size: this process's place among those that share every step.
        pin_memory: deliver waveforms in page-locked memory (only useful with a GPU).
        prefetch: batches each worker prepares ahead.
        start_method: of the workers: "forkserver" (default where it exists), "spawn" or "fork". The default never
            copies a process in which CUDA or threads are active. Only a script that defines its own ``dataset`` class
            must be guarded by ``if __name__ == "__main__":``.
        as_float: deliver float32; False leaves int16 samples of a cache as they are, for a copy to a GPU.

    The workers end with the generator: exhaust it or ``close()`` it.

    Raises:
        ValueError: an argument out of range.
        DataError: a sample could not be made, or a worker was killed.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size and world_size must be positive, got {batch_size} and {world_size}")
    plan = plan_of(dataset, batch_size)
    if isinstance(plan, EqualSteps) and batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of world_size, got {batch_size} and {world_size}")
    if plan.min_rows < world_size:
        raise ValueError(
            f"world_size must be at most {plan.min_rows}, the samples of the smallest step, got {world_size}: "
            "raise the seconds of a batch, or shorten the crops"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    if start_step < 0 or workers < 0 or prefetch < 1 or (num_steps is not None and num_steps < 0):
        raise ValueError(
            "start_step, num_steps and workers must be >= 0 and prefetch >= 1, "
            f"got {start_step}, {num_steps}, {workers}, {prefetch}"
        )
    steps = _Steps(plan, start_step, num_steps, rank, world_size)
    # Checked above at the call, not at the first batch: that is why the generator is another function.
    return _deliver(dataset, steps, workers, pin_memory, prefetch, start_method, as_float)


def _deliver(
    dataset: Dataset,
    steps: "_Steps",
    workers: int,
    pin_memory: bool,
    prefetch: int,
    start_method: str | None,
    as_float: bool,
) -> Generator[Batch, None, None]:
    options: dict[str, Any] = {}
    if workers:
        method = start_method or ("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
        context = get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["bestrq2.data.worker_server"])
        options = {"multiprocessing_context": context, "prefetch_factor": prefetch, "worker_init_fn": _start_worker}
    with warnings.catch_warnings():  # workers are asked for in the configuration, and may be more than cores
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        loader = _Loader(
            _Guarded(dataset),
            batch_sampler=steps,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=_collate_or_fail,
            generator=torch.Generator(),  # otherwise the loader would draw from the global generator of the training
            **options,
        )
    mine: set[BaseProcess] = set()
    try:
        before = set(active_children())
        with _named_start() if workers else nullcontext(), _without_main(dataset) if workers else nullcontext():
            try:
                with kept_from_children():
                    stream = iter(loader)
            except BaseException:
                for worker in set(active_children()) - before:
                    worker.kill()
                raise
        mine = set(active_children()) - before
        _workers.update(mine)
        for batch in stream:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch.as_float() if as_float else batch
    except RuntimeError as error:
        here = workers and "can't start new thread" in str(error)
        if here or any(worker.exitcode == _NO_THREAD for worker in mine):
            raise DataError(
                f"a {'thread for the data workers' if here else 'thread of a data worker'} could not be started: the "
                "limit of processes and threads is reached; raise ulimit -u, or use fewer workers (data.workers=0 "
                "decodes in the main process)"
            ) from error
        if "DataLoader worker" in str(error):
            memory = "the machine ran out of memory, or " if "Killed" in str(error) or "Bus" in str(error) else ""
            raise DataError(
                f"a data worker died: {memory}shared memory (/dev/shm) is full (docker run --shm-size=2g), the "
                "decoder crashed on a file, or the worker could not start (its error is above, if there is one); "
                f"data.workers=0 decodes in the main process and shows which. ({error})"
            ) from error
        raise


@contextmanager
def _named_start() -> Iterator[None]:
    """Name the worker in errors of its start: "Broken pipe" is all that the system reports."""
    try:
        yield
    except (OSError, EOFError) as error:
        check_open_files(error)
        remedy = "data.workers=0 decodes in the main process"
        if "AF_UNIX path too long" in str(error):
            remedy = f"the name of the folder for temporary files is too long: TMPDIR=/tmp helps, or {remedy}"
        raise DataError(
            f"a data worker could not be started: {error or type(error).__name__} (interpreter: "
            f"{os.fsdecode(get_executable())}); {remedy}"
        ) from error


@contextmanager
def _without_main(dataset: Dataset) -> Iterator[None]:
    """Start workers that do not import the main script.

    They need nothing of it, unless the data set is defined there. Importing it runs a script without a guard
    ``if __name__ == "__main__":`` again in every worker, and fails for one from standard input.
    """
    main = sys.modules["__main__"]
    if type(dataset).__module__ == "__main__":
        yield
        return
    hidden: dict[str, Any] = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)


class _Loader(DataLoader):
    """A loader whose half-built iterator can be cleaned up."""

    def _get_iterator(self) -> Any:
        return _WorkerBatches(self) if self.num_workers and _WorkerBatches else super()._get_iterator()


def _worker_batches(theirs: Any) -> Any:
    """The iterator of torch, which ends its workers also if not all of them could be started.

    In torch (2.11 to 2.13) ``__del__`` reads attributes that are set behind the start: it prints a traceback, and the
    workers that did start go on. None for a torch whose iterator has another name or form: it is used as it is.
    """
    base: Any = getattr(theirs, "_MultiProcessingDataLoaderIter", None)
    if not hasattr(base, "_shutdown_workers"):
        return None

    class WorkerBatches(base):
        def __init__(self, loader: DataLoader) -> None:
            try:
                super().__init__(loader)
            except BaseException:
                self._shutdown_workers()
                raise

        def _shutdown_workers(self) -> None:
            if "_workers" not in vars(self):
                return  # before the first start
            if "_workers_status" not in vars(self):
                self._workers_status = [True] * len(self._workers)
            super()._shutdown_workers()

    return WorkerBatches


_WorkerBatches = _worker_batches(dataloader)


class _Steps:
    """The batch sampler: this rank's share of the global sample indices, step by step."""

    def __init__(self, plan: StepPlan, start_step: int, num_steps: int | None, rank: int, world_size: int) -> None:
        self.plan, self.start_step, self.num_steps = plan, start_step, num_steps
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        steps = (
            count(self.start_step)
            if self.num_steps is None
            else range(self.start_step, self.start_step + self.num_steps)
        )
        for step in steps:
            yield list(rank_share(self.plan.samples(step), self.rank, self.world_size))


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from a worker: as a value it arrives whole, without the loader's wrapping."""

    error: DataError

    def pin_memory(self) -> "_Failure":
        return self


class _Guarded(Dataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except DataError as error:
            return _Failure(error)


_reserved: list[threading.Thread] = []
_released = threading.Event()


def _collate_or_fail(samples: list[Any]) -> Batch | _Failure:
    while _reserved:  # in a worker: the queue starts two threads when it gets its first batch
        _released.set()
        _reserved.pop().join()
    failure = next((sample for sample in samples if isinstance(sample, _Failure)), None)
    return failure if failure is not None else collate(samples)


def _start_worker(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group. The main process may want to finish its step and
    # save; it ends its workers itself, and they end on their own should it be gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.excepthook = _report_unless_disconnected
    Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    try:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        # One sends batches and one hands over their memory. Where they cannot be started, the batch is gone, and the
        # main process waits for it: so their places are taken now.
        for _ in range(2):
            thread = threading.Thread(target=_released.wait, daemon=True)
            thread.start()
            _reserved.append(thread)
    except RuntimeError:
        os._exit(_NO_THREAD)
    torch.set_num_threads(1)


def _end_unsent(error: BaseException, _: Any) -> None:
    """End this worker: by default the batch is dropped, and the main process waits for it without end."""
    if not isinstance(error, ConnectionError | EOFError):
        os.write(2, f"data worker: {error}\n".encode(errors="backslashreplace"))
    os._exit(1)


def _report_unless_disconnected(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # The thread that hands batches over prints a traceback if the main process stops in the middle of receiving one.
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent() -> None:
    """End this worker when the main process is gone, even if it was killed.

    The loader's own watch looks at the parent's process id, which for a forkserver is the server; and the server waits
    for the workers, so without this all of them would stay forever.
    """
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
