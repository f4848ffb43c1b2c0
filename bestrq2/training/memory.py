"""What training needs of memory, and what to say when it is not there."""

import torch
from torch import nn

from .errors import OutOfMemory
from .metrics_log import peak_resident_bytes


def peak_memory(device: torch.device) -> float:
    """Largest memory so far in MiB: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return (peak_resident_bytes() or 0) / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on the CPU."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text.lower())
    )


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
