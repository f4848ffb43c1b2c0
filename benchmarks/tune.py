#!/usr/bin/env python
"""Measure tile configurations on the present GPU and write ``kernels/configs/<op>/<device>.json``.

python benchmarks/tune.py                    every operation
python benchmarks/tune.py quantize           one
python benchmarks/tune.py chunked_attention --kernels forward/64 backward_key/64
python benchmarks/tune.py quantize --dry-run show the measurements, write nothing

The candidates are what ``bestrq2.kernels.<op>.CANDIDATES`` lists; with ``--preselected`` only the few per kernel that
the machine code suggests (``benchmarks/machine_code/candidates.py``). Each is timed on the shape and dtype that
``benchmarks/ops/<op>.py`` names in ``TUNING`` (default: its first CUDA shape and dtype), by the provider
``bestrq2[triton]`` or the third name there: median, cold cache, of the pass that the kernel belongs to.

A candidate that gives wrong results, spills out of shared memory or fails is reported and never chosen. One kernel at a
time, in the order of ``CANDIDATES``, each in a process of its own that is started anew where a candidate kills it; the
file is written after every kernel. Commit the file to ship it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from bestrq2.kernels import tuning

from benchmarks.common import OPS, Case, Provider, evaluate, load_operation
from benchmarks.groups import child_environment
from benchmarks.machine import ROOT
from benchmarks.measure import Budget, time_calls
from benchmarks.memory import short_reason
from benchmarks.processes import run_process

Config = dict[str, Any]
Trial = dict[str, Any]  # "config" and "ms" or "reason"; without both the process died with it


class Unusable(Exception):
    """A configuration that fails or gives wrong results; the text says how."""


def milliseconds(
    op: str, case: Case, provider: Provider, configs: Mapping[str, Config], budget: Budget, part: str = "both"
) -> float:
    """Median time of ``provider`` with ``configs`` in place of the shipped ones: of its forward, backward or both.

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
    forward = statistics.median(spent.forward)
    backward = statistics.median(spent.backward) if spent.backward else 0.0
    return {"forward": forward, "backward": backward}.get(part, forward + backward)


def part_of(kernel: str) -> str:
    """The pass that is timed for a kernel: the one it is named after, else both."""
    parts = {"forward": "forward", "band": "forward", "backward_query": "backward", "backward_key": "backward"}
    return (parts | {"table_gradient": "backward", "backward": "backward"}).get(kernel.partition("/")[0], "both")


def choose(trials: Sequence[Trial], present: Config | None) -> Config | None:
    """The fastest configuration; ``present`` unless another is at least 1 % faster: noise should not write files."""
    measured = [trial for trial in trials if trial.get("ms") is not None]
    if not measured:
        return None
    best = min(measured, key=lambda trial: trial["ms"])
    now = next((trial["ms"] for trial in measured if trial["config"] == present), None)
    return present if now is not None and best["ms"] > 0.99 * now else best["config"]


def candidates_of(op: str) -> Mapping[str, Sequence[Config]]:
    """Candidates that ``bestrq2.kernels.<op>`` lists."""
    return importlib.import_module(f"bestrq2.kernels.{op}").CANDIDATES


def preselected(op: str, architecture: int) -> Mapping[str, Sequence[Config]]:
    """The few candidates that the machine code suggests; none for an architecture that was not analysed."""
    path = ROOT / "benchmarks" / "machine_code" / f"candidates_sm_{architecture}.json"
    return json.loads(path.read_text()).get(op, {}) if path.exists() else {}


def tuning_case(op: str, kernel: str, device: torch.device, label: str | None = None) -> tuple[Case, Provider]:
    """Case and provider that a kernel is timed with; ``label``: another shape."""
    benchmark = load_operation(op)
    default = (benchmark.SHAPES["cuda"][0], benchmark.DTYPES["cuda"][0])
    shape, dtype, *name = getattr(benchmark, "TUNING", {}).get(kernel, default)
    providers = {provider.name: provider for provider in benchmark.PROVIDERS}
    case = benchmark.make_case(label or shape, getattr(torch, dtype), device)
    return case, providers[name[0] if name else "bestrq2[triton]"]


def _try_all(folder: Path) -> None:
    """Measure what ``request.json`` asks for; one line of ``trials.jsonl`` before and one after each configuration."""
    request = json.loads((folder / "request.json").read_text())
    op, kernel, chosen = request["op"], request["kernel"], request["chosen"]
    budget = Budget(**request["budget"])
    case, provider = tuning_case(op, kernel, torch.device(request["device"]), request["shape"])
    with (folder / "trials.jsonl").open("a") as file:

        def tell(trial: Trial) -> None:
            print(json.dumps(trial), file=file, flush=True)

        for config in request["configs"]:
            tell({"config": config})
            try:
                ms = milliseconds(op, case, provider, chosen | {kernel: config}, budget, part_of(kernel))
                tell({"config": config, "ms": ms})
            except Unusable as reason:
                tell({"config": config, "reason": str(reason)})


