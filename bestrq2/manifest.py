"""List the usable audio files of a source in a CSV manifest.

bestrq2 manifest recordings/ --out manifest.csv --check
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from bestrq2.command import command, leave
from bestrq2.data import AudioFile, collect, write_manifest
from bestrq2.durability import whole_file
from bestrq2.errors import counted, printable
from bestrq2.outputs import add_overwrite, check_new

LONGEST_PATCH = 0.6  # seconds, of the packaged recipes, rounded up


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the manifest; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bestrq2 manifest",
        description="List the usable audio files of a folder, with durations, in a CSV manifest for training. Further "
        "columns of the source are kept.",
    )
    parser.add_argument("source", nargs="+", help="folder, manifest, tar shards (a pattern), HDF5, Arrow, Parquet")
    parser.add_argument("--out", required=True, metavar="CSV", help="manifest to write; skipped files go beside it")
    parser.add_argument("--check", action="store_true", help="decode everything; find silent and duplicate files too")
    parser.add_argument("--min-seconds", type=float, default=0.0, help="leave out shorter files (default: keep all)")
    parser.add_argument("--threads", type=int, default=None, help="files opened at once")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    out = Path(options.out)
    if out.suffix.lower() != ".csv":
        parser.error(f"--out must end in .csv, got {out}")
    skipped = out.with_suffix(".skipped.csv")
    check_new("--out", [out, skipped], options.overwrite)  # before anything is decoded
    out.parent.mkdir(parents=True, exist_ok=True)
    files, report = collect(
        options.source,
        min_seconds=options.min_seconds,
        check=options.check,
        num_threads=options.threads,
        progress=True,
        split=None,  # the columns say which: training on what is written takes its training split
        columns=True,
    )
    check_new("--out", [out, skipped], options.overwrite)  # another process may have written them meanwhile
    write_manifest(out, files)
    if report.skips:
        with whole_file(skipped) as file:
            writer = csv.writer(file)
            writer.writerow(["path", "reason", "detail"])
            writer.writerows((skip.path, skip.reason, skip.detail) for skip in report.skips)
    else:
        skipped.unlink(missing_ok=True)  # of an earlier run
    short = _short_note(files) if options.check else []
    for note in report.notes + short + report.lost_note():
        print(f"note: {note}")
    hours = sum(item.duration or 0.0 for item in files) / 3600
    print(f"{out}: {counted(len(files), 'file')}, {hours:.2f} h; {report}")
    if report.unopened:
        print(f"durations of {counted(report.unopened, 'clip')} are those of the list, not compared (--check does)")
    for line in report.examples():
        print(f"  {line}")
    if report.skips:
        print(f"all skipped files: {skipped}")
    return 0


def _short_note(files: Sequence[AudioFile]) -> list[str]:
    """A note of clips that training may skip, which depends on the model."""
    short = [item for item in files if item.duration is not None and item.duration < LONGEST_PATCH]
    if not short:
        return []
    shortest = min(short, key=lambda item: item.duration or 0.0)
    return [
        f"{counted(len(short), 'file')} shorter than {LONGEST_PATCH:g} s, the shortest {printable(shortest.place)} "
        f"with {shortest.duration:.3f} s: training skips what is shorter than one patch of the model, 0.03 s in the "
        "default recipe and 0.59 s in best_rq2_base (--min-seconds leaves such files out)"
    ]


if __name__ == "__main__":
    leave(main())
