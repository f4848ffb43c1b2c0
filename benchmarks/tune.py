#!/usr/bin/env python
"""Measure tile configurations on the present GPU and write ``kernels/configs/<op>/<device>.json``.

python benchmarks/tune.py                    every operation
python benchmarks/tune.py quantize           one
python benchmarks/tune.py quantize --dry-run show the measurements, write nothing

The candidates are what ``bestrq2.kernels.<op>.CANDIDATES`` lists; each is timed (forward plus backward, median, cold
cache) on the shape and dtype that ``benchmarks/<op>.py`` names in ``TUNING`` (default: its first CUDA shape and dtype),
by the provider ``bestrq2[triton]``.
A candidate that gives wrong results, spills out of shared memory or fails is reported and never chosen. One kernel at a
time, in the order of ``CANDIDATES``, the best of the earlier ones kept. Commit the file to ship it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from bestrq2.kernels import tuning

from benchmarks.common import Case, Provider, evaluate
from benchmarks.machine import ROOT
from benchmarks.measure import Budget, time_calls
from benchmarks.memory import short_reason
from benchmarks.run import OPS

Config = dict[str, Any]


class Unusable(Exception):
    """A configuration that fails or gives wrong results; the text says how."""


def milliseconds(op: str, case: Case, provider: Provider, configs: Mapping[str, Config], budget: Budget) -> float:
    """Median forward plus backward of ``provider`` with ``configs`` in place of the shipped ones.

    Raises:
        Unusable: if a kernel fails with them or its results are wrong.
        RuntimeError: if the kernels never asked for their configuration: the measurement would mean nothing.
    """
    with tuning.override(op, configs) as used:
        try:
            call = provider.prepare(case)
            error, remark = case.errors(evaluate(case, call))
        except Exception as failure:
            raise Unusable(short_reason(failure)) from failure
        if not used.lookups:
            raise RuntimeError(f"{op}: its launcher does not call bestrq2.kernels.tuning.load_configs at each launch")
        assert case.tolerance is not None
        if not error <= case.tolerance:
            raise Unusable(f"wrong results: error {error:.1e} ({remark})")
        times, failed = time_calls(case, {provider.name: call}, "cold", budget)
    if failed:
        raise Unusable(failed[provider.name])
    spent = times[provider.name]
    return statistics.median(spent.forward) + (statistics.median(spent.backward) if spent.backward else 0.0)


def search(
    candidates: Mapping[str, Sequence[Config]],
    start: Mapping[str, Config],
    measure: Callable[[str, Mapping[str, Config]], float],
    say: Callable[[str], None] = print,
) -> dict[str, Config]:
    """Choose the fastest candidate of each kernel in turn, from the configurations in ``start``.

    ``measure(kernel, configs)`` gives milliseconds or raises :class:`Unusable`. A candidate replaces the present
    configuration only if it is at least 1 % faster: noise should not write files.
    """
    chosen = {kernel: dict(config) for kernel, config in start.items()}
    for kernel, configs in candidates.items():
        best: float | None = None
        present = chosen.get(kernel)
        # The present configuration first: it is what the others must beat.
        for config in [*([present] if present else []), *(config for config in configs if config != present)]:
            try:
                time = measure(kernel, chosen | {kernel: config})
            except Unusable as reason:
                say(f"  {kernel}  {_text(config)}  unusable: {reason}")
                continue
            better = best is None or time < 0.99 * best
            say(f"  {kernel}  {_text(config)}  {time:.4f} ms{'  *' if better else ''}")
            if better:
                best, chosen[kernel] = time, dict(config)
        if best is None:
            raise RuntimeError(
                f"no usable configuration of {kernel}: tried the present one and {len(configs)} candidates"
            )
    return chosen


def _text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def candidates_of(op: str) -> Mapping[str, Sequence[Config]]:
    """What ``bestrq2.kernels.<op>`` lists to be tried."""
    return importlib.import_module(f"bestrq2.kernels.{op}").CANDIDATES


def tune(
    op: str, device: torch.device, device_name: str | None, say: Callable[[str], None] = print
) -> dict[str, Config]:
    """The best configurations of ``op`` on ``device``, starting from those in use there now."""
    benchmark = importlib.import_module(f"benchmarks.{op}")
    candidates = candidates_of(op)
    providers = {provider.name: provider for provider in benchmark.PROVIDERS}
    default = (benchmark.SHAPES["cuda"][0], benchmark.DTYPES["cuda"][0])
    budget = Budget(seconds=0.2, at_least=5, at_most=50)
    cases: dict[tuple[str, str], Case] = {}

    def measure(kernel: str, configs: Mapping[str, Config]) -> float:
        shape, dtype = getattr(benchmark, "TUNING", {}).get(kernel, default)
        key, provider = (shape, dtype), providers["bestrq2[triton]"]
        if key not in cases:
            cases.clear()  # one at a time in memory
            say(f"{op}: {shape} {dtype}")
            cases[key] = benchmark.make_case(shape, getattr(torch, dtype), device)
        return milliseconds(op, cases[key], provider, configs, budget)

    return search(candidates, tuning.load_configs(op, device_name), measure, say)


def write(op: str, device_name: str, configs: Mapping[str, Config], folder: Path = tuning.FOLDER) -> Path:
    """Write the file of a device, atomically; returns its path."""
    path = folder / op / tuning.device_file(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(configs, indent=2) + "\n")
    temporary.replace(path)
    return path


def tunable_ops() -> list[str]:
    """Operations with a benchmark and Triton kernels."""
    return [
        op
        for op in OPS
        if (ROOT / "benchmarks" / f"{op}.py").exists()
        and ((tuning.FOLDER.parent / f"{op}.py").exists() or (tuning.FOLDER.parent / op / "__init__.py").exists())
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(tunable_ops())} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in tunable_ops()]
    if unknown:
        parser.error(f"no Triton kernels and benchmark for {', '.join(unknown)}; there are: {', '.join(tunable_ops())}")
    if not torch.cuda.is_available():
        print(
            "tune.py needs a CUDA GPU and torch finds none here. Nothing was measured or written: "
            "kernels/configs/<op>/default.json stays in use.",
            file=sys.stderr,
        )
        return 2
    name = torch.cuda.get_device_name()
    for op in options.ops or tunable_ops():
        print(f"{op} on {name}")
        configs = tune(op, torch.device("cuda"), name)
        print(json.dumps(configs, indent=2) if options.dry_run else f"wrote {write(op, name, configs)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
