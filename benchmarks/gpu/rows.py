"""Rows of the reference workloads with their peers; as ``rows-tuned`` ours again, with the tiles just found."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import report
from benchmarks.common import load_operation
from benchmarks.gpu.plan import Request, read_request
from benchmarks.gpu.summary import tuned
from benchmarks.gpu.workloads import GROUPS, TINY
from benchmarks.groups import Group, Plan, run_isolated
from benchmarks.machine import Machine, describe_machine, environment
from benchmarks.measure import Budget

WITHOUT = ("torch.compile max-autotune", "SpeechBrain formula", "eager in row blocks")
UNFIT = {"1000000x256->16x8192": ("reference", "vector-quantize-pytorch")}  # stored scores of 33 GB, and slow
LEAST_SECONDS = 40.0  # a group is not begun with less: its imports, inputs and float64 results take up to 20 s
MOST_SHARE = 2.0


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
    )
    if again and not any(plan.tiles.values()):
        request.note({"line": "no tiles were found that differ"})
        return 0
    workloads = TINY if request.rehearse else GROUPS
    wanted = [Group(*workload) for workload in workloads if workload[0] not in request.broken]
    if again:
        wanted = [group for group in wanted if plan.tiles.get(group.op)]
    done = 0
    for place, group in enumerate(wanted):
        if request.left() < (1.0 if request.rehearse else LEAST_SECONDS):
            print(f"no time for {group}")
            continue
        plan.group_seconds = group_seconds(request.left() - 1.0, len(wanted) - place)
        plan.without = (*WITHOUT, *UNFIT.get(group.shape, ()))
        if request.rehearse:  # ours and the baseline: compilers of peers take longer than everything else
            keep = ("bestrq2[triton]", load_operation(group.op).BASELINE)
            plan.without = tuple(p.name for p in load_operation(group.op).PROVIDERS if p.name not in keep)
        rows = run_isolated(group, plan)
        report.append_csv(request.out / "rows.csv", rows)
        print(report.table(rows) + "\n", flush=True)
        done += 1
        request.note({"line": f"{done} of {len(wanted)} groups"})
    return 0 if done == len(wanted) else 1


def group_seconds(left: float, groups: int) -> float:
    """Time of the next of so many groups: twice its share, so that a peer that hangs cannot take all of it."""
    return min(left, max(LEAST_SECONDS, MOST_SHARE * left / groups))


def _device(request: Request):  # type: ignore[no-untyped-def]
    import torch

    return torch.device(request.device)


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
