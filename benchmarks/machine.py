"""Limits of the machine: matrix rates and memory bandwidth, the basis of every ``pct_of_limit``.

Measured in the same run: on a CPU with the same threads, again before every group of rows, the best of the run counts
(other load must not lower a limit); on a GPU once, with random values (products of constants run faster).
``python benchmarks/machine.py`` prints them.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


MEASURED = "measured in this run"


@dataclass(frozen=True)
class Work:
    """Unavoidable work of one call: ``flops`` in ``arithmetic``, ``bytes`` of memory traffic, ``elementwise`` scores.

    ``flops`` may also map several arithmetics to their parts, which then add up.
    ``elementwise`` counts values that each need at least one comparison or exponential outside the matrix units; it
    bounds only devices that state such a rate.
    """

    flops: float | Mapping[str, float]
    bytes: float
    arithmetic: str = "float32"
    elementwise: float = 0.0

    def parts(self) -> Mapping[str, float]:
        """FLOPs of each arithmetic."""
        return self.flops if isinstance(self.flops, Mapping) else {self.arithmetic: self.flops}


@dataclass
class Machine:
    """Rates in FLOP/s per arithmetic, bytes/s and elementwise operations/s, with where they come from."""

    device: str
    kind: str
    threads: int
    flops: dict[str, float]
    bandwidth: float
    source: str
    elementwise: float = float("inf")

    def limit_ms(self, *works: Work | None) -> float:
        """Shortest time for some works one after the other, each bound by the slowest of its resources alone."""
        return 1e3 * sum(
            max(
                sum(flops / self.flops[arithmetic] for arithmetic, flops in work.parts().items()),
                work.bytes / self.bandwidth,
                work.elementwise / self.elementwise,
            )
            for work in works
            if work is not None
        )

    def measure_again(self, work: Work) -> None:
        """Raise the rates that ``work`` needs if the machine does better now; only measured ones."""
        if self.source == MEASURED and self.kind == "cpu":
            device = torch.device(self.kind)
            for name in work.parts():
                self.flops[name] = max(self.flops[name], matmul_rate(getattr(torch, name), device))
            self.bandwidth = max(self.bandwidth, copy_rate(device))

    def ceilings(self, work: Work) -> dict[str, float | str]:
        """The columns that say what a row's limit was computed from: the rate of its first arithmetic, and the copy."""
        rate = self.flops.get(next(iter(work.parts())), 0.0)
        return {
            "ceiling_tflops": rate / 1e12,
            "ceiling_gb_per_s": self.bandwidth / 1e9,
            "ceiling_source": self.source,
        }

    def describe(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.flops.items())
        return f"{self.device}, {self.threads} threads: {rates}, {self.bandwidth / 1e9:,.0f} GB/s ({self.source})"


# name pattern -> fp32 comparisons/s, from the number of multiprocessors and the clock: no product measures them
_COMPARISONS = {r"H100(?!.*PCIe)|H200|GH200": 14.8e12, r"A100": 9.7e12}


def describe_machine(device: torch.device) -> Machine:
    """Measure the rates of ``device``: about two seconds."""
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        elementwise = next((rate for gpu, rate in _COMPARISONS.items() if re.search(gpu, name)), float("inf"))
        kinds: tuple[str, ...] = ("float32", "float16", "bfloat16")
    else:
        name, elementwise, kinds = cpu_name(), float("inf"), ("float32", "float16", "bfloat16", "int8")
    flops = {kind: matmul_rate(getattr(torch, kind), device) for kind in kinds}
    return Machine(name, device.type, threads, flops, copy_rate(device), MEASURED, elementwise)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _best_seconds(call: Callable[[], object], device: torch.device, seconds: float = 0.4) -> float:
    """The fastest of the calls that fit into ``seconds`` (at least 4): other load must not lower a limit."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    spent: list[float] = []
    while len(spent) < 4 or sum(spent) < seconds:
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        spent.append(time.perf_counter() - start)
    return min(spent)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s (int8: operations/s) of square matrix products.

    The size is doubled until a product takes 5 ms, because a CPU without fp16 units is slow.
    """
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    size, seconds = 256, 0.0
    while seconds < 5e-3 and size < 16384:
        size *= 2
        a, b = (_operand(size, dtype, device) for _ in range(2))
        seconds = _best_seconds(partial(product, a, b), device, 0.02)
    return 2 * size**3 / min(seconds, _best_seconds(partial(product, a, b), device))


def _operand(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (size, size), dtype=dtype, device=device)
    return torch.randn(size, size, device=device).to(dtype)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of copying 256 MB: beyond every cache."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _best_seconds(lambda: target.copy_(source), device)


def load() -> float:
    """Processes that wanted a core, on average over the last minute: before a run it should be near 0."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def environment(command: str, commit: str | None = None) -> dict[str, str]:
    """Columns that let a reader repeat a row: versions, commit (``+dirty`` with local changes), date and command.

    Where the files are no git checkout, ``commit`` or the environment variable ``BESTRQ2_COMMIT`` names it.
    """

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    from bestrq2 import __version__

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "bestrq2": __version__,
        "commit": commit or os.environ.get("BESTRQ2_COMMIT") or _commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        sys.stdout.write(describe_machine(torch.device(kind)).describe() + "\n")
