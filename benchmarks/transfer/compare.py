#!/usr/bin/env python
"""Compare recipes by how well their features transfer: equal compute, equal data, several seeds, one probe suite.

    python benchmarks/transfer/compare.py --quick                       # clips of the package, under 40 s
    python benchmarks/transfer/compare.py PLAN.yaml --corpora corpora --out transfer/masks --threads 1
    python benchmarks/transfer/compare.py PLAN.yaml --corpora corpora --out transfer/masks --table
    python benchmarks/transfer/compare.py PLAN.yaml --corpora corpora --out transfer/masks --held-out
    python benchmarks/transfer/compare.py PLAN.yaml --corpora corpora --out transfer/masks --head ridge

Plans of ours are in ``benchmarks/transfer/plans``. ``--corpora`` is what ``benchmarks/transfer/corpora.py`` made.
PLAN.yaml is described in ``plan.py``. Equal compute is equal matrix-product operations of training (forward and
backward, as the training log counts them); the steps of each recipe follow from that and are printed. Every run is
probed with the same readout, beside the same encoder before training and log-mel statistics.

Everything is kept in ``--out``: run folders, features, scores, scores.csv, table.md and table.png. A comparison that
was killed at any moment goes on with the same command. ``--table`` trains nothing and shows what is done so far.
``--held-out`` probes the same runs on other tasks, which no recipe was chosen by; their scores are kept in
``OUT/held_out``. ``--head`` probes them with another head than logistic regression, in ``OUT/HEAD``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch

from benchmarks.machine import cpu_name, environment
from benchmarks.transfer import table
from benchmarks.transfer.plan import Plan, quick_plan, read_plan, steps_of
from benchmarks.transfer.scores import (
    Interrupted,
    Suite,
    all_scores,
    check_identity,
    check_runs,
    probe_baseline,
    probe_run,
    train_run,
)
from benchmarks.transfer.tasks import corpus_tasks, held_out_tasks, packaged_tasks
from bestrq2.durability import whole_file
from bestrq2.runs.metrics import read_metrics


def compare(plan: Plan, suite: Suite, source: str | None, out: Path, results: Path) -> None:
    """Train and probe what is not done yet, seed by seed, so that every candidate has as many.

    Args:
        plan, suite: of the comparison.
        source: data to train on; None: the clips of the package.
        out: folder of the runs.
        results: folder of the scores.
    """
    budget = {candidate.name: steps_of(plan, candidate) for candidate in plan.candidates}
    for name, (steps, flops) in budget.items():
        print(f"{name}: {steps} steps, {flops:.3g} FLOPs", flush=True)
    probe_baseline(suite, results, provenance())
    for seed in plan.seeds:
        for candidate in plan.candidates:
            steps, flops = budget[candidate.name]
            run = train_run(plan, candidate, seed, steps, source, out)
            facts: dict[str, Any] = {
                "config": Path(candidate.config).name,
                "overrides": " ".join(candidate.overrides),
                "steps": steps,
                "flops": f"{flops:.4g}",
                "minutes": minutes_of(run),
                **provenance(),
            }
            probe_run(suite, candidate, seed, run, results, facts)


def minutes_of(run: Path) -> float | str:
    """Minutes from the start of a run to its last step, by its metrics log; "" if it cannot be read."""
    try:
        return round(float(read_metrics(run)[-1]["elapsed_seconds"]) / 60, 2)
    except (OSError, KeyError, IndexError, ValueError, TypeError):
        return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/transfer/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", type=Path, help="YAML file, see plan.py")
    parser.add_argument("--quick", action="store_true", help="two tiny recipes on the clips of the package")
    parser.add_argument("--corpora", type=Path, help="folder written by corpora.py (default: the clips of the package)")
    parser.add_argument("--out", type=Path, help="output folder (default: transfer/<plan>)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the plan's")
    parser.add_argument("--steps", type=int, help="of every run, instead of the plan's steps or FLOPs")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--held-out", action="store_true", help="tasks that no recipe was chosen by; needs --corpora")
    parser.add_argument("--head", choices=("linear", "ridge"), default="linear", help="of the probes (default: linear)")
    parser.add_argument("--table", action="store_true", help="only write table and picture of what is done")
    options = parser.parse_args(arguments)
    if options.quick == (options.plan is not None):
        parser.error("give a plan file or --quick")
    if options.held_out and options.corpora is None:
        parser.error("--held-out needs --corpora")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        plan = quick_plan() if options.quick else read_plan(options.plan)
        if options.seeds:
            plan = replace(plan, seeds=tuple(options.seeds))
        if options.steps:
            plan = replace(plan, steps=options.steps, flops=None)
        if options.head != "linear":
            plan = replace(plan, readout={**plan.readout, "head": options.head})
        out = options.out or Path("transfer") / plan.name
        if options.corpora is None:
            source, tasks = None, packaged_tasks(**plan.readout)
        else:
            suite = held_out_tasks if options.held_out else corpus_tasks
            source, tasks = (
                str(options.corpora / "pretrain.csv"),
                suite(options.corpora / "clips.csv", **plan.readout),
            )
        results = out if options.head == "linear" else out / options.head
        results = results / "held_out" if options.held_out else results
        described = asdict(plan)
        if plan.precision == "fp32":  # folders from before there was a choice
            del described["precision"]
        identity = {"plan": described, "source": source, "tasks": {k: asdict(v) for k, v in tasks.items()}}
        check_runs(out, identity)
        check_identity(results, identity)
        try:
            if not options.table:
                compare(plan, Suite(tasks, precision=plan.precision, kept=out / "features"), source, out, results)
        finally:
            report(plan, list(tasks), results)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # ConfigError, ManifestError and the like
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(plan: Plan, tasks: list[str], out: Path) -> None:
    """Write scores.csv, table.md and table.png of what is done, and print the table."""
    scores = all_scores(out)
    results = table.Results(plan, tasks, scores)
    if not results.rows:
        return
    readout = " ".join(f"{name}={value}" for name, value in plan.readout.items())
    readout += " precision=bf16" if plan.precision == "bf16" else ""
    table.write_csv(out / "scores.csv", scores, {"plan": plan.name, "readout": readout})
    shown = table.text(results)
    print(shown)
    with whole_file(out / "table.md") as file:
        file.write(shown + "\n")
    table.draw(out / "table.png", results)
    print(f"Written: {out / 'scores.csv'}, {out / 'table.md'}, {out / 'table.png'}")


def provenance() -> dict[str, Any]:
    """Columns that let a reader repeat a score."""
    command = shlex.join(["python", "benchmarks/transfer/compare.py", *sys.argv[1:]])
    return {"device": cpu_name(), "threads": torch.get_num_threads(), **environment(command)}


if __name__ == "__main__":
    sys.exit(main())
