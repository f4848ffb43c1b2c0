"""Text of users in charts: names of runs, files and classes are drawn as they are written."""

from collections.abc import Iterator
from contextlib import contextmanager

from bestrq2.errors import printable

__all__ = ["chart_label", "plain_text"]


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw dollar signs as dollar signs inside of this context: elsewhere matplotlib reads ``$...$`` as TeX."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def chart_label(name: str) -> str:
    """A name for a chart: printable, and not taken for a hidden one, as matplotlib's legends do after ``_``."""
    shown = printable(name)
    return f" {shown}" if shown.startswith("_") else shown
