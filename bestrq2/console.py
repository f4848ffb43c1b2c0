"""The log of the package on a terminal: messages to standard output, warnings and errors to standard error.

Below the entry points everything is logged to the logger "bestrq2"; a program that uses the library gets nothing on its
standard output and decides itself what to show.
"""

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

__all__ = ["ConsoleHandler", "console_log", "progress_bar"]


class ConsoleHandler(logging.Handler):
    """Write through tqdm, so that a progress bar stays below the messages."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        with contextlib.suppress(OSError, ValueError):  # closed, or full: no work is lost for a message
            tqdm.write(text, file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any]":
    """tqdm with its ``options``; where standard error is no terminal, it writes every ten seconds, not ten a second."""
    try:
        interactive = sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it was closed
        interactive = False
    return tqdm(iterable, **{"mininterval": 0.1 if interactive else 10, "dynamic_ncols": True, **options})


@contextlib.contextmanager
def console_log() -> Iterator[None]:
    """Show the log of the package, from INFO on, while a command runs; once, where commands call each other."""
    logger = logging.getLogger("bestrq2")
    if any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        yield
        return
    handler, level = ConsoleHandler(), logger.level
    logger.addHandler(handler)
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
