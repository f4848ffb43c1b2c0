"""Signals that end a run: finish the step, save, leave. A later second SIGINT, SIGTERM or SIGHUP ends it at once."""

import signal
import sys
import threading
import time
from types import FrameType

from bestrq2.signals import WARNINGS

HANDLED = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
DEBOUNCE_SECONDS = 2.0  # a second signal within this time is a duplicate of the first


class StopSignal:
    """Context manager that turns the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into ``requested``, and so the
    warnings of schedulers and limits, where their handler is still the system's.

    The handler only notes it: output there could meet a closed pipe, or the lock of the output it interrupted. A signal
    that was ignored (``nohup``) stays ignored. Outside of the main thread, where Python takes no handlers, nothing is
    caught.

    Attributes:
        requested: whether a signal arrived.
        exit_code: 128 + its number, the convention of shells. Before a signal that of SIGTERM, for a process that
            stops because another rank was asked to.
        name: e.g. "SIGTERM".
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = 128 + signal.SIGTERM
        self.name = "a signal to another rank"
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
            for number in WARNINGS:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # Schedulers signal every process of a job, and torchrun passes the signal on to its processes once more.
            # A limit of processor time is told every second.
            if number not in WARNINGS and time.monotonic() - self._since > DEBOUNCE_SECONDS:
                sys.exit(128 + number)
            return
        self._since = time.monotonic()
        self.requested, self.exit_code, self.name = True, 128 + number, signal.Signals(number).name
