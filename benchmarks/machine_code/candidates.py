#!/usr/bin/env python
"""Choose the few tiles per kernel that are worth time on a GPU, from machine code: no GPU is needed.

python benchmarks/machine_code/candidates.py                        every proposal below, for sm_90
python benchmarks/machine_code/candidates.py chunked_attention --kernels forward/64

A proposal that spills or does not fit is dropped; of the others the MOST with most warps on a multiprocessor stay, the
shortest code for a multiply-add first among equals. On sm_90, tiles whose products are ``mma.sync`` come last: those
reach 0.6 of the rate of ``wgmma``. Written to ``candidates_sm_<architecture>.json`` beside this file,
which ``benchmarks/tune.py --preselected`` and ``benchmarks/gpu_run.py`` read. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bestrq2.kernels import aot, quantize, short_attention, tuning

from benchmarks.machine_code import rates, sass

FOLDER = Path(__file__).resolve().parent
MOST = 6
Config = dict[str, Any]


def _tiles(*tiles: tuple[int, int, int, int]) -> list[Config]:
    return [{"BM": m, "BN": n, "num_warps": w, "num_stages": s} for m, n, w, s in tiles]


def _rows(*tiles: tuple[int, int, int]) -> list[Config]:
    return [{"BM": m, "num_warps": w, "num_stages": s} for m, w, s in tiles]


PROPOSALS: dict[str, dict[str, list[Config]]] = {
    "chunked_attention": {
        "forward/64": _tiles(
            *((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3)),
            *((128, 64, 8, 2), (128, 32, 8, 2)),
        ),
        "backward_query/64": _tiles(
            *((64, 32, 4, 1), (64, 32, 4, 2), (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 1), (64, 32, 8, 1)),
        ),
        "backward_key/64": _tiles(
            *((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 1), (64, 32, 4, 1), (64, 32, 4, 2), (64, 128, 8, 1)),
        ),
        "band/64": _tiles(
            *((64, 64, 4, 1), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 8, 2)),
        ),
        "table_gradient/64": _tiles(
            *((64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2)),
        ),
    },
    "quantize": {
        key: [config for config in quantize.CANDIDATES[key] if config["num_stages"] == 3]  # stages change few registers
        for key in ("quantize/16", "quantize/16/few")
    },
    "short_attention": {
        "forward/64/64": _rows((64, 4, 1), (32, 4, 1), (16, 4, 1), (64, 8, 1)),
        "backward/64/64": _rows((64, 4, 1), (32, 4, 1), (32, 4, 2), (16, 4, 1), (64, 8, 1)),
        "forward/64/128": _rows((64, 4, 1), (128, 8, 1), (32, 4, 1), (128, 4, 1), (16, 4, 1)),
        "backward/64/128": _rows((32, 4, 2), (128, 8, 1), (32, 8, 1), (16, 4, 1), (16, 4, 2), (64, 8, 1)),
    },
}
"""What is looked at; the entries of other operations in the file were chosen by hand from ``CANDIDATES``."""


def case_of(op: str, kernel: str, config: Config) -> aot.CompileCase:
    """The compile case of one proposal."""
    if op == "quantize":
        return quantize.compile_case(kernel, config, "fp32", int(kernel.split("/")[1]), layer_norm=True, select=True)
    if op == "short_attention":
        name, dim, keys = kernel.split("/")
        return short_attention.compile_case(f"{kernel}-{config}", name, int(dim), int(keys), config)
    if op != "chunked_attention":
        raise ValueError(f"no proposals for {op}: expected one of {', '.join(PROPOSALS)}")
    from bestrq2.kernels.chunked_attention.compile_cases import ALL, compile_case, parts_of

    configs = tuning.merged(tuning.FOLDER, op, None, None) | {kernel: config}
    return compile_case(f"{kernel}-{config}", *parts_of(kernel), ALL, configs)


def ranked(
    op: str, kernel: str, configs: Sequence[Config], architecture: int
) -> Iterator[tuple[tuple[bool, float, float], Config]]:
    """(rank, configuration) of every proposal that compiles without spills."""
    for config in configs:
        try:
            compiled = aot.compile_cubin(case_of(op, kernel, config), architecture)
        except Exception as error:
            print(f"{kernel} {config}: {type(error).__name__}", flush=True)
            continue
        report = compiled.report
        held = rates.occupancy(architecture, report.registers, report.shared_bytes, config["num_warps"])
        code = sass.parse(aot.disassemble(compiled.cubin))
        # A kernel that has all its operands in one tile has no loop.
        hot = max((*(loop.counts for loop in code.loops), code.outside), key=lambda counts: counts.fmas)
        cost = hot.instructions / hot.fmas if hot.fmas else float("inf")
        print(f"{kernel} {config}: {report}, {held.warps} warps, {1e3 * cost:.2f} instructions a 1000 FMAs", flush=True)
        if report.spill_bytes == 0 and held.warps and cost < float("inf"):
            slow = architecture == 90 and not any("wgmma" in name for name in report.matrix_instructions)
            yield (slow, -held.warps, cost), config


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(PROPOSALS)} (default: all)")
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument("--arch", type=int, choices=aot.ARCHITECTURES, default=90)
    options = parser.parse_args(arguments)
    path = FOLDER / f"candidates_sm_{options.arch}.json"
    found: dict[str, dict[str, list[Config]]] = json.loads(path.read_text()) if path.exists() else {}
    for op in options.ops or PROPOSALS:
        for kernel, configs in PROPOSALS[op].items():
            if options.kernels and kernel not in options.kernels:
                continue
            best = sorted(ranked(op, kernel, configs, options.arch), key=lambda entry: entry[0])[:MOST]
            found.setdefault(op, {})[kernel] = [config for _, config in best]
            write(path, found)
    return 0


def write(path: Path, found: Mapping[str, Mapping[str, Sequence[Config]]]) -> None:
    """One configuration a line."""
    lines = []
    for op, kernels in found.items():
        entries = []
        for kernel, configs in kernels.items():
            rows = ",\n".join(f"      {json.dumps(config)}" for config in configs)
            entries.append(f'    "{kernel}": [\n{rows}\n    ]')
        lines.append(f'  "{op}": {{\n' + ",\n".join(entries) + "\n  }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