def read_trials(folder: Path) -> list[Trial]:
    """Every configuration that was begun, in order; the one at which the process died has neither time nor reason."""
    path = folder / "trials.jsonl"
    found: dict[str, Trial] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        trial = json.loads(line)
        found[json.dumps(trial["config"], sort_keys=True)] = trial
    return list(found.values())


def tune_kernel(
    op: str,
    kernel: str,
    configs: Sequence[Config],
    chosen: Mapping[str, Config],
    *,
    device: str = "cuda",
    shape: str | None = None,
    seconds: float = 600.0,
    budget: Budget | None = None,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """Try the present configuration and ``configs`` in processes of their own, within ``seconds``."""
    end = time.monotonic() + seconds
    present = chosen.get(kernel)
    wanted = [*([present] if present else []), *(config for config in configs if config != present)]
    budget = budget or Budget(seconds=0.2, at_least=5, at_most=50)
    with tempfile.TemporaryDirectory(prefix="bestrq2-tune-") as name:
        folder = Path(name)
        while True:
            begun = read_trials(folder)
            open_configs = [config for config in wanted if config not in [trial["config"] for trial in begun]]
            if not open_configs or time.monotonic() >= end:
                break
            request: dict[str, Any] = {
                "op": op,
                "kernel": kernel,
                "configs": open_configs,
                "chosen": chosen,
                "device": device,
            }
            request |= {"shape": shape, "budget": vars(budget)}
            (folder / "request.json").write_text(json.dumps(request))
            command = [sys.executable, "-m", "benchmarks.tune", "--try", str(folder)]
            log = folder / "log.txt"
            ended = run_process(command, log, end - time.monotonic(), environment=child_environment())
            after = read_trials(folder)
            if len(after) == len(begun):  # it died before the first configuration
                raise RuntimeError(f"{op} {kernel}: {ended.text}: {log.read_text(errors='replace')[-500:]}")
        trials = read_trials(folder)
    for trial in trials:
        text = f"{trial['ms']:.4f} ms" if "ms" in trial else f"unusable: {trial.get('reason', 'its process died')}"
        say(f"  {kernel}  {_text(trial['config'])}  {text}")
    return trials


def _text(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def tune(
    op: str,
    device_name: str,
    architecture: int,
    candidates: Mapping[str, Sequence[Config]],
    keep: Callable[[dict[str, Config]], None],
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Config]:
    """Tune kernel after kernel, the best of the earlier ones in use; ``keep`` gets all that differ after each."""
    start = tuning.merged(tuning.FOLDER, op, device_name, architecture)
    general = tuning.merged(tuning.FOLDER, op, None, architecture)
    chosen = {kernel: dict(config) for kernel, config in start.items()}
    for kernel, configs in candidates.items():
        trials = tune_kernel(op, kernel, configs, chosen, say=say, **options)
        best = choose(trials, chosen.get(kernel))
        if best is None:
            say(f"  {kernel}: no usable configuration among {len(trials)}; the present one stays")
            continue
        chosen[kernel] = dict(best)
        keep({name: config for name, config in chosen.items() if config != general.get(name)})
    return chosen


def write(op: str, device_name: str, architecture: int, configs: Mapping[str, Config], folder: Path) -> Path:
    """Write the file of a device, atomically; returns its path."""
    path = folder / op / tuning.device_file(device_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"architecture": architecture, **configs}, indent=2) + "\n")
    temporary.replace(path)
    return path


def tunable_ops() -> list[str]:
    """Operations with a benchmark and Triton kernels."""
    kernels = tuning.FOLDER.parent
    return [op for op in OPS if (kernels / f"{op}.py").exists() or (kernels / op / "__init__.py").exists()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(tunable_ops())} (default: all)")
    parser.add_argument("--kernels", nargs="+", help="only these keys of CANDIDATES")
    parser.add_argument("--preselected", action="store_true", help="only candidates that the machine code suggests")
    parser.add_argument("--dry-run", action="store_true", help="write no file")
    parser.add_argument("--try", dest="folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.folder:
        _try_all(Path(options.folder))
        return 0
    unknown = [op for op in options.ops if op not in tunable_ops()]
    if unknown:
        parser.error(f"no Triton kernels and benchmark for {', '.join(unknown)}; there are: {', '.join(tunable_ops())}")
    if not torch.cuda.is_available():
        print(
            "tune.py needs a CUDA GPU and torch finds none here. Nothing was measured or written: "
            "the shipped configurations stay in use.",
            file=sys.stderr,
        )
        return 2
    name = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    architecture = 10 * major + minor
    for op in options.ops or tunable_ops():
        print(f"{op} on {name}")
        candidates = preselected(op, architecture) if options.preselected else candidates_of(op)
        wanted = {key: configs for key, configs in candidates.items() if key in (options.kernels or candidates)}

        def keep(configs: dict[str, Config], op: str = op) -> None:
            if options.dry_run:
                print(json.dumps(configs, indent=2))
            else:
                print(f"wrote {write(op, name, architecture, configs, tuning.FOLDER)}", flush=True)

        tune(op, name, architecture, wanted, keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
