"""Imported by the fork server of the data workers and by nothing else: its import is what prepares that process.

The server imports torch once for all workers. It ignores SIGTERM, which a scheduler sends to the whole process group:
the main process may want to finish its step and save, and without the server its workers end. The server ends by itself
when they and the main process are gone.
"""

import contextlib
import os
import signal
import sys
from typing import Any

import bestrq2.data.batch  # noqa: F401  (what the workers need)


def _in_one_line(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print what the system refused (a limit of processes) without a traceback: the main process gives the remedy.

    It also says itself that it could not hand over the files of a new worker, which is an end of file here.
    """
    if isinstance(error, EOFError):
        return
    if not isinstance(error, OSError):
        sys.__excepthook__(kind, error, trace)
        return
    with contextlib.suppress(OSError):
        os.write(2, f"the data workers' server ended: {error.strerror or error}\n".encode(errors="backslashreplace"))


signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.excepthook = _in_one_line
