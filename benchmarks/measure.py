"""From a case and its providers to rows: peak memory, then errors, then timings interleaved over the providers.

Where a row may be the last one that there is time for, each provider is also timed alone as soon as it has been
checked, and its row is handed over at once.

Every repeat times one forward and one backward of *each* provider in turn, so that a machine that slows down meanwhile
slows all of them. The backward is timed by itself, on the graph of the forward just timed (never as a difference of two
timings). Medians with 20 % and 80 % quantiles.

``cache``: ``cold`` overwrites a buffer larger than every cache before each timed forward and backward. ``hot`` runs the
forward once untimed before the timed one; the backward follows its own forward at once, as in training.
CPU: wall clock. GPU: CUDA events, with a short device-side wait before the first event so that the launches of the
timed call are queued before it starts; gaps that a provider causes by waiting for the GPU are in its time.
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.common import FIELDS, Case, Provider, Skip, evaluate, first
from benchmarks.machine import Machine, load
from benchmarks.memory import Failed, short_reason

Row = dict[str, Any]
NO_TIME = "no time was left"  # note of a provider that was not begun
ALONE_SECONDS = 0.3  # of timed calls for such a row
ALONE = "timed alone"  # note of a row that was handed over before the interleaved timing
_FLUSH_BYTES = 256 * 2**20
_WAIT_CYCLES = 4_000_000  # clock cycles, about 2 ms: time to queue every launch of a timed call


@dataclass
class Budget:
    """Number of repeats: until ``seconds`` of timed calls per provider are spent, within the two counts.

    ``repeats`` fixes the count instead.
    """

    seconds: float = 3.0
    at_least: int = 3
    at_most: int = 100
    repeats: int | None = None

    def wants_more(self, times: Times) -> bool:
        done = len(times.forward)
        if self.repeats:
            return done < self.repeats
        spent = sum(times.forward) + sum(times.backward)
        return done < self.at_least or (done < self.at_most and spent < 1e3 * self.seconds)


@dataclass
class Times:
    """Milliseconds of every repeat of one provider."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class Stopwatch:
    """Times calls on one device and empties its caches on demand."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer: Tensor | None = None

    def flush(self) -> None:
        if self.buffer is None:
            self.buffer = torch.empty(_FLUSH_BYTES // 4, device=self.device)
        self.buffer.zero_()

    def milliseconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_WAIT_CYCLES)
            start.record()
            result = call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end), result
        begin = time.perf_counter()
        result = call()
        return 1e3 * (time.perf_counter() - begin), result


def time_calls(
    case: Case, calls: dict[str, Callable[[], Any]], cache: str, budget: Budget
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time prepared, warm calls round-robin. Returns the times and, for calls that failed meanwhile, the reason."""
    if cache not in ("hot", "cold"):
        raise ValueError(f"cache is 'hot' or 'cold', got {cache!r}")
    watch = Stopwatch(case.device)
    times = {name: Times() for name in calls}
    failed: dict[str, str] = {}
    while active := [name for name in calls if name not in failed and budget.wants_more(times[name])]:
        for name in active:
            try:
                if cache == "cold":
                    watch.flush()
                else:
                    calls[name]()
                forward, output = watch.milliseconds(calls[name])
                times[name].forward.append(forward)
                if case.differentiable:
                    output = first(output)
                    if cache == "cold":
                        watch.flush()
                    backward, _ = watch.milliseconds(partial(case.backward, output))
                    times[name].backward.append(backward)
                output = _ = None  # free this provider's results before the next one allocates
            except Exception as error:
                failed[name] = short_reason(error)
            if name in failed:
                release(case.device)
    return times, failed


