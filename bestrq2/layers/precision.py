"""Dtypes and devices: what follows the weights, and what stays exact whatever they are."""

import warnings

import torch
from torch import Tensor, nn

from bestrq2.errors import BestRQWarning


def default_device() -> torch.device:
    """Device of buffers that have values from the start: torch's default device, but never "meta"."""
    device = torch.get_default_device()
    return torch.device("cpu") if device.type == "meta" else device


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype of accurate arithmetic: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Floating dtype of ``module.weight``; float32 where the weight is quantized (torch.ao, bitsandbytes)."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return weight.dtype
    return torch.float32


def like_weight(x: Tensor, module: nn.Module) -> Tensor:
    """``x`` in the dtype of ``module.weight``, so that a bf16, fp16 or float64 module takes float32 input.

    Under autocast ``x`` is returned as it is: autocast chooses the dtype.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight_dtype(module))


def restore_float32(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Put back buffers that a conversion has made another dtype: only their device may change.

    Args:
        module: after ``nn.Module._apply``.
        before: its buffers by name, before that.
    """
    for name, buffer in before.items():
        now = module._buffers[name]
        if now is not None and now.dtype != torch.float32:
            module._buffers[name] = buffer.to(now.device)


LOUD = 64.0  # 36 dB above full scale
_looked_at: list[int] = []  # not empty: no more waveforms are looked at in this process


def warn_of_integers(waveform: Tensor) -> None:
    """Warn once of audio far above full scale: 16-bit samples that were made floating without a division.

    On other devices than the CPU it looks at the first waveform of a process alone, because a look waits for them.
    """
    if _looked_at or waveform.is_meta or not waveform.numel() or torch.compiler.is_compiling():
        return
    try:
        low, high = torch.aminmax(waveform.detach())
        peak = max(-float(low), float(high))
    except RuntimeError:  # under vmap, or of a tensor without values
        return
    if peak > LOUD:
        warnings.warn(
            f"the waveform has samples up to {peak:.0f}, where full scale is 1: divide samples of 16 bits by 2**15",
            category=BestRQWarning,
            stacklevel=3,
        )
    if peak > LOUD or waveform.device.type != "cpu":
        _looked_at.append(1)


def warn_of_half(waveform: Tensor) -> None:
    """Warn of audio in half precision, whose rounding is noise 50 dB (bf16) or 70 dB (fp16) below the signal."""
    if waveform.dtype in (torch.bfloat16, torch.float16):
        name = str(waveform.dtype).removeprefix("torch.")
        warnings.warn(
            f"the waveform is {name}: quiet sounds drown in its rounding, and features and target codes differ from "
            "those of the recording; pass float32 audio, also to a model in half precision",
            category=BestRQWarning,
            stacklevel=3,
        )
