#!/usr/bin/env python
"""Everything a GPU has to show about bestrq2, within a fixed time, in at most eight files.

python benchmarks/gpu_run.py --out DIR --seconds 570       all stages; DIR/summary.md is printed last
python benchmarks/gpu_run.py --out DIR --only smoke step=90   these, in this order, one with a time of its own
python benchmarks/gpu_run.py --merge DIR                   rows to benchmarks/results/, tiles to kernels/configs/
python benchmarks/gpu_run.py --out DIR --rehearse          every stage at tiny sizes, without a GPU

Runs from a clone, installed or not, without a network, with or without the C++ extension. Every stage is a process
group of its own with its own deadline; a stage that fails, hangs or dies is noted and the next one begins. What a
stage finds is written at once.

| file | what |
|---|---|
| `summary.md` | what happened, in under 100 lines; rewritten after every stage |
| `rows.csv` | rows of the operations, as `benchmarks/run.py` writes them |
| `train.csv` | the whole training step: ms, MFU, audio seconds per second, memory; and a short real run |
| `tuned.json` | tiles found for this device, by operation |
| `tests.txt` | the GPU tests |
| `profile.txt` | the kernels of three training steps, by time |
| `sanitizer.txt` | compute-sanitizer on small odd shapes |
| `logs.tar.gz` | what every stage printed |
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu.merge import merge
from benchmarks.gpu.orchestration import run_stages
from benchmarks.gpu.plan import STAGES, RunOptions, Stage


def stage_choice(text: str) -> Stage:
    """A stage by its name, or ``name=seconds``."""
    name, _, seconds = text.partition("=")
    stage = next((stage for stage in STAGES if stage.name == name), None)
    if stage is None:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(s.name for s in STAGES)}, got {name!r}")
    if not seconds:
        return stage
    try:
        return replace(stage, seconds=float(seconds), fixed=True)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected STAGE=SECONDS, got {text!r}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; made if it does not exist")
    parser.add_argument("--seconds", type=float, default=570.0, help="time for everything (default: 570)")
    parser.add_argument("--only", nargs="+", type=stage_choice, metavar="STAGE[=SECONDS]", help="in this order, of " +
                        ", ".join(stage.name for stage in STAGES))  # fmt: skip
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to unpack first, where packages are missing")
    parser.add_argument("--commit", help="commit of these files where they are no git checkout")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, kernels in the interpreter")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="put the results of an earlier run in place and stop")
    options = parser.parse_args(arguments)
    if options.merge:
        return merge(options.merge)
    if not options.out:
        parser.error("--out DIR (or --merge DIR) is needed")
    if options.seconds <= 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    run = RunOptions(
        options.out.resolve(),
        options.seconds,
        options.wheels.resolve() if options.wheels else None,
        options.commit,
        options.rehearse,
    )
    return run_stages(run, options.only or STAGES)


if __name__ == "__main__":
    sys.exit(main())