class TooSlow(Exception):
    """A provider took longer than it may to compile, run once and be checked."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise :class:`TooSlow` in the block after ``seconds``: between two steps of Python, not in a native call."""
    if seconds == float("inf"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def release(device: torch.device) -> None:
    """Give cached GPU memory back."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def set_limit(rows: Sequence[Row], limit_ms: float) -> None:
    """Fill ``limit_ms`` and ``pct_of_limit`` of a group's rows."""
    for row in rows:
        row["limit_ms"] = limit_ms
        total = total_ms(row)
        row["pct_of_limit"] = 100 * limit_ms / total if total else ""


def total_ms(row: Row) -> float | None:
    """Forward plus backward, each its own median; None for a row without timings."""
    return None if row["fwd_ms"] == "" else row["fwd_ms"] + (row["bwd_ms"] or 0.0)


def measure(
    module: str,
    case: Case,
    providers: Sequence[Provider],
    machine: Machine,
    environment: dict[str, str],
    *,
    baseline: str,
    caches: Sequence[str],
    budget: Budget,
    worker: memory.Worker | None,
    say: Callable[[str], None] = lambda text: None,
    deadline: float = float("inf"),
    provider_seconds: float = float("inf"),
    keep: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Rows of one group (operation, shape, dtype), one per provider and cache state, in the order of ``providers``.

    ``worker`` measures CPU peak memory (None: leave it out). Skipped and failed providers get a row with the reason.
    Providers that were not begun at ``deadline`` (of ``time.monotonic``) are skipped, and one that is not ready after
    ``provider_seconds`` has failed. ``keep`` gets the row of every provider as soon as there is one, timed alone in the
    first cache state; at the deadline these are the rows that are returned.
    """
    torch.compiler.reset()  # else dynamo's recompilation limit would silently send later shapes to eager mode
    machine.measure_again(case.work)
    common = {
        **dict.fromkeys(FIELDS, ""),
        **{"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")},
        **{"device": machine.device, "threads": machine.threads, "load": load(), "status": "ok"},
        **environment,
    }
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    alone: dict[str, Row] = {}
    for provider in providers:
        say(f"{case.op} {case.shape} {common['dtype']}: {provider.name}")
        row = rows[provider.name] = {**common, "provider": provider.name, "note": provider.note}
        if time.monotonic() >= deadline:
            row.update(status="skipped", note=NO_TIME)
            continue
        try:
            with at_most(provider_seconds):
                calls[provider.name] = _check(module, case, provider, row, worker)
        except Skip as reason:
            row.update(status="skipped", note=str(reason))
        except (Failed, TooSlow) as reason:
            row.update(status="failed", note=str(reason))
        except Exception as error:
            row.update(status="failed", note=short_reason(error))
        if row["status"] == "failed":
            release(case.device)
        if keep is not None:
            brief = replace(budget, seconds=min(budget.seconds, ALONE_SECONDS))
            alone[provider.name] = _alone(case, row, calls, caches[0], brief)
            set_limit([alone[provider.name]], machine.limit_ms(case.work, case.backward_work))
            keep(alone[provider.name] | machine.ceilings(case.work))
    if alone and time.monotonic() >= deadline:
        return [row | machine.ceilings(case.work) for row in (rows | alone).values()]
    say(f"{case.op} {case.shape} {common['dtype']}: timing {len(calls)} providers")
    finished: list[Row] = []
    for cache in caches:
        times, failed = time_calls(case, calls, cache, budget)
        group = [_timed(row, times.get(name), failed.get(name), cache) for name, row in rows.items()]
        base = next((total_ms(row) for row in group if row["provider"] == baseline), None)
        for row in group:
            total = total_ms(row)
            row["speedup"] = base / total if base and total else ""
        finished += group
    machine.measure_again(case.work)  # other load at the beginning must not lower the limit of rows that had none
    set_limit(finished, machine.limit_ms(case.work, case.backward_work))
    return [row | machine.ceilings(case.work) for row in finished]


def _alone(case: Case, row: Row, calls: dict[str, Callable[[], Any]], cache: str, budget: Budget) -> Row:
    """The row of a provider, timed by itself if it was ready."""
    name = row["provider"]
    if name not in calls:
        return dict(row)
    times, failed = time_calls(case, {name: calls[name]}, cache, budget)
    timed = _timed(row, times.get(name), failed.get(name), cache)
    timed["note"] = "; ".join(filter(None, (str(timed["note"]), ALONE)))
    return timed


def _check(module: str, case: Case, provider: Provider, row: Row, worker: memory.Worker | None) -> Callable[[], Any]:
    """Fill peak memory and error of a row; return the warm call."""
    call = provider.prepare(case)
    if worker is not None and case.device.type == "cpu":
        row["peak_mb"] = worker.peak_bytes(module, case, provider) / 1e6
    if provider.floor:
        output = first(call())
        if case.differentiable:
            case.backward(output)
    else:
        error, remark = case.errors(evaluate(case, call))
        row["max_error"] = error
        described = call.note() if hasattr(call, "note") else ""
        row["note"] = "; ".join(filter(None, (remark, described, provider.note)))
        assert case.tolerance is not None
        if not error <= case.tolerance:
            row["status"] = "wrong"
    if case.device.type == "cuda":
        row["peak_mb"] = memory.peak_bytes(case, call) / 1e6
    return call


def _timed(row: Row, times: Times | None, failure: str | None, cache: str) -> Row:
    row = dict(row)
    if row["status"] in ("skipped", "failed"):
        return row
    row["cache"] = cache
    if failure:
        return {**row, "status": "failed", "note": failure}
    assert times is not None
    for name, values in (("fwd", times.forward), ("bwd", times.backward)):
        if values:
            row[f"{name}_ms"] = statistics.median(values)
            row[f"{name}_p20"], row[f"{name}_p80"] = quantile(values, 0.2), quantile(values, 0.8)
    row["repeats"] = len(times.forward)
    return row
