"""The whole training step of ``best_rq2_base`` on synthetic audio, compiled and not, a profile of three steps, and the
published way in plain PyTorch."""

from __future__ import annotations

import csv
import itertools
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import Request, read_request

FIELDS = (
    *("name", "ms", "mfu_pct", "audio_s_per_s", "peak_mb", "batch", "seconds", "dtype", "steps", "device", "torch"),
    *("commit", "date", "note"),
)
TABLE_LINES = 40
PEERS = (
    ("base-256x10s", "bfloat16", ()),
    ("base-256x10s", "float32", ("published, eager",)),
    ("small-256x10s", "bfloat16", ()),
)
PEER_SECONDS = 25.0  # a group of peers is not begun with less; its rows are kept one at a time
LEFT_FOR_NEXT = 20.0  # seconds that a group leaves for the one behind it
PROVIDER_SECONDS = 60.0  # to compile, run once and be checked: the whole published step takes most of it
LEAST_SECONDS = 12.0  # nothing is begun with less


def append(request: Request, row: Mapping[str, Any]) -> None:
    """Add a row to ``train.csv`` at once."""
    from benchmarks.machine import environment

    facts = environment("", request.commit)
    machine = request.notes.get("facts", {}).get("machine") or {}
    known = {"device": machine.get("device", ""), **{name: facts[name] for name in ("torch", "commit", "date")}}
    path = request.out / "train.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        values = known | dict(row)
        writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()})


def main(request: Request) -> int:
    import torch

    recipe, batch = ("best_rq2_tiny", 2) if request.rehearse else ("best_rq2_base", 256)
    ways: list[tuple[str, torch.dtype | None, bool, int]] = [("bf16, blocks compiled", torch.bfloat16, True, 30)]
    if not request.rehearse:  # behind the peers, one of whose rows is of our eager step, too
        ways += [("bf16, eager", torch.bfloat16, False, 20)]
    failed, found = 0, []
    for name, dtype, compiled, steps in ways:
        if not compiled:
            _against_peers(request)
        if request.left() < (1 if request.rehearse else LEAST_SECONDS):
            found.append(f"{name}: no time")
            continue
        try:
            run = Step(request, recipe, batch, dtype, compiled and not request.rehearse)
            row = run.measure(2 if request.rehearse else steps)
        except Exception as error:  # one way that fails may not take the others along
            failed += 1
            found.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150])
            request.note({"line": "; ".join(found)})
            traceback.print_exc()
            continue
        append(request, {"name": f"{recipe}: {name}", **row})
        found.append(f"{name}: {row['ms']:.1f} ms, MFU {row['mfu_pct']:.1f} %")
        request.note({"line": "; ".join(found)})
        if compiled:
            try:
                _profile(request, run)
            except Exception as error:  # the other ways are worth more
                print(f"no profile: {type(error).__name__}: {error}", flush=True)
        del run
        if request.device == "cuda":
            torch.cuda.empty_cache()
    return 1 if failed else 0


def _against_peers(request: Request) -> None:
    """Rows of ``benchmarks/run.py --ops step``, where there is such a benchmark, as long as time is left."""
    from benchmarks import report
    from benchmarks.gpu.workloads import FIRST
    from benchmarks.groups import Group, Plan, run_isolated
    from benchmarks.machine import Machine, describe_machine, environment
    from benchmarks.measure import Budget
    from benchmarks.run import available_ops

    if "step" not in available_ops():
        return
    import torch

    known = request.notes.get("facts", {}).get("machine")
    machine = Machine(**known) if known else describe_machine(torch.device(request.device))
    facts = environment("python benchmarks/gpu_run.py", request.commit)
    plan = Plan(request.device, machine, facts, ("cold",), Budget(seconds=1.5, at_least=3, at_most=20), memory=False)
    plan.provider_seconds, plan.first = PROVIDER_SECONDS, FIRST["step"]
    for place, (shape, dtype, plan.providers) in enumerate(PEERS):
        if request.left() < PEER_SECONDS:
            print(f"no time for {shape} {dtype}")
            return
        behind = LEFT_FOR_NEXT if place + 1 < len(PEERS) else 0.0
        plan.group_seconds = max(request.left() - 1 - behind, PEER_SECONDS - 1)
        rows = run_isolated(Group("step", shape, dtype), plan)
        report.append_csv(request.out / "rows.csv", rows)
        print(report.table(rows) + "\n", flush=True)


