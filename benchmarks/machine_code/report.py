#!/usr/bin/env python
"""Report on the machine code of every Triton kernel, with a first bound for an H100: ARITHMETIC, NOT A MEASUREMENT.

python benchmarks/machine_code/report.py                      every kernel of every shipped configuration, for sm_90
python benchmarks/machine_code/report.py quantize --arch 80   one operation, another chip
python benchmarks/machine_code/report.py --workloads             only the kernels whose reference shape has a bound
python benchmarks/machine_code/report.py --save               also writes benchmarks/results/compile-sm_90_<date>.csv

Nothing runs and nothing is timed; no GPU is needed. A bound is what the busiest part of the chip needs if nothing ever
waits; "added up" is what all parts need one after the other. A measurement lies above the first, and far above it where
few warps hide latencies. Rates and their sources: rates.py. How often a loop runs: workloads.py.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bestrq2.kernels import aot

from benchmarks.machine_code import rates, sass
from benchmarks.machine_code.workloads import Bound, Workload, bound, workload_of

OPS = {
    "quantize": "bestrq2.kernels.quantize",
    "masked_cross_entropy": "bestrq2.kernels.masked_cross_entropy.compile_cases",
    "chunked_attention": "bestrq2.kernels.chunked_attention.compile_cases",
    "short_attention": "bestrq2.kernels.short_attention",
}
LABEL = "computed from machine code, not measured"
PARTS = ("issue", "fma pipe", "alu pipe", "special functions", "shuffles", "mma", "shared memory", "L2", "HBM")
FIELDS = (
    *("op", "case", "arch", "registers", "spill_bytes", "shared_bytes", "num_warps", "warps_per_sm", "limited_by"),
    *("matrix", "loop_instructions", *sass.CLASSES, "shape", "unit", "bound_ms", "bound_by"),
    *(f"{part}_ms" for part in PARTS),
    *("triton", "date", "label"),
)
RESULTS = Path(__file__).resolve().parents[1] / "results"

Row = dict[str, Any]


def inspect(op: str, case: aot.CompileCase, architecture: int) -> tuple[Row, Bound | None, Workload | None]:
    """One row; counts are instructions of one lane per unit of work at its reference shape, else per iteration."""
    import triton

    compiled = aot.compile_cubin(case, architecture)
    code = sass.parse(aot.disassemble(compiled.cubin))
    report = compiled.report
    held = rates.occupancy(architecture, report.registers, report.shared_bytes, case.num_warps)
    workload = workload_of(op, case) if architecture == 90 else None
    result = bound(code, workload) if workload else None
    hot = max(
        (loop.counts for loop in code.loops if loop.innermost),
        key=lambda counts: (counts.fmas, counts.instructions),
        default=code.outside,
    )
    row: Row = {
        "op": op,
        "case": case.name,
        "arch": architecture,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "num_warps": case.num_warps,
        "warps_per_sm": held.warps,
        "limited_by": held.limited_by,
        "matrix": " ".join(f"{number}x{shape}" for shape, number in sorted(hot.matrix.items())),
        "loop_instructions": hot.instructions,
        **{kind: hot.classes[kind] for kind in sass.CLASSES},
        "triton": triton.__version__,
        "date": date.today().isoformat(),
        "label": LABEL,
    }
    if workload and result:
        row |= {
            "shape": workload.shape,
            "unit": workload.unit,
            "bound_ms": result.milliseconds,
            "bound_by": result.limit,
        }
        row |= {kind: result.per_unit.get(kind, 0.0) for kind in sass.CLASSES}
        row |= {"loop_instructions": result.instructions}
        row |= {f"{part}_ms": 1e3 * result.busy.get(part, 0.0) for part in PARTS}
    return row, result, workload


def describe(row: Row, result: Bound | None, workload: Workload | None) -> Iterator[str]:
    yield (
        f"{row['op']} {row['case']} sm_{row['arch']}: {row['registers']} registers, {row['spill_bytes']} B spilled, "
        f"{row['shared_bytes']} B shared, {row['warps_per_sm']} warps per SM ({row['limited_by']}), "
        f"loop of {row['loop_instructions']}, {row['matrix'] or 'no matrix instruction'}"
    )
    if not result or not workload:
        return
    yield f"    {workload.shape}, {LABEL}: at least {result.milliseconds:.3f} ms by {result.limit}"
    busy = sorted(result.busy.items(), key=lambda item: -item[1])
    yield f"    ms busy: {', '.join(f'{part} {1e3 * seconds:.3f}' for part, seconds in busy if seconds > 0)}"
    yield f"    added up (nothing overlaps): {1e3 * sum(result.busy.values()):.3f} ms"
    counted = sorted(result.per_unit.items(), key=lambda item: -item[1])
    yield (
        f"    hot loop: {result.hot}, {result.trips:.1f} iterations, per {workload.unit}: "
        f"{', '.join(f'{kind} {number:.3f}' for kind, number in counted)}; all {sum(result.per_unit.values()):.2f}"
    )
    if result.missing:
        yield f"    no loop found for: {', '.join(result.missing)}; the bound lacks it"


def cases_of(op: str) -> list[aot.CompileCase]:
    return importlib.import_module(OPS[op]).compile_cases()


def save(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)} (default: all)")
    parser.add_argument("--arch", type=int, choices=aot.ARCHITECTURES, default=90, help="default: 90")
    parser.add_argument("--workloads", action="store_true", help="only kernels with a reference shape")
    parser.add_argument("--save", nargs="?", const="", metavar="CSV", help="write rows (default: results/compile-...)")
    options = parser.parse_args(arguments)
    if unknown := [op for op in options.ops if op not in OPS]:
        parser.error(f"no compile cases for {', '.join(unknown)}; there are: {', '.join(OPS)}")
    rows = []
    for op in options.ops or OPS:
        for case in cases_of(op):
            if options.workloads and not workload_of(op, case):
                continue
            row, result, workload = inspect(op, case, options.arch)
            rows.append(row)
            print("\n".join(describe(row, result, workload)), flush=True)
    if options.save is not None:
        path = Path(options.save or RESULTS / f"compile-sm_{options.arch}_{date.today().isoformat()}.csv")
        save(rows, path)
        print(f"wrote {path}: {LABEL}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
