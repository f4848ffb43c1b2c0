#!/usr/bin/env python
"""Endurance test of training: kills at random moments, a rank that dies, a folder of malformed audio.

python benchmarks/endurance/run.py               50 kills, 2 killed ranks, 1000 malformed files: 15 minutes
python benchmarks/endurance/run.py --only kills --kills 200 --seed 7
python benchmarks/endurance/run.py --save        appends to benchmarks/results/soak-<device>_<date>.csv

Exit code 0 only if nothing was lost. Real processes and real signals; Linux, because processes are found in /proc.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from benchmarks.endurance.audio import malformed_run
from benchmarks.endurance.kills import Figures, kill_run, ranks_run
from benchmarks.machine import cpu_name, environment, load
from benchmarks.report import RESULTS

CASES = ("kills", "ranks", "malformed")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="default: all three")
    parser.add_argument("--kills", type=int, default=50, help="kill -9 of a run in one process (default: 50)")
    parser.add_argument("--rank-kills", type=int, default=2, help="kill -9 of one of two ranks (default: 2)")
    parser.add_argument("--malformed", type=int, default=1000, help="least number of malformed files (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the damage")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it (default: a temporary one)")
    parser.add_argument("--save", nargs="?", const="", metavar="CSV", help="append rows to CSV (default: results/...)")
    return parser.parse_args(arguments)


def save(figures: dict[str, Figures], path: Path, command: str, busy: float) -> None:
    """One row per figure, in the style of the other results."""
    facts = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": f"{busy:.1f}",
        **environment(command),
    }
    rows = [
        {"case": case, "figure": name, "value": value, **facts}
        for case, found in figures.items()
        for name, value in found.items()
    ]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"saved {len(rows)} rows to {path}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    busy = load()
    command = shlex.join(["python", "benchmarks/endurance/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    runs = {
        "kills": lambda folder: kill_run(folder, options.kills, options.seed),
        "ranks": lambda folder: ranks_run(folder, options.rank_kills, options.seed),
        "malformed": lambda folder: malformed_run(folder, options.malformed, options.seed),
    }
    figures: dict[str, Figures] = {}
    # Not TemporaryDirectory, whose exit handler the forked runs would inherit.
    work = options.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        for case in options.only:
            folder = work / case
            folder.mkdir(parents=True)
            start = time.monotonic()
            figures[case] = runs[case](folder)
            figures[case]["seconds"] = round(time.monotonic() - start)
            for name, value in figures[case].items():
                print(f"{case:10} {name:50} {value}", flush=True)
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    if options.save is not None:
        device = cpu_name().replace(" ", "_")
        name = f"soak-{device}_{environment(command)['date'][:10]}.csv"
        save(figures, Path(options.save) if options.save else RESULTS / name, command, busy)
    lost = sum(int(found["losses"]) for found in figures.values())
    print("nothing was lost" if lost == 0 else f"{lost} LOSSES")
    return 1 if lost else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