class Step:
    """Model, optimizer and an endless stream of one pinned int16 batch; a call is one training step, as the trainer
    makes it: the next batch is copied and prepared while the device works, loss and norm are read one step later."""

    def __init__(self, request: Request, recipe: str, batch: int, dtype: Any, compiled: bool) -> None:
        import torch

        from bestrq2.config import load_config
        from bestrq2.data import Batch
        from bestrq2.models import build_model
        from bestrq2.training.compilation import compile_blocks
        from bestrq2.training.feeder import Feeder, preparation
        from bestrq2.training.optimizer import make_optimizer

        self.device, self.dtype, self.batch = torch.device(request.device), dtype, batch
        torch.manual_seed(0)
        self.config = load_config(recipe)
        self.model = build_model(self.config).to(self.device).train()
        if compiled:
            compile_blocks(self.model)
        self.optimizer = make_optimizer(self.model, self.config.optimizer)
        self.seconds = self.config.data.crop_seconds
        samples = int(self.seconds * self.config.model.front_end.sampling_rate)
        waveform = torch.randint(-3000, 3000, (batch, samples), dtype=torch.int16)
        one = Batch(waveform, torch.full((batch,), samples), torch.arange(batch))
        one = one.pin_memory() if self.device.type == "cuda" else one
        ahead = preparation(self.model, self.device, dtype) if self.device.type == "cuda" else None
        self.feeder = Feeder((one for _ in itertools.count()), self.device, ahead)
        self.fed = iter(self.feeder)
        self.step, self.flops = 0, 0.0
        self.late: Any = None

    def __call__(self) -> None:
        import torch

        from bestrq2.training.late import Reading
        from bestrq2.training.optimizer import clip_gradients, set_schedule, step_if_finite
        from bestrq2.training.step import StepTotals

        set_schedule(self.optimizer, self.step, self.config.train.steps, self.config.optimizer)
        batch = next(self.fed).batch
        ahead = {} if batch.prepared is None else {"prepared": batch.prepared}
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            out = self.model(*batch.inputs, step=self.step, index=batch.index, **ahead)
        out.objective.backward()
        norm = clip_gradients(self.model, self.config.optimizer.max_grad_norm, optimizer=self.optimizer)
        values = torch.stack((out.loss.detach(), norm))
        if self.device.type == "cuda":
            step_if_finite(self.optimizer, values)
        else:
            self.optimizer.step()
        self.feeder.prefetch()
        if self.late is not None:
            self.late.read()
        self.late = Reading(self.step, batch, StepTotals(), values, queued=True)
        self.late.start()
        self.optimizer.zero_grad(set_to_none=True)
        self.flops = self.model.flops(out.plan)
        self.step += 1

    def synchronize(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, steps: int) -> dict[str, Any]:
        """Milliseconds of a step on average over ``steps``, after twelve that compile and warm up."""
        import torch

        from bestrq2.hardware import peak_flops

        for _ in range(min(steps, 12)):
            self()
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        for _ in range(steps):
            self()
        self.synchronize()
        spent = (time.perf_counter() - begin) / steps
        peak, source = peak_flops(self.device, torch.bfloat16 if self.dtype is not None else None)
        memory = torch.cuda.max_memory_allocated() / 1e6 if self.device.type == "cuda" else ""
        return {
            "ms": 1e3 * spent,
            "mfu_pct": 100 * self.flops / spent / peak,
            "audio_s_per_s": self.batch * self.seconds / spent,
            "peak_mb": memory,
            "batch": self.batch,
            "seconds": self.seconds,
            "dtype": "float32" if self.dtype is None else "bfloat16",
            "steps": steps,
            "note": f"pinned int16 batch; MFU against {source}",
        }


def _profile(request: Request, run: Step) -> None:
    """The kernels of three steps by their time on the device; ``profile.txt``."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if request.device == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(1 if request.rehearse else 3):
            run()
        run.synchronize()
    order = "self_device_time_total" if request.device == "cuda" else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=TABLE_LINES, max_name_column_width=80)
    (request.out / "profile.txt").write_text(f"torch {torch.__version__}, {run.step} steps\n{table}\n")


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
