"""Processes that decode ahead: how they start, fail and end."""

import atexit
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_all_start_methods, get_context, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.spawn import get_executable
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, dataloader

from bestrq2.errors import DataError, check_open_files
from bestrq2.signals import kept_from_children

__all__ = ["decoded_ahead"]

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


def decoded_ahead(
    dataset: Dataset,
    steps: Iterable[list[int]],
    collate: Callable[[list[Any]], Any],
    workers: int,
    pin_memory: bool,
    prefetch: int,
    start_method: str | None,
) -> Generator[Any, None, None]:
    """Deliver ``collate`` of the samples of every step, made by ``workers`` processes, or by this one if none.

    The arguments are those of :func:`bestrq2.data.batches`. The workers end with the generator.

    Raises:
        DataError: a sample could not be made, or a worker could not be started or was killed.
    """
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
            collate_fn=partial(_collate_or_fail, collate),
            generator=torch.Generator(),  # otherwise the loader would draw from the global generator of the training
            **options,
        )
    stream: Any = None
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
            yield batch
    except RuntimeError as error:
        _end(stream)
        explained = _explained(error, mine if workers else None)
        if explained is None:
            raise
        raise explained from error
    finally:
        _end(stream)


def _end(stream: Any) -> None:
    """End the workers of an iterator now, not when the last reference to it is gone.

    Until then torch's handler of SIGCHLD raises RuntimeError in the main thread, wherever that is, for a worker that
    died: a second time behind the error that told it, or while the others are ended here.
    """
    with suppress(RuntimeError):
        if _WorkerBatches and isinstance(stream, _WorkerBatches):
            stream._shutdown_workers()


def _explained(error: RuntimeError, workers: set[BaseProcess] | None) -> DataError | None:
    """Error with the cause and the remedy, or None where none is known; ``workers`` is None without any."""
    here = workers is not None and "can't start new thread" in str(error)
    if here or any(worker.exitcode == _NO_THREAD for worker in workers or ()):
        return DataError(
            f"a {'thread for the data workers' if here else 'thread of a data worker'} could not be started: the "
            "limit of processes and threads is reached; raise ulimit -u, or use fewer workers (data.workers=0 "
            "decodes in the main process)"
        )
    if "DataLoader worker" in str(error):
        memory = "the machine ran out of memory, or " if "Killed" in str(error) or "Bus" in str(error) else ""
        return DataError(
            f"a data worker died: {memory}shared memory (/dev/shm) is full (docker run --shm-size=2g), the "
            "decoder crashed on a file, or the worker could not start (its error is above, if there is one); "
            f"data.workers=0 decodes in the main process and shows which. ({error})"
        )
    return None


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


def _collate_or_fail(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
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
