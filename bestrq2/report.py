"""Report on runs, at any time: also on a run in progress, stopped or crashed.

    bestrq2 report RUN                         # RUN/report.html and RUN/report.png
    bestrq2 report RUN RUN2 --out both.html    # curves of several runs over each other
    bestrq2 report --bad-batch RUN/bad_batches/step-00001234-rank-0.safetensors

The HTML holds its pictures and needs no network.
"""

import argparse
import os
from pathlib import Path

from bestrq2.command import command, leave
from bestrq2.errors import TrainingError, printable, system_reason
from bestrq2.outputs import add_overwrite, check_new
from bestrq2.runs.bad_batch_report import describe_bad_batch
from bestrq2.runs.record import RunRecord
from bestrq2.runs.report import write_report


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out", type=Path, help="HTML file (default: report.html in the run folder; comparison.html for several runs)"
    )
    parser.add_argument("--bad-batch", type=Path, metavar="FILE", help="print and draw a batch kept in RUN/bad_batches")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    if bool(options.runs) == bool(options.bad_batch):
        parser.error("expected run folders, or --bad-batch FILE")
    if options.bad_batch:
        if options.out is not None and options.out.suffix != ".png":
            raise TrainingError(f"--out: expected a name ending in .png, got {options.out}")
        if options.out is not None:
            check_new("--out", [options.out], options.overwrite)
        for line in describe_bad_batch(options.bad_batch, options.out):
            print(line)
    else:
        for line in report(options.runs, options.out, options.overwrite):
            print(line)
    return 0


def report(folders: list[Path], out: Path | None, overwrite: bool = False) -> list[str]:
    """Write the report; returns what to say.

    Raises:
        TrainingError: if a folder is no run, nothing was logged in any, or the report cannot be written.
        ConfigError: if ``out`` exists, without ``overwrite``.
    """
    runs = [RunRecord(folder) for folder in folders]
    for run in runs:
        if not (run.folder / "config.yaml").exists():
            raise TrainingError(f"{run.folder}: expected a run folder with config.yaml")
        if not run.rows:
            raise TrainingError(f"{run.folder}: nothing was logged yet (no row in metrics.csv)")
    own = out is None and len(folders) == 1  # part of the run, made again at any time
    if out is None:
        out = folders[0] / "report.html" if own else Path("comparison.html")
    if out.suffix != ".html":
        raise TrainingError(f"--out: expected a name ending in .html, got {out}")
    check_new("--out", [out, out.with_suffix(".png")], overwrite or own)
    _tell_apart(runs)
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    if len(runs) == 1:
        title += f" ({runs[0].setting('recipe', 'unknown recipe')}, {runs[0].step} steps)"
    try:
        path = write_report(runs, out, title)
    except OSError as error:
        raise TrainingError(
            f"{printable(str(error.filename or out))}: cannot be written: {system_reason(error)}"
        ) from error
    return [f"Report:  {path}", f"Curves:  {path.with_suffix('.png')}"]


def _tell_apart(runs: list[RunRecord]) -> None:
    """Name runs whose folders are called alike by as much of their paths as differs."""
    places = [run.folder.resolve().parts for run in runs]
    for run, parts in zip(runs, places):
        others = [other for other in places if other != parts]
        length = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        run.name = os.path.join(*parts[-length:])


if __name__ == "__main__":
    leave(main())
