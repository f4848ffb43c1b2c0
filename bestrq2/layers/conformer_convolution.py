"""The convolution module of a Conformer, whose kernel can be kept from looking ahead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import wide

ConvMode = Literal["full", "causal", "chunk"]
ConvNorm = Literal["layer_norm", "batch_norm"]


def past_frames(kernel_size: int, mode: ConvMode) -> int:
    """Frames before a segment that its convolution reads: what streaming has to keep."""
    return kernel_size - 1 if mode == "causal" else kernel_size // 2


def depthwise_convolution(
    x: Tensor,
    layer: nn.Module,
    kernel: int,
    mode: ConvMode,
    chunk_size: int | None,
    past: Tensor | None = None,
) -> Tensor:
    """Convolve every channel along time, reading no frame that ``mode`` forbids.

    Kernel 5, chunks of 4; the inputs (x) of two outputs:

        input           0 1 2 3 | 4 5 6 7
        full,   out 3     x x x   x x        centred, looks ahead
        causal, out 3   (past) x x x x       ends at its own frame      [kernel - 1 frames of past]
        chunk,  out 3     x x x | 0 0        centred, zeros beyond the end of its own chunk
        chunk,  out 5         x | x x x x    the past is read across the border    [kernel // 2 frames of past]

    Args:
        x: ``(B, T, D)``; padded or absent frames must be zero already. Chunks are counted from its first frame.
        layer: ``nn.Conv1d``, depthwise, without padding, or a module in its place.
        kernel: its size K, odd.
        mode: see above.
        chunk_size: frames per chunk, for "chunk"; None is one chunk, that is "full".
        past: ``(B, past_frames(K, mode), D)``, the frames before x; None: zeros.

    Returns:
        ``(B, T, D)``.
    """
    num_clips, num_frames, width = x.shape
    left = past_frames(kernel, mode)
    past = x.new_zeros(num_clips, left, width) if past is None else past.to(x.dtype)
    x = torch.cat((past, x), dim=1)
    ahead = kernel - 1 - left
    if mode != "chunk" or chunk_size is None or chunk_size >= num_frames:
        return layer(F.pad(x.transpose(1, 2), (0, ahead))).transpose(1, 2)
    num_chunks = -(-num_frames // chunk_size)
    x = F.pad(x, (0, 0, 0, num_chunks * chunk_size - num_frames))
    pieces = x.unfold(1, left + chunk_size, chunk_size)  # (B, chunks, D, left + chunk)
    pieces = F.pad(pieces.reshape(-1, width, left + chunk_size), (0, ahead))
    out = layer(pieces)
    return out.unflatten(0, (num_clips, num_chunks)).transpose(2, 3).flatten(1, 2)[:, :num_frames]


class MaskedBatchNorm(nn.Module):
    """Batch norm over ``(B, N, D)`` whose statistics leave out padding. Evaluation uses the running statistics.

    It is none of PyTorch's classes: ``torch.optim.swa_utils.update_bn`` passes it by, as its passes without lengths
    would count padding, and so does ``SyncBatchNorm.convert_sync_batchnorm``. For averaged weights use
    ``AveragedModel(..., use_buffers=True)``, or let the statistics settle in passes of training mode.

    Attributes:
        repeated: of all of them, True while the backward pass repeats a forward pass that they have counted.
    """

    running_mean: Tensor
    running_var: Tensor
    repeated: ClassVar[bool] = False

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros_like(self.bias.detach()))
        self.register_buffer("running_var", torch.ones_like(self.weight.detach()))

    def reset_parameters(self) -> None:
        """Begin anew, as after construction; named as in PyTorch's own layers."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        values = wide(x)
        if self.training:
            inside = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device) if valid is None else valid.float()
            count = inside.sum().clamp(min=1.0)
            mean = (values * inside[..., None]).sum((0, 1)) / count
            var = ((values - mean).square() * inside[..., None]).sum((0, 1)) / count
            if not self.repeated:
                self._count(mean, var, count)
        else:
            mean, var = self.running_mean, self.running_var
        scaled = (values - mean) * (var + self.eps).rsqrt() * self.weight + self.bias
        return scaled.to(x.dtype)

    @torch.no_grad()
    def _count(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        unbiased = var * count / (count - 1).clamp(min=1.0)
        finite = unbiased.sum().isfinite()  # a step that overflows is skipped, and must leave no trace here
        for running, found in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(torch.where(finite, found.to(running.dtype), running), self.momentum)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, momentum={self.momentum}, eps={self.eps}"


@contextmanager
def repeated_forward() -> Iterator[None]:
    """Context of a forward pass that activation checkpointing repeats."""
    before, MaskedBatchNorm.repeated = MaskedBatchNorm.repeated, True
    try:
        yield
    finally:
        MaskedBatchNorm.repeated = before


def check_convolution(kernel_size: int, mode: str, norm: str) -> None:
    """Raise ValueError for settings that make no convolution module."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if mode not in get_args(ConvMode):
        raise ValueError(f"conv_mode must be one of {get_args(ConvMode)}, got {mode!r}")
    if norm not in get_args(ConvNorm):
        raise ValueError(f"conv_norm must be one of {get_args(ConvNorm)}, got {norm!r}")
