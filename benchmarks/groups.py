"""A group of rows (operation, shape, dtype), in this process or in one of its own.

An illegal memory access ends every later call of its process, and a peer may hang or crash. On a GPU each group
therefore runs in a process of its own, which appends the row of a provider to a file as soon as it has it. Where the
process dies or stays at a provider for too long, that provider gets a row with the reason, and another process goes on
with those that have none. The float64 results are kept for it on disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from bestrq2.kernels import tuning

from benchmarks import memory, report
from benchmarks.common import FIELDS, Case, Provider, Results, load_operation, select
from benchmarks.machine import ROOT, Machine
from benchmarks.measure import Budget, Row, measure, total_ms
from benchmarks.processes import Ended, Running

ATTEMPTS = 4  # a group whose processes die at so many providers is given up
LAST_SECONDS = 4.0  # before its end a group begins no provider and no further process
GRACE = 5.0  # seconds that a native call may go on after the time of its provider
MOST_GOLD_BYTES = 4 * 2**30  # float64 results larger than that are computed again by the next process


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
    provider_seconds: float = 600.0  # to compile, run once and be checked, in a process of its own
    first: tuple[str, ...] = ()  # exact names, to be measured before the others in this order
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)  # by operation, in place of the shipped ones


Say = Callable[[str], None]


def run_group(
    group: Group,
    plan: Plan,
    worker: memory.Worker | None,
    say: Say,
    deadline: float = float("inf"),
    provider_seconds: float = float("inf"),
    keep: Callable[[Row], None] | None = None,
    folder: Path | None = None,
) -> list[Row]:
    """Measure a group in this process; no provider is begun after ``deadline`` (of ``time.monotonic``).

    ``provider_seconds`` and ``keep`` are those of :func:`measure`; ``folder`` keeps the float64 results.
    """
    module = load_operation(group.op)
    case = module.make_case(group.shape, getattr(torch, group.dtype), torch.device(plan.device))
    if folder is not None:
        case.gold = _kept(case.gold, folder / "gold.pt")
    providers = providers_of(module.PROVIDERS, plan)
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
            provider_seconds=provider_seconds,
            keep=keep,
        )
    for row in rows if tiles else ():
        row["note"] = "; ".join(filter(None, ("tuned tiles", str(row["note"]))))
    return rows


def providers_of(providers: Sequence[Provider], plan: Plan) -> list[Provider]:
    """Providers that a plan asks for, those of ``plan.first`` before the others."""
    chosen = [p for p in select(providers, plan.providers) if p.name not in plan.without]
    places = {name: place for place, name in enumerate(plan.first)}
    return sorted(chosen, key=lambda provider: places.get(provider.name, len(places)))


def _kept(gold: Callable[[Case], Results], path: Path) -> Callable[[Case], Results]:
    """Float64 results from ``path``, where an earlier process has left them, else computed and left there."""

    def results(case: Case) -> Results:
        if path.exists():
            found: Results = torch.load(path, map_location=case.device)
            return found
        computed = gold(case)
        if sum(x.numel() * x.element_size() for x in computed.values()) <= MOST_GOLD_BYTES:
            with suppress(OSError):
                torch.save(dict(computed), path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
        return computed

    return results


def run_isolated(group: Group, plan: Plan) -> list[Row]:
    """Measure a group in a process of its own; rows of status ``failed`` for providers at which it died."""
    kept: list[Row] = []
    end = time.monotonic() + plan.group_seconds
    with tempfile.TemporaryDirectory(prefix="bestrq2-group-") as name:
        for attempt in range(ATTEMPTS):
            left = end - time.monotonic()
            if attempt and left < LAST_SECONDS:
                break
            folder = Path(name) / str(attempt)
            folder.mkdir()
            excluded = (*plan.without, *(row["provider"] for row in kept))
            request = {
                "group": asdict(group),
                "plan": _to_json(dataclasses.replace(plan, without=excluded)),
                "end": time.time() + left,
            }
            (folder / "request.json").write_text(json.dumps(request))
            ended = run_watched(folder, left, plan.provider_seconds + GRACE)
            rows = _rows(folder / "rows.csv")
            if rows:
                kept += rows
                break
            alone = _rows(folder / "alone.csv")
            kept += alone
            at = (folder / "at.txt").read_text() if (folder / "at.txt").exists() else ""
            if not at:  # it died before the first provider, as others would, or when every provider had its row
                kept += [] if kept else [_failed(group, plan, "all providers", _reason(ended, folder / "log.txt"))]
                break
            if at not in [row["provider"] for row in alone]:
                kept.append(_failed(group, plan, at, _reason(ended, folder / "log.txt")))
    return _compared(kept, group.op)


def run_watched(folder: Path, seconds: float, provider_seconds: float) -> Ended:
    """Run the process of a group to its end, its deadline, or until it has been at one provider for too long."""
    command = [sys.executable, "-m", "benchmarks.groups", str(folder)]
    running = Running(command, folder / "log.txt", child_environment())
    end, at = time.monotonic() + seconds, folder / "at.txt"
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            running.process.wait(0.2)
            break
        with suppress(OSError):
            if at.read_text() and time.time() - at.stat().st_mtime > provider_seconds:
                break
    return running.wait(0.0)


def _rows(path: Path) -> list[Row]:
    return report.read_csv(path) if path.exists() else []


def _compared(rows: list[Row], op: str) -> list[Row]:
    """Fill ``speedup`` of rows from several processes."""
    if not any(row["status"] == "ok" and row["speedup"] == "" for row in rows):
        return rows
    baseline = load_operation(op).BASELINE
    base = {row["cache"]: total_ms(row) for row in rows if row["provider"] == baseline}
    for row in rows:
        total, theirs = total_ms(row), base.get(row["cache"])
        row["speedup"] = theirs / total if theirs and total else ""
    return rows


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
    fields |= {name: tuple(values[name]) for name in ("caches", "providers", "without", "first")}
    return Plan(**fields)


def main(arguments: Sequence[str]) -> int:
    """Measure the group that ``FOLDER/request.json`` asks for into ``rows.csv``.

    ``at.txt`` names the provider, and ``alone.csv`` has the rows of those before it.
    """
    folder = Path(arguments[0])
    request = json.loads((folder / "request.json").read_text())
    group, plan = Group(**request["group"]), _from_json(request["plan"])
    torch.set_num_threads(plan.machine.threads)
    deadline = time.monotonic() + request["end"] - time.time() - LAST_SECONDS

    def say(text: str) -> None:
        _, _, provider = text.partition(f"{group.dtype}: ")
        (folder / "at.txt").write_text("" if provider.startswith("timing ") else provider)

    on_cpu = plan.device == "cpu" and plan.memory and memory.obstacle() is None
    worker = memory.Worker(plan.machine.threads) if on_cpu else None
    try:
        rows = run_group(
            group,
            plan,
            worker,
            say,
            deadline,
            plan.provider_seconds,
            keep=lambda row: report.append_csv(folder / "alone.csv", [row]),
            folder=folder.parent,
        )
    finally:
        if worker:
            worker.close()
    report.append_csv(folder / "rows.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
