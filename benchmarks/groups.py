"""A group of rows (operation, shape, dtype), in this process or in one of its own.

An illegal memory access ends every later call of its process, and a peer may hang or crash. On a GPU each group
therefore runs in a process of its own, which appends its rows to a file as soon as it has them. Where the process dies,
the provider it was at gets a row with the reason and the others are measured again without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bestrq2.kernels import tuning

from benchmarks import memory, report
from benchmarks.common import FIELDS, load_operation, select
from benchmarks.machine import ROOT, Machine
from benchmarks.measure import Budget, Row, measure
from benchmarks.processes import Ended, run_process

ATTEMPTS = 3  # a group whose processes die at three providers is given up
FIRST_SHARE = 0.6  # of the time of a group for an attempt that is not the last; of an attempt until its last provider


@dataclass(frozen=True)
class Group:
    op: str
    shape: str
    dtype: str


@dataclass
class Plan:
    """Settings that all groups of a run share."""

    device: str
    machine: Machine
    facts: dict[str, str]
    caches: tuple[str, ...]
    budget: Budget
    providers: tuple[str, ...] = ()  # words; empty: all
    without: tuple[str, ...] = ()  # exact names
    memory: bool = True
    group_seconds: float = 600.0  # for all attempts
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)  # by operation, in place of the shipped ones


Say = Callable[[str], None]


def run_group(
    group: Group, plan: Plan, worker: memory.Worker | None, say: Say, deadline: float = float("inf")
) -> list[Row]:
    """Measure a group in this process; no provider is begun after ``deadline`` (of ``time.monotonic``)."""
    module = load_operation(group.op)
    case = module.make_case(group.shape, getattr(torch, group.dtype), torch.device(plan.device))
    providers = [p for p in select(module.PROVIDERS, plan.providers) if p.name not in plan.without]
    tiles = plan.tiles.get(group.op, {})
    with tuning.override(group.op, tiles) if tiles else nullcontext():
        rows = measure(
            group.op,
            case,
            providers,
            plan.machine,
            plan.facts,
            baseline=module.BASELINE,
            caches=plan.caches,
            budget=plan.budget,
            worker=worker,
            say=say,
            deadline=deadline,
        )
    for row in rows if tiles else ():
        row["note"] = "; ".join(filter(None, ("tuned tiles", str(row["note"]))))
    return rows


def run_isolated(group: Group, plan: Plan) -> list[Row]:
    """Measure a group in a process of its own; rows of status ``failed`` for providers at which it died."""
    dead: list[Row] = []
    end = time.monotonic() + plan.group_seconds
    for attempt in range(ATTEMPTS):
        left = end - time.monotonic()
        if dead and left < 1:
            break
        seconds = left if attempt == ATTEMPTS - 1 else FIRST_SHARE * left
        excluded = (*plan.without, *(row["provider"] for row in dead))
        with tempfile.TemporaryDirectory(prefix="bestrq2-group-") as name:
            folder = Path(name)
            request = {
                "group": asdict(group),
                "plan": _to_json(dataclasses.replace(plan, without=excluded, group_seconds=seconds)),
            }
            (folder / "request.json").write_text(json.dumps(request))
            command = [sys.executable, "-m", "benchmarks.groups", str(folder)]
            log = folder / "log.txt"
            ended = run_process(command, log, seconds, environment=child_environment())
            rows = report.read_csv(folder / "rows.csv") if (folder / "rows.csv").exists() else []
            if rows:
                return rows + dead
            at = (folder / "at.txt").read_text() if (folder / "at.txt").exists() else ""
            dead.append(_failed(group, plan, at or "all providers", _reason(ended, log)))
            if not at:
                break  # it died before the first provider: the others would, too
    return dead


def child_environment() -> dict[str, str]:
    """This process's environment, with the checkout first on the path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def _reason(ended: Ended, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{ended.text}: {lines[-1] if lines else 'no output'}"[:300]


def _failed(group: Group, plan: Plan, provider: str, note: str) -> Row:
    return {
        **dict.fromkeys(FIELDS, ""),
        **asdict(group),
        **plan.facts,
        **{"device": plan.machine.device, "threads": plan.machine.threads, "limit_ms": 0.0},
        **{"provider": provider, "status": "failed", "note": note},
    }


def _to_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def _from_json(values: dict[str, Any]) -> Plan:
    fields: dict[str, Any] = {**values, "machine": Machine(**values["machine"]), "budget": Budget(**values["budget"])}
    fields |= {name: tuple(values[name]) for name in ("caches", "providers", "without")}
    return Plan(**fields)


def main(arguments: Sequence[str]) -> int:
    """Measure the group that ``FOLDER/request.json`` asks for into ``rows.csv``; ``at.txt`` names the provider."""
    folder = Path(arguments[0])
    request = json.loads((folder / "request.json").read_text())
    group, plan = Group(**request["group"]), _from_json(request["plan"])
    torch.set_num_threads(plan.machine.threads)
    deadline = time.monotonic() + FIRST_SHARE * plan.group_seconds

    def say(text: str) -> None:
        _, _, provider = text.partition(f"{group.dtype}: ")
        (folder / "at.txt").write_text("" if provider.startswith("timing ") else provider)

    on_cpu = plan.device == "cpu" and plan.memory and memory.obstacle() is None
    worker = memory.Worker(plan.machine.threads) if on_cpu else None
    try:
        rows = run_group(group, plan, worker, say, deadline)
    finally:
        if worker:
            worker.close()
    report.append_csv(folder / "rows.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
