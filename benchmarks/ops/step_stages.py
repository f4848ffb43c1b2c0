"""Time of each stage of a training step, for the note of its row."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Case

STEPS = 3  # timed for the shares, after one that is not


class StageClock:
    """Seconds of named stages; on a GPU every border waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Add the time of every forward pass of ``module`` to a stage; returns the hooks."""
        begins: list[float] = []

        def before(*_: Any) -> None:
            begins.append(self.now())

        def after(*_: Any) -> None:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - begins.pop()

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


class DescribedCall:
    """A step that a benchmark times; ``note()`` runs some more of them and says what each stage took.

    Args:
        stages: modules whose forward passes are timed.
        rest: name of what the forward pass does besides.
    """

    def __init__(self, case: Case, step: Callable[..., Tensor], stages: Mapping[str, nn.Module], rest: str) -> None:
        self.case, self.step, self.stages, self.rest = case, step, stages, rest

    def __call__(self) -> Tensor:
        return self.step()

    def note(self) -> str:
        clock = StageClock(self.case.device)
        hooks = [hook for name, module in self.stages.items() for hook in clock.watch(name, module)]
        try:
            self.step()
            clock.seconds.clear()
            begin = previous = clock.now()

            def mark(stage: str) -> None:
                nonlocal previous
                now = clock.now()
                clock.seconds[stage] = clock.seconds.get(stage, 0.0) + now - previous
                previous = now

            for _ in range(STEPS):
                self.step(mark)
            total = clock.now() - begin
        finally:
            for hook in hooks:
                hook.remove()
        seconds = dict(clock.seconds)
        named = sum(seconds.get(name, 0.0) for name in self.stages)
        rest = seconds.pop("forward") - named
        shares = [f"{name} {seconds[name] / total:.0%}" for name in self.stages]
        shares += [f"{self.rest} {rest / total:.0%}"]
        shares += [f"{name} {seconds[name] / total:.0%}" for name in ("backward", "optimizer")]
        clips, samples = self.case.inputs["waveform"].shape
        audio = clips * samples / self.case.inputs["config"].model.front_end.sampling_rate
        return f"{audio:.0f} s of audio; {', '.join(shares)}; copies {self.copies():.0%}"

    def copies(self) -> float:
        """Share of copies and casts of a step's time in PyTorch's operators."""
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU] + ([activity.CUDA] if self.case.device.type == "cuda" else [])
        with torch.profiler.profile(activities=kinds) as profile:
            self.step()
        name = "self_device_time_total" if self.case.device.type == "cuda" else "self_cpu_time_total"
        events = profile.key_averages()
        total = sum(getattr(event, name) for event in events) or 1
        return sum(getattr(event, name) for event in events if event.key == "aten::copy_") / total
