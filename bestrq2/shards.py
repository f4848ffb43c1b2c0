"""Pack audio into tar shards.

bestrq2 shards recordings/ --out shards/
bestrq2 train --data shards/
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from bestrq2.command import command, leave
from bestrq2.data import collect
from bestrq2.data.shards import pack
from bestrq2.durability import whole_file
from bestrq2.errors import DataError, counted
from bestrq2.outputs import check_writable


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Pack the shards; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bestrq2 shards",
        description="Pack audio, as it is and in its order, into tar shards for training. Further columns of "
        "the source are kept, in the .json beside each clip and in manifest.csv. Parts of files become files.",
    )
    parser.add_argument("source", nargs="+", help="folder, manifest, tar shards, HDF5, Arrow, Parquet or audio file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the shards")
    parser.add_argument("--max-bytes", type=float, default=1e9, metavar="N", help="size of a shard (default: 1e9)")
    parser.add_argument("--prefix", default="shards", help="prefix of the file names (default: shards-000000.tar ...)")
    parser.add_argument("--check", action="store_true", help="decode everything; leave silent and duplicate files out")
    parser.add_argument("--min-seconds", type=float, default=0.0, help="leave out shorter files (default: keep all)")
    options = parser.parse_args(arguments)
    out = Path(options.out)
    check_writable("--out", out)  # before anything is read
    try:
        files, report = collect(
            options.source,
            min_seconds=options.min_seconds,
            check=options.check,
            progress=sys.stderr.isatty(),
            split=None,  # the columns say which: training on what is written takes its training split
            columns=True,
        )
        packed = pack(files, out, max_bytes=options.max_bytes, prefix=options.prefix, progress=sys.stderr.isatty())
        report.skips += packed.skips
        if report.skips:
            with whole_file(out / "skipped.csv") as file:
                writer = csv.writer(file)
                writer.writerow(["path", "reason", "detail"])
                writer.writerows((skip.path, skip.reason, skip.detail) for skip in report.skips)
    except ValueError as error:
        raise DataError(str(error)) from error
    for note in report.notes + report.lost_note():
        print(f"note: {note}")
    hours = sum(item.duration or 0.0 for item in packed.files) / 3600
    print(
        f"{out}: {counted(len(packed.shards), 'shard')}, {counted(len(packed.files), 'file')}, {hours:.2f} h, "
        f"read back and equal; {report}"
    )
    for line in report.examples():
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    leave(main())
