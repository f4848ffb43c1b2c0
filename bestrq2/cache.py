"""Decode audio once into a folder that training reads instead of the files (``data.cache``).

bestrq2 cache recordings/ --out cache/
bestrq2 train --data recordings/ data.cache=cache/
"""

import argparse
import sys
from collections.abc import Sequence

from bestrq2.command import command, leave
from bestrq2.data import collect
from bestrq2.data.cache_build import open_cache


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the cache; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bestrq2 cache",
        description="Decode audio once, as 16-bit samples that training reads without decoding. What is there stays; a "
        "build that was stopped goes on.",
    )
    parser.add_argument("source", nargs="+", help="folder, manifest, tar shards, HDF5, Arrow, Parquet or audio file")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="of the cache; new or begun before")
    parser.add_argument(
        "--sampling-rate", type=int, default=16000, metavar="HZ", help="of the samples (default: 16000)"
    )
    parser.add_argument("--verify", action="store_true", help="compare every checksum; decode what is damaged again")
    parser.add_argument("--threads", type=int, help="files decoded at once (default: the processors, at most 16)")
    options = parser.parse_args(arguments)
    if options.sampling_rate < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--sampling-rate and --threads must be positive")
    progress = sys.stderr.isatty()
    files, report = collect(options.source, progress=progress)
    _, found = open_cache(
        options.out, files, options.sampling_rate, verify=options.verify, threads=options.threads, progress=progress
    )
    for note in report.notes:
        print(f"note: {note}")
    print(found)
    for line in [str(report), *report.examples()] if report.skips else []:
        print(f"  {line}")
    return 0


if __name__ == "__main__":
    leave(main())
