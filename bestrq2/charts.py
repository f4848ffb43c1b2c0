"""Text of users in charts: names of runs, files and classes are drawn as they are written."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bestrq2.errors import printable

__all__ = ["chart_label", "plain_text"]


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw dollar signs as dollar signs inside of this context: elsewhere matplotlib reads ``$...$`` as TeX."""
    with _matplotlib().rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def _matplotlib() -> Any:
    """Import matplotlib whatever ``MPLBACKEND`` says. Commands that a notebook starts in another environment (Colab,
    Kaggle) inherit one that is not installed there, which ends the import. We draw into files and need none.

    Nor does it speak of a home that cannot be written, where it takes a temporary folder for its cache."""
    log = logging.getLogger("matplotlib")
    level = log.level
    given = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        if "matplotlib" not in sys.modules:
            log.setLevel(logging.ERROR)
        import matplotlib
    finally:
        log.setLevel(level)
        if given is not None:
            os.environ["MPLBACKEND"] = given
    if given:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = given
    return matplotlib


def chart_label(name: str) -> str:
    """A name for a chart: printable, and not taken for a hidden one, as matplotlib's legends do after ``_``."""
    shown = printable(name)
    return f" {shown}" if shown.startswith("_") else shown
