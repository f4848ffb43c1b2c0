"""Signals and the current folder while a command imports its modules; this one imports nothing that takes time."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = [
    "FOLDER_GONE",
    "WARNINGS",
    "end_imports",
    "folder_is_gone",
    "handled_by",
    "importing",
    "kept_from_children",
]

FOLDER_GONE = "the current folder was deleted; change to one that exists (cd), and start again"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

# Warnings of what comes: sbatch --signal=USR1@300, qsub -notify, ulimit -t. By default they kill a process.
WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU") if hasattr(signal, name)]


def folder_is_gone() -> bool:
    """Return True in a current folder that was deleted, where libraries fail with words that lead nowhere (oneMKL while
    torch is imported: "Cannot load libtorch_cpu.so")."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def leave_at_once(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n" if number == signal.SIGINT else b"stopped\n")
    os._exit(128 + number)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], Any], replaces: Callable[[Any], bool]) -> Iterator[None]:
    """``handler`` in place of the present handlers for which ``replaces`` is true; only the main thread has any."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if replaces(signal.getsignal(number)):
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that start inside of this context never get SIGHUP and the warnings, which terminals and schedulers
    send to the whole group: the main process decides when its helpers end. It gets what arrives meanwhile afterwards.

    SIGINT and SIGTERM are left alone: multiprocessing has its own way with them.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, *WARNINGS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A signal while modules are imported ends the process at once; nothing has been written by then.

    An exception there is caught by libraries: torch went on with half of numpy, and failed later with a traceback.
    """
    with handled_by(leave_at_once, lambda now: now not in (signal.SIG_IGN, None)):
        yield


def _begin_imports() -> None:
    """The same for ``python -m bestrq2.train``, from here until its ``main`` begins: called below, at the import."""
    name = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")
    processes = sys.modules.get("multiprocessing.process")  # every worker has it
    worker = processes is not None and processes.parent_process() is not None
    if name.split(".")[0] == "bestrq2" and not worker and threading.current_thread() is threading.main_thread():
        if folder_is_gone():
            print(f"error: {FOLDER_GONE}", file=sys.stderr)
            sys.exit(2)
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, leave_at_once)


def end_imports() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is leave_at_once:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


_begin_imports()
