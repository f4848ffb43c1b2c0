"""The report of a run: ``report.html`` with everything in one file, and ``report.png`` with the curves alone."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bestrq2.durability import named_in_errors, replacing
from bestrq2.errors import printable, system_reason

from .record import RunRecord
from .report_curves import draw_curves
from .report_page import page

logger = logging.getLogger(__name__)


def save_report(folder: Path, title: str | None = None) -> Path | None:
    """Write ``report.html`` and ``report.png`` into a run folder, from what lies there; the run may be going on.

    Returns:
        path of the HTML; None when nothing was logged yet, or if it cannot be written (with a warning:
        it can be made again at any time by ``bestrq2 report RUN``).
    """
    run = RunRecord(folder)
    if not run.rows:
        return None
    if title is None:
        title = f"{run.setting('recipe', run.name)}, {run.step} steps"
    try:
        return write_report([run], folder / "report.html", f"{run.name} ({title})")
    except Exception as error:  # whatever is wrong with a report, the run is finished
        name = getattr(error, "filename", None)
        where = f"{printable(str(name))}: " if name else ""
        logger.warning(f"the report could not be written: {where}{system_reason(error)}")
        return None


def write_report(runs: Sequence[RunRecord], path: Path, title: str) -> Path:
    """Write ``path`` (HTML) and a PNG of the curves beside it, about one run or several in comparison.

    Raises:
        OSError: if the files cannot be written.
    """
    picture = path.with_suffix(".png")
    partial = picture.with_name(picture.name + ".partial")
    try:
        with named_in_errors(picture):
            drawn = draw_curves(partial, list(runs), title)
            if drawn:
                partial.replace(picture)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with replacing(path, path.with_name(path.name + ".partial")) as partial:
        partial.write_text(page(runs, title, picture if drawn else None), encoding="utf-8", errors="backslashreplace")
    return path
