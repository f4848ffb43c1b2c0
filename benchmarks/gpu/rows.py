"""Rows of the reference workloads with their peers; as ``rows-tuned`` ours again, with the tiles just found.

The kernels of the first workloads are compiled beforehand, many at a time; then every provider takes some seconds. A
row is written with its group, and a group that reaches its deadline has the rows of all providers but the last.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.common import load_operation
from benchmarks.gpu import warm
from benchmarks.gpu.plan import Request, read_request
from benchmarks.gpu.summary import tuned
from benchmarks.gpu.workloads import COMPILED, FIRST, GROUPS, MORE, TINY
from benchmarks.groups import Group, Plan, run_isolated
from benchmarks.machine import Machine, describe_machine, environment
from benchmarks.measure import Budget

# Not on a GPU within a fixed time: slow compilers and formulas, other names of the same code.
WITHOUT = (
    *("torch.compile max-autotune", "SpeechBrain formula", "eager in row blocks"),
    *("bestrq2[triton]", "bestrq2[cpu]", "reference"),
)
UNFIT = {"1000000x256->16x8192": ("vector-quantize-pytorch",)}  # stored scores of 33 GB, and slow
LEAST_SECONDS = 25.0  # a group is not begun with less: its imports, inputs and float64 results take up to 20 s
GROUP_SECONDS = 40.0  # of a group, even where its share is less
MOST_SHARE = 2.0
PROVIDER_SECONDS = 40.0  # to compile, run once and be checked
WARM_SHARE, WARM_SECONDS = 0.2, 75.0  # of the stage, and at most


def main(request: Request) -> int:
    again = request.stage == "rows-tuned"
    facts = environment("python benchmarks/gpu_run.py", request.commit)
    machine = request.notes.get("facts", {}).get("machine")
    found = tuned(request.out / "tuned.json")
    plan = Plan(
        device=request.device,
        machine=Machine(**machine) if machine else describe_machine(_device(request)),
        facts=facts,
        caches=("cold",),
        budget=Budget(repeats=1) if request.rehearse else Budget(seconds=0.3, at_least=5, at_most=50),
        providers=("bestrq2",) if again else (),
        memory=False,
        tiles=found.get("tiles", {}) if again else {},
        provider_seconds=PROVIDER_SECONDS,
    )
    if again and not any(plan.tiles.values()):
        request.note({"line": "no tiles were found that differ"})
        return 0
    workloads = TINY if request.rehearse else GROUPS
    wanted = [Group(*workload) for workload in workloads if workload[0] not in request.broken]
    more = [] if request.rehearse else [Group(*workload) for workload in MORE if workload[0] not in request.broken]
    if again:
        wanted = [group for group in wanted if plan.tiles.get(group.op)]
    elif "warm" not in request.notes and not request.rehearse:
        warm_up(request, wanted)
    done = 0
    for place, group in enumerate([*wanted, *more]):
        if request.left() < (1.0 if request.rehearse else LEAST_SECONDS):
            print(f"no time for {group}")
            continue
        plan.group_seconds = group_seconds(request.left() - 1.0, max(len(wanted) - place, 1))
        plan.without, plan.first = (*WITHOUT, *UNFIT.get(group.shape, ())), FIRST[group.op]
        if request.rehearse:  # ours and the baseline: compilers of peers take longer than everything else
            keep = ("bestrq2[triton]", load_operation(group.op).BASELINE)
            plan.without = tuple(p.name for p in load_operation(group.op).PROVIDERS if p.name not in keep)
        rows = run_isolated(group, plan)
        report.append_csv(request.out / "rows.csv", rows)
        print(report.table(rows) + "\n", flush=True)
        done += 1
        request.note(
            {"line": f"{done} of {len(wanted)} groups" + (f" and {len(more)} more" if done > len(wanted) else "")}
        )
    return 0 if done >= len(wanted) else 1


def warm_up(request: Request, groups: Sequence[Group]) -> None:
    """Compile what the providers of ``groups`` need, in parallel."""
    jobs = [
        (group.op, group.shape, group.dtype, name)
        for name in COMPILED
        for group in groups
        if name in FIRST[group.op] and name not in UNFIT.get(group.shape, ())
    ]
    seconds = min(WARM_SECONDS, WARM_SHARE * request.left())
    good = warm.compile_all(request, jobs, seconds)
    print(f"{good} of {len(jobs)} compiled beforehand", flush=True)


def group_seconds(left: float, groups: int) -> float:
    """Time of the next of so many groups: twice its share, so that a peer that hangs cannot take all of it."""
    return min(left, max(GROUP_SECONDS, MOST_SHARE * left / groups))


def _device(request: Request):  # type: ignore[no-untyped-def]
    import torch

    return torch.device(request.device)


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
