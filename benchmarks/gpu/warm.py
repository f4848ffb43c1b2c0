"""Compile what later stages need, in parallel: fills the caches of Triton and of torch.compile on disk."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.plan import Request, cores, read_request
from benchmarks.gpu.workloads import COMPILED, FIRST, GROUPS, TINY
from benchmarks.processes import Running

MOST_PROCESSES = 12
Job = tuple[str, str, str, str]  # operation, shape, dtype, provider


def main(request: Request) -> int:
    groups = TINY[:1] if request.rehearse else GROUPS
    names = ("bestrq2[triton]",) if request.rehearse else COMPILED
    jobs = [
        (*workload, name) for name in names for workload in groups if request.rehearse or name in FIRST[workload[0]]
    ]
    return 0 if compile_all(request, jobs, request.left() - 1.0) == len(jobs) else 1


def compile_all(request: Request, jobs: Sequence[Job], seconds: float) -> int:
    """Run as many of the jobs at a time as there are cores, for at most ``seconds``; returns how many ended well."""
    end = time.monotonic() + seconds
    running: list[Running] = []
    waiting, done, good = list(jobs), 0, 0
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < min(MOST_PROCESSES, max(1, cores() - 2)):
            job = waiting.pop(0)
            command = [sys.executable, "-m", "benchmarks.gpu.warm", "--job", json.dumps([*job, request.device])]
            running.append(Running(command, request.work / "warm-jobs.log"))
        time.sleep(0.05)
        for process in [process for process in running if process.process.poll() is not None]:
            running.remove(process)
            done, good = done + 1, good + process.wait(0).good
            request.note({"line": f"{good} of {len(jobs)} compiled"})
    for process in running:
        process.wait(0)
    return good


def run_job(op: str, shape: str, dtype: str, name: str, device: str) -> int:
    """One forward and backward: everything it needs is compiled then. A provider that does not apply is none."""
    import torch

    from benchmarks.common import Skip, first, load_operation

    module = load_operation(op)
    provider = next((p for p in module.PROVIDERS if p.name == name), None)
    if provider is None:
        return 0
    case = module.make_case(shape, getattr(torch, dtype), torch.device(device))
    try:
        out = first(provider.prepare(case)())
        if case.differentiable:
            case.backward(out)
    except Skip as reason:
        print(f"{op} {name}: {reason}")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        sys.exit(run_job(*json.loads(sys.argv[2])))
    sys.exit(main(read_request(Path(sys.argv[1]))))
