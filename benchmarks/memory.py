"""Peak memory of one call, above its inputs and results.

GPU: the high-water mark of torch's allocator (what torch.cuda.max_memory_allocated sees; memory that a library takes
from the driver by itself is not in it).

CPU: the kernel's high-water mark of resident memory, reset just before the call (``/proc/self/clear_refs``, value 5),
in a process of its own where glibc serves every block of 64 KiB and more by mmap and gives freed memory back at once,
and where MKL keeps no buffers between calls. So neither memory that an earlier call left in the heap hides an
allocation, nor do these settings slow down the timed process. A call is measured warm (second call): code pages and
compilation are not in it. Resolution: about half a megabyte (the kernel counts pages per core in batches). Linux with
glibc only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.common import Case, Provider, Skip, evaluate, first, load_operation

ROOT = Path(__file__).resolve().parent.parent
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # mallopt's parameter numbers in glibc's malloc.h


class Failed(Exception):
    """A provider raised or died; the text is the short reason shown in its row."""


def obstacle() -> str | None:
    """Reason why resident memory cannot be measured on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "peak memory needs Linux"
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return "peak memory needs glibc"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        return f"peak memory needs a writable /proc/self/clear_refs: {error}"
    return None


def return_freed_memory() -> None:
    """Make glibc map every large block separately and give it back when freed. Slows allocation: not for timings."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((_MMAP_THRESHOLD, 65536), (_TRIM_THRESHOLD, 65536), (_TOP_PAD, 0)):
        if libc.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) failed")


class ResidentPeak:
    """High-water mark of resident memory above what was resident at construction.

    Call :func:`return_freed_memory` once in the process before.
    """

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        return _status_bytes("VmHWM") - self.before


class CudaPeak:
    """The same for what torch's allocator has handed out."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak_bytes(case: Case, call: Callable[[], Any]) -> int:
    """Room that a prepared and warm ``call`` with its backward needs beyond inputs, output and gradients.

    That is the peak of forward and backward together less the bytes of output and gradients, which every way of
    computing them has to hold in the end; whether it fills a gradient early, as some forwards do, makes no difference.
    """

    def size(tensors: Iterable[Any]) -> int:
        return sum(value.numel() * value.element_size() for value in tensors if isinstance(value, torch.Tensor))

    peak = CudaPeak() if case.device.type == "cuda" else ResidentPeak()
    output = call()
    gradients = case.backward(first(output)) if case.differentiable else ()
    reached = peak.bytes()
    return max(0, reached - size(output if isinstance(output, (tuple, list)) else (output,)) - size(gradients))


class Worker:
    """A second process that runs providers once for their peak memory; restarted when a provider kills it.

    It is the first in the kernel's line when memory runs out and may use 85 % of what is available, so a provider that
    needs more fails in its own row and nowhere else.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.process: subprocess.Popen[str] | None = None

    def peak_bytes(self, module: str, case: Case, provider: Provider) -> int:
        """Peak memory of ``provider`` (by name, of ``benchmarks.ops.<module>``) on the same case, built anew there.

        Raises:
            Skip: if the provider does not apply.
            Failed: if it raised, ran out of memory or died.
        """
        if self.process is None:
            self._start()
        assert self.process is not None
        dtype = str(case.dtype).removeprefix("torch.")
        requests, answers = self._pipes()
        try:
            print(json.dumps([module, case.shape, dtype, provider.name]), file=requests, flush=True)
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self.close()
            killed = code == -signal.SIGKILL
            raise Failed("out of memory (killed)" if killed else f"the process died with exit status {code}")
        kind, value = json.loads(answer)
        if kind == "skipped":
            raise Skip(value)
        if kind == "failed":
            raise Failed(value)
        return value

    def _start(self) -> None:
        environment = os.environ | {
            "MKL_DISABLE_FAST_MM": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory", str(self.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what peers print and compilers warn about
            text=True,
            env=environment,
        )

    def close(self) -> None:
        if self.process is not None:
            requests, answers = self._pipes()
            with suppress(BrokenPipeError):
                requests.close()
            self.process.wait()
            answers.close()
            self.process = None

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout


def short_reason(error: BaseException) -> str:
    """One line for the table: the exception's first line, and plain words where memory ran out."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:200]


def _answer(request: list[str], cases: dict[tuple[str, ...], Case]) -> tuple[str, Any]:
    module, shape, dtype, name = request
    operation = load_operation(module)
    key = (module, shape, dtype)
    try:
        if key not in cases:
            cases.clear()
            torch.compiler.reset()
            cases[key] = operation.make_case(shape, getattr(torch, dtype), torch.device("cpu"))
        case = cases[key]
        call = next(provider for provider in operation.PROVIDERS if provider.name == name).prepare(case)
        evaluate(case, call)
        return "ok", peak_bytes(case, call)
    except Skip as reason:
        return "skipped", str(reason)
    except Exception as error:
        return "failed", short_reason(error)


def _serve(threads: int) -> None:
    """Answer one JSON request a line. Whatever a provider prints goes to stderr, out of the way of the answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Path("/proc/self/oom_score_adj").write_text("1000")
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (int(0.85 * available), resource.RLIM_INFINITY))
    torch.set_num_threads(threads)
    return_freed_memory()
    cases: dict[tuple[str, ...], Case] = {}
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), cases)), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
