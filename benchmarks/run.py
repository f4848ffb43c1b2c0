#!/usr/bin/env python
"""Time bestrq2's operations against their peers, all in one run.

python benchmarks/run.py --quick                  under two minutes on two cores
python benchmarks/run.py --save                   every operation and shape; appends to benchmarks/results/
python benchmarks/run.py --ops quantize --shapes "1000x64->16x512" --providers bestrq2 eager
python benchmarks/run.py --device cuda --save     the same on a GPU, with hot and cold caches
python benchmarks/run.py --readme-table benchmarks/results/FILE.csv

With --save rows are written group by group (operation, shape, dtype): a run that is stopped keeps what it measured.
On a GPU each group has a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from bestrq2.kernels import tuning

from benchmarks import report
from benchmarks.common import OPS, load_operation
from benchmarks.groups import Group, Plan, run_group, run_isolated
from benchmarks.machine import ROOT, describe_machine, environment, load
from benchmarks.measure import Budget, Row
from benchmarks.memory import Worker, obstacle


def available_ops() -> list[str]:
    """Operations that have a benchmark file."""
    folder = ROOT / "benchmarks"
    return [op for op in OPS if (folder / "ops" / f"{op}.py").exists() or (folder / f"{op}.py").exists()]


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
    parser.add_argument("--seconds", type=float, help="timed seconds of each provider and cache (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--isolate", action=argparse.BooleanOptionalAction, help="a process per group; default: on a GPU"
    )
    parser.add_argument("--group-seconds", type=float, default=600.0, help="deadline of such a process (default: 600)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory on the CPU")
    parser.add_argument("--commit", help="commit of these files where they are no git checkout")
    parser.add_argument("--save", nargs="?", const="", metavar="CSV", help="append rows to CSV (default: results/...)")
    parser.add_argument("--plot", nargs="?", const="", metavar="CSV", help="draw the plots of a result file and stop")
    parser.add_argument("--readme-table", metavar="CSV", help="print the Markdown table of a result file and stop")
    options = parser.parse_args(arguments)
    for name in ("repeats", "seconds", "group_seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.shapes and len(options.ops or OPS) != 1:
        parser.error("--shapes needs exactly one operation in --ops")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def make_plan(options: argparse.Namespace, command: str) -> Plan:
    """Measure the machine and settle what all groups have in common."""
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = Budget(seconds=0.2, at_least=3, at_most=15) if options.quick else Budget()
    budget.seconds = options.seconds or budget.seconds
    budget.repeats = options.repeats
    return Plan(
        device=kind,
        machine=describe_machine(torch.device(kind)),
        facts=environment(command, options.commit),
        caches=tuple(options.cache or (("hot", "cold") if kind == "cuda" else ("cold",))),
        budget=budget,
        providers=tuple(options.providers or ()),
        memory=not options.no_memory,
        group_seconds=options.group_seconds,
    )


def groups_of(options: argparse.Namespace, device: str) -> Iterator[Group]:
    for op in options.ops or available_ops():
        module = load_operation(op)
        shapes = options.shapes or (module.QUICK_SHAPES if options.quick else module.SHAPES[device])
        dtypes = options.dtype or (module.DTYPES[device][:1] if options.quick else module.DTYPES[device])
        yield from (Group(op, shape, dtype) for shape in shapes for dtype in dtypes)


def run(options: argparse.Namespace, plan: Plan, keep: Callable[[list[Row]], None]) -> list[Row]:
    """Measure everything the options ask for; each group's table is printed and its rows kept as soon as it is done."""
    busy, facts = load(), plan.facts
    print(f"{plan.machine.describe()}\ntorch {facts['torch']}, commit {facts['commit']}, {facts['date']}\n", flush=True)
    if busy > 0.25 * (os.cpu_count() or 1):
        print(f"This machine is busy (load {busy:.1f} on {os.cpu_count()} cores): trust ratios, not milliseconds.\n")
    isolated = plan.device == "cuda" if options.isolate is None else options.isolate
    worker, reason = None, obstacle() if plan.device == "cpu" and plan.memory else None
    if reason:
        print(f"peak memory is left out: {reason}\n")
    elif plan.device == "cpu" and plan.memory and not isolated:
        worker = Worker(torch.get_num_threads())
    rows: list[Row] = []
    told: set[str] = set()
    try:
        for group in groups_of(options, plan.device):
            own = tuning.FOLDER / group.op / tuning.device_file(plan.machine.device)
            if plan.device == "cuda" and group.op not in told and not own.exists():
                print(f"{group.op}: no tiles of this GPU; `python benchmarks/tune.py {group.op}` finds them\n")
                told.add(group.op)
            if isolated:
                found = run_isolated(group, plan)
            else:
                found = run_group(group, plan, worker, _progress)
                _progress("")
            print(report.table(found) + "\n", flush=True)
            keep(found)
            rows += found
    finally:
        if worker:
            worker.close()
    return rows


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


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
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    command = shlex.join(["python", "benchmarks/run.py", *(sys.argv[1:] if arguments is None else arguments)])
    plan = make_plan(options, command)
    name = {"device": plan.machine.device, "threads": plan.machine.threads, "date": plan.facts["date"]}
    path = Path(options.save) if options.save else report.default_path([name])
    if options.save is not None:
        report.append_csv(path, [])  # a file of other columns is refused before anything is measured

    def keep(found: list[Row]) -> None:
        if options.save is not None:
            report.append_csv(path, found)

    rows = run(options, plan, keep)
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    if options.save is None:
        print(f"not saved: --save appends these rows to {path}")
    else:
        print(f"appended {len(rows)} rows to {path}")
        plot(path)
    wrong = [f"{row['op']} {row['shape']} {row['provider']}" for row in rows if row["status"] == "wrong"]
    if wrong:
        print("WRONG results: " + "; ".join(dict.fromkeys(wrong)))
    ours = [row for row in rows if row["provider"] == report.OURS and row["status"] in ("wrong", "failed")]
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
