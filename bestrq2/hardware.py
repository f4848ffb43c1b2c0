"""Device, precision, memory, and the matrix-product rate that utilisation is measured against."""

import ctypes
import sys
import time
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from bestrq2.errors import ConfigError, OutOfMemory

# Dense bf16 peaks in FLOP/s from the vendors' data sheets, by a part of the device name.
GPU_PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10": 125e12,
    "L4": 121e12,
}

APPLE = "mps"  # Apple's GPUs, which have no float64: see ops.common.devices


def choose_device(name: str, local_rank: int = 0, option: str = "train.device") -> torch.device:
    """``"auto"`` (a GPU if there is one, CUDA's or Apple's) or a torch device name; the GPU of this rank of several.

    ``option`` is what the user gave the name to, for the message.

    Raises:
        ConfigError: for an unknown or absent device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank % torch.cuda.device_count())
        return torch.device(APPLE if torch.backends.mps.is_available() else "cpu")
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = f"{str(error).splitlines()[0]}; expected auto, cpu, cuda, cuda:N or mps"
        raise ConfigError(f"{option}: {name!r} cannot be used: {why}") from error
    return device


def device_of(module: nn.Module) -> torch.device:
    """Device of the weights of a module, of its buffers if it has none, else the CPU."""
    return next((t.device for t in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def has_fast_bf16(device: torch.device) -> bool:
    """Return True if bf16 matrix products run in hardware (on a CPU: AVX-512 BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def multiplies_in_hardware(device: torch.device, dtype: torch.dtype | None) -> bool:
    """Return True unless matrix products in this dtype (None: fp32) are imitated in fp32, as on older processors."""
    if dtype == torch.float16 and device.type == "cpu":
        return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)()
    return dtype != torch.bfloat16 or device.type == "mps" or has_fast_bf16(device)


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None for plain fp32.

    Raises:
        ConfigError: for bf16 on a GPU without it.
    """
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"train.precision: bf16 is not supported by {torch.cuda.get_device_name(device)}")
    if name == "fp16":
        return torch.float16
    if name == "bf16" or (name == "auto" and has_fast_bf16(device)):
        return torch.bfloat16
    return None


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    A training step frees as much as it allocates. Given back to the system and asked for again, memory costs a page
    fault for every 4 KiB: about a tenth of a step. The most that is ever used does not change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, another system
        return
    trim_threshold, mmap_threshold = -1, -3
    mallopt(mmap_threshold, 32 * 2**20)  # the largest value that glibc takes
    mallopt(trim_threshold, 2**31 - 1)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads != 1)}"


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> tuple[float, str]:
    """FLOP/s that 100 % utilisation (MFU) means here, and where the number comes from.

    A known GPU's data sheet, else the best of several matrix products of this process, which takes about half a second
    the first time. They are fp32 products where those of ``dtype`` are imitated.
    """
    return _peak_flops(device, dtype if multiplies_in_hardware(device, dtype) else None, torch.get_num_threads())


@cache
def _peak_flops(device: torch.device, dtype: torch.dtype | None, threads: int) -> tuple[float, str]:
    if device.type == "cuda" and dtype is not None:
        name = torch.cuda.get_device_name(device)
        for part, peak in GPU_PEAKS.items():
            if part in name:
                return peak, f"{part} data sheet, dense bf16"
    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype or torch.float32)
    best = 0.0
    deadline = time.perf_counter() + 0.4
    while best == 0.0 or time.perf_counter() < deadline:
        start = time.perf_counter()
        b = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
        del b
    return best, f"measured {str(a.dtype).removeprefix('torch.')} matrix product"


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in MiB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return (peak_resident_bytes() or 0) / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that an allocation failed, on a GPU or on the CPU.

    The libraries of CUDA have messages of their own: CUBLAS_STATUS_ALLOC_FAILED, CUFFT_ALLOC_FAILED and so on.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    texts = ("defaultcpuallocator", "out of memory", "alloc_failed", "allocation_failed")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def out_of_memory(
    error: BaseException, model: nn.Module, device: torch.device, clips: int, seconds: float
) -> OutOfMemory:
    """The numbers, and what to change."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = ""
    if device.type == "cuda":
        total = f" of {torch.cuda.get_device_properties(device).total_memory / 2**20:.0f} MiB"
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return OutOfMemory(
        f"out of memory on {device}: {clips} clips of up to {seconds:.1f} s in one pass; weights, gradients and "
        f"optimizer take {16 * trained / 2**20:.0f} MiB, the peak was {peak_memory(device):.0f} MiB{total}. Split the "
        "batch (train.accumulate=2 or more: the update stays the same), or set model.encoder.activation_checkpointing="
        "true, train.precision=bf16, a smaller train.batch_size or data.crop_seconds, or on several GPUs "
        f"train.strategy=fsdp; --find-batch shows what fits. ({first})"
    )


def peak_resident_bytes() -> int | None:
    """Peak resident set of this process, or None where the system does not tell."""
    try:
        # Unlike getrusage, this is not inherited from the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak memory so far in GiB: ``memory_gib`` resident in this process (its data workers not counted) and on a GPU
    ``cuda_memory_gib`` allocated by torch."""
    found = {}
    if (peak := peak_resident_bytes()) is not None:
        found["memory_gib"] = peak / 2**30
    if device.type == "cuda":
        found["cuda_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
