"""The fused log-mel kernels as one registered operator: C++ on CPUs, cuFFT between two Triton kernels on NVIDIA GPUs.

Both compute in float64 what :class:`~bestrq2.layers.LogMel` defines in plain PyTorch and round once, to float32
decibels: the same frames but for a last bit, in a fraction of the time (docs/log.md). There is no gradient; a waveform
that requires one takes the PyTorch form, and so does forward-mode differentiation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bestrq2.ops.common import native
from bestrq2.ops.common.compiler import constant_when_compiled
from bestrq2.ops.common.dispatch import forced_backend
from bestrq2.ops.common.library import fragment

from .log_mel_tables import Tables, passes, tables

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # exact in float32


class Settings(NamedTuple):
    """Parameters that the tables of a front end depend on."""

    n_fft: int
    win_length: int
    num_mels: int
    sampling_rate: int
    f_min: float
    f_max: float


def log_mel_obstacle(waveform: Tensor, device: torch.device, settings: Settings) -> str | None:
    """Reason why the fused kernels cannot compute these frames on ``device``, the front end's, or None.

    The PyTorch form computes what they cannot.
    """
    if forced_backend() == "reference":
        return "the reference backend is asked for"
    if waveform.dtype not in DTYPES:
        return f"they read fp32, bf16 and fp16, got {waveform.dtype}"
    if waveform.requires_grad and torch.is_grad_enabled():
        return "they have no gradient"
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        return "they have no forward-mode derivative"
    if settings.n_fft % 2 or passes(settings.n_fft // 2) is None:
        return f"their FFT needs an even size whose half has no other factors than 2, 3 and 5, got {settings.n_fft}"
    if waveform.device != device:
        return f"the waveform is on {waveform.device}, the front end on {device}"
    return _machine_obstacle(device.type)


@constant_when_compiled
def _machine_obstacle(device_type: str) -> str | None:
    if device_type == "cpu":
        return native.extension_obstacle()
    if device_type == "cuda":
        return native.triton_obstacle(torch.device("cuda"))
    return f"there are none for {device_type!r}"


def fused_log_mel(
    waveform: Tensor,
    lengths: Tensor,
    counts: Tensor,
    num_frames: int,
    centred: bool,
    hop_length: int,
    mean: Tensor,
    std: Tensor,
    settings: Settings,
) -> Tensor:
    """Standardised log-mel frames.

    Args:
        waveform: ``(B, S)`` fp32, bf16 or fp16.
        lengths, counts: ``(B,)`` int64 on the CPU: samples and frames of each clip. Other frames become zero.
        num_frames: T.
        centred: frame t is centred at sample ``t * hop_length``, with reflected edges; otherwise it begins there.
        mean, std: ``(F,)`` fp32 on the device of the waveform.

    Returns:
        ``(B, T, F)`` float32.
    """
    return torch.ops.bestrq2.log_mel.default(
        waveform.detach(), lengths, counts, num_frames, centred, hop_length, mean, std, *settings
    )


_library = fragment()
_library.define(
    "log_mel(Tensor waveform, Tensor lengths, Tensor counts, SymInt num_frames, bool centred, int hop_length, "
    "Tensor mean, Tensor std, int n_fft, int win_length, int num_mels, int sampling_rate, float f_min, float f_max) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("bestrq2::log_mel", "CompositeExplicitAutograd", lib=_library)
def _run(
    waveform: Tensor,
    lengths: Tensor,
    counts: Tensor,
    num_frames: int,
    centred: bool,
    hop_length: int,
    mean: Tensor,
    std: Tensor,
    *settings: int | float,
) -> Tensor:
    constants = tables(*Settings(*settings))  # type: ignore[arg-type]
    if constants is None:
        raise ValueError(f"log_mel: no FFT of {settings[0]} points")
    n_fft, win_length = int(settings[0]), int(settings[1])
    begin = (n_fft - win_length) // 2 - (n_fft // 2 if centred else 0)  # where the window of frame 0 starts
    waveform = waveform.float()
    if waveform.stride(1) != 1:
        waveform = waveform.contiguous()
    if waveform.device.type == "cuda" or native.triton_interpreted():
        from bestrq2.kernels import log_mel as kernel

        device = waveform.device
        return kernel.log_mel(
            waveform,
            lengths.to(device, non_blocking=True),
            counts.to(device, non_blocking=True),
            num_frames,
            begin,
            hop_length,
            n_fft,
            *constants.on(device, kernel.TILE.bands, kernel.TILE.bins),
            mean,
            std,
        )
    return _run_cpu(waveform, lengths, counts, num_frames, begin, hop_length, n_fft, mean, std, constants)


def _run_cpu(
    waveform: Tensor,
    lengths: Tensor,
    counts: Tensor,
    num_frames: int,
    begin: int,
    hop_length: int,
    n_fft: int,
    mean: Tensor,
    std: Tensor,
    constants: Tables,
) -> Tensor:
    mean, std = mean.contiguous(), std.contiguous()
    lengths, counts = lengths.contiguous(), counts.contiguous()
    out = torch.empty(waveform.shape[0], num_frames, len(mean), dtype=torch.float32, device="cpu")
    addresses = {
        "waveform": waveform,
        "lengths": lengths,
        "counts": counts,
        "window": constants.window,
        "radices": constants.radices,
        "twiddles": constants.twiddles,
        "places": constants.places,
        "half_turns": constants.half_turns,
        "bins": constants.bins,
        "offsets": constants.offsets,
        "weights": constants.weights,
        "mean": mean,
        "std": std,
        "out": out,
    }
    native.extension().log_mel(
        {name: tensor.data_ptr() for name, tensor in addresses.items()}
        | {
            "clips": waveform.shape[0],
            "stride": waveform.stride(0),
            "begin": begin,
            "hop": hop_length,
            "size": n_fft,
            "window_length": len(constants.window),
            "passes": len(constants.radices),
            "bands": len(mean),
            "frames": num_frames,
            "threads": torch.get_num_threads(),
        }
    )
    return out


@torch.library.register_fake("bestrq2::log_mel", lib=_library)
def _fake(
    waveform: Tensor,
    lengths: Tensor,
    counts: Tensor,
    num_frames: int,
    centred: bool,
    hop_length: int,
    mean: Tensor,
    std: Tensor,
    *settings: int | float,
) -> Tensor:
    return waveform.new_empty((waveform.shape[0], num_frames, mean.shape[0]), dtype=torch.float32)
