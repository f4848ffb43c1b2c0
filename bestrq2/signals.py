"""Signals while the modules of a command are imported; this one imports nothing that takes time."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["end_imports", "handled_by", "importing"]

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


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
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, leave_at_once)


def end_imports() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is leave_at_once:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


_begin_imports()
