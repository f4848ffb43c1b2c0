#!/usr/bin/env python
"""Time bestrq2's operations against their peers, all in one run.

python benchmarks/run.py --quick                  under two minutes on two cores
python benchmarks/run.py --save                   every operation and shape; appends to benchmarks/results/
python benchmarks/run.py --ops quantize --shapes "1000x64->16x512" --providers bestrq2 eager
python benchmarks/run.py --device cuda --save     the same on a GPU, with hot and cold caches
python benchmarks/run.py --readme-table benchmarks/results/FILE.csv
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
import time
import warnings
from pathlib import Path

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from bestrq2.kernels import tuning

from benchmarks import report
from benchmarks.common import Work, select
from benchmarks.machine import ROOT, describe_machine, environment, load
from benchmarks.measure import Budget, Row, measure, set_limit
from benchmarks.memory import Worker, obstacle

OPS = ("quantize", "masked_cross_entropy", "chunked_attention", "encode")


def available_ops() -> list[str]:
    """Operations that have a benchmark file."""
    return [op for op in OPS if (ROOT / "benchmarks" / f"{op}.py").exists()]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=available_ops(), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats: under two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), help="default: per operation")
    parser.add_argument("--shapes", nargs="+", help="shape labels; any that the operation can parse")
    parser.add_argument("--providers", nargs="+", help="only providers whose name contains one of these words")
    parser.add_argument("--cache", nargs="+", choices=("hot", "cold"), help="default: cold; on a GPU both")
    parser.add_argument("--repeats", type=int, help="fixed number of repeats (default: until 3 s, 3 to 100)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory on the CPU")
    parser.add_argument("--save", nargs="?", const="", metavar="CSV", help="append rows to CSV (default: results/...)")
    parser.add_argument("--plot", nargs="?", const="", metavar="CSV", help="draw the plots of a result file and stop")
    parser.add_argument("--readme-table", metavar="CSV", help="print the Markdown table of a result file and stop")
    options = parser.parse_args(arguments)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be positive, got {options.repeats}")
    if options.shapes and len(options.ops or OPS) != 1:
        parser.error("--shapes needs exactly one operation in --ops")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def run(options: argparse.Namespace, command: str) -> list[Row]:
    """Measure everything the options ask for, printing each group's table as soon as it is done."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    busy = load()
    machine = describe_machine(device)
    facts = environment(command)
    print(f"{machine.describe()}\ntorch {facts['torch']}, commit {facts['commit']}, {facts['date']}\n", flush=True)
    if busy > 0.25 * (os.cpu_count() or 1):
        print(f"This machine is busy (load {busy:.1f} on {os.cpu_count()} cores): trust ratios, not milliseconds.\n")
    worker, reason = None, obstacle() if device.type == "cpu" else None
    if device.type == "cpu" and not options.no_memory:
        if reason:
            print(f"peak memory is left out: {reason}\n")
        else:
            worker = Worker(torch.get_num_threads())
    budget = Budget(seconds=0.2, at_least=3, at_most=15) if options.quick else Budget()
    budget.repeats = options.repeats
    caches = options.cache or (("hot", "cold") if device.type == "cuda" else ("cold",))
    groups: list[tuple[tuple[Work | None, ...], list[Row]]] = []
    try:
        for op in options.ops or available_ops():
            module = importlib.import_module(f"benchmarks.{op}")
            if device.type == "cuda" and not (tuning.FOLDER / op / tuning.device_file(machine.device)).exists():
                print(f"{op}: default tiles; `python benchmarks/tune.py {op}` finds those of this GPU\n")
            shapes = options.shapes or (module.QUICK_SHAPES if options.quick else module.SHAPES[device.type])
            dtypes = options.dtype or (module.DTYPES[device.type][:1] if options.quick else module.DTYPES[device.type])
            for shape in shapes:
                for dtype in dtypes:
                    case = module.make_case(shape, getattr(torch, dtype), device)
                    group = measure(
                        op,
                        case,
                        select(module.PROVIDERS, options.providers),
                        machine,
                        facts,
                        baseline=module.BASELINE,
                        caches=caches,
                        budget=budget,
                        worker=worker,
                        say=_progress,
                    )
                    _progress("")
                    print(report.table(group) + "\n", flush=True)
                    groups.append(((case.work, case.backward_work), group))
    finally:
        if worker:
            worker.close()
    for works, group in groups:  # by the machine's best rates, which later groups may have raised
        set_limit(group, machine.limit_ms(*works))
    return [row for _, group in groups for row in group]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def save(rows: list[Row], path: Path) -> None:
    """Append the rows and redraw the plots beside the file."""
    report.append_csv(path, rows)
    print(f"appended {len(rows)} rows to {path}")
    plot(path)


def plot(path: Path) -> None:
    try:
        from benchmarks.plots import draw
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
        return
    for image in draw(report.latest(report.read_csv(path)), path.with_suffix("")):
        print(f"drew {image}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.readme_table:
        print(report.markdown(report.read_csv(Path(options.readme_table))))
        return 0
    if options.plot:
        plot(Path(options.plot))
        return 0
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    start = time.perf_counter()
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    rows = run(options, command)
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    if options.save is None:
        print("not saved: --save appends these rows to " + str(report.default_path(rows)))
    else:
        save(rows, Path(options.save) if options.save else report.default_path(rows))
    wrong = [f"{row['op']} {row['shape']} {row['provider']}" for row in rows if row["status"] == "wrong"]
    if wrong:
        print("WRONG results: " + "; ".join(dict.fromkeys(wrong)))
    ours = [row for row in rows if row["provider"] == report.OURS and row["status"] in ("wrong", "failed")]
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
