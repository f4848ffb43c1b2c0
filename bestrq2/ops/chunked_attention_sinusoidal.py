"""Chunked attention with projected sinusoidal positions and no table: the position term as an inner product."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chunk_layouts import ChunkLayout
from .chunked_attention import chunked_attention
from .chunked_attention_cpu import MAX_HEAD_DIM

__all__ = ["chunked_attention_sinusoidal"]

# Period over the number of offsets, and how many frequencies lie beyond 1 rad per frame: sinusoids up to 1 rad are then
# reproduced to about 1e-8 with coefficients of about 1, so that rounding is not magnified.
_STRETCH, _BEYOND, _CUTOFF = 1.3, 8, 1e-9


def chunked_attention_sinusoidal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    projection: Tensor,
    chunk_size: int | None = None,
    left_context: int | None = None,
    right_context: int | None = 0,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offset: int = 0,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    scale: float | None = None,
    base: float = 10000.0,
    backend: str | None = None,
) -> Tensor:
    """:func:`chunked_attention` whose table is ``position[h, n] = projection[h] @ phi(n)``, with Transformer-XL's
    ``phi(n) = (sin n w_0, cos n w_0, sin n w_1, ...)``, ``w_m = base ** (-2 m / D)`` (Dai et al., 2019).

    By ``sin(i - j) = sin i cos j - cos i sin j`` the position term of query i and key j is an inner product of channels
    that depend on i alone and channels that depend on j alone, so it is appended to the one of query and key. Within a
    window all D / 2 frequencies are sums of the few that the window can tell apart: with W offsets, about
    1.3 W / pi + 17 channels replace D (an oversampled Fourier series; the idea of extra channels is that of FlashBias,
    arXiv:2505.12044). They reproduce the sinusoids to about 1e-8.

    It stores no (H, R, d) table and no band of scores, but query, key, value and output grow by these channels. On CPUs
    the table is faster (kernels/README.md has numbers), which is why ``ConformerEncoder`` uses the table. The series of
    a window is fitted outside of any graph: no ``torch.compile(fullgraph=True)``.

    Args:
        query, key, value: as for :func:`chunked_attention`.
        projection: (H, d, D), D even: the layer that turns sinusoids into positions, one matrix per head.
        chunk_size, left_context, right_context, lengths, starts, key_mask, query_offset: the same.
        content_bias, position_bias: (H, d).
        scale: default 1 / sqrt(d).
        base: of the frequencies.
        backend: the same. The compiled backends take head sizes up to 256, with the channels of the positions.

    Returns:
        (B, H, Tq, d). Differentiable in query, key, value, projection and biases.

    Raises:
        ValueError: for a projection of the wrong shape, and where the window has so many offsets that their channels
            exceed what a compiled backend takes; otherwise as :func:`chunked_attention`.
    """
    heads, head_dim = query.shape[1], query.shape[-1]
    if projection.dim() != 3 or projection.shape[:2] != (heads, head_dim) or projection.shape[2] % 2:
        raise ValueError(
            f"chunked_attention_sinusoidal: projection must be (H, d, D) = ({heads}, {head_dim}, even), got "
            f"{tuple(projection.shape)}"
        )
    window = ChunkLayout(chunk_size, left_context, right_context)
    lowest, highest = window.offsets(query.shape[2], key.shape[2], query_offset=query_offset)
    period, coefficients, _ = fourier_series(projection.shape[2], lowest, max(highest, lowest), base)
    channels = len(coefficients)
    if head_dim + channels > MAX_HEAD_DIM and backend != "reference":
        raise ValueError(
            f"chunked_attention_sinusoidal: {highest - lowest + 1} offsets need {channels} channels beside the "
            f"{head_dim} of a head, more than the {MAX_HEAD_DIM} of a compiled backend: use chunked_attention with a "
            "table, or a shorter window"
        )

    rows = torch.arange(query.shape[2], device=query.device) + query_offset
    with_position = query if position_bias is None else query + position_bias[:, None].to(query.dtype)
    # Padding may hold NaN, and the gradient of the projection sums over it.
    for bound, outside in ((lengths, torch.ge), (starts, torch.lt)):
        if bound is not None:
            with_position = with_position.masked_fill(outside(rows, bound[:, None])[:, None, :, None], 0)
    onto_series = projection @ torch.from_numpy(coefficients).to(projection).mT  # (H, d, channels)
    precise = torch.promote_types(query.dtype, torch.float32)
    series = (with_position @ onto_series.to(query.dtype)).to(precise)  # cosines, then sines
    cosine, sine = series.split((channels // 2 + 1, channels // 2), dim=-1)
    # cos(i - j) = cos i cos j + sin i sin j and sin(i - j) = sin i cos j - cos i sin j; frequency 0 has no sine.
    cos_i, sin_i = _turns(rows, period, channels // 2, precise)
    sine = torch.nn.functional.pad(sine, (1, 0))
    features = torch.cat((cosine * cos_i + sine * sin_i, (cosine * sin_i - sine * cos_i)[..., 1:]), dim=-1)
    columns = torch.arange(key.shape[2], device=key.device)
    cos_j, sin_j = _turns(columns, period, channels // 2, precise)
    key_features = torch.cat((cos_j, sin_j[:, 1:]), dim=-1).to(key.dtype).expand(*key.shape[:3], channels)

    content = query if content_bias is None else query + content_bias[:, None].to(query.dtype)
    options: dict[str, Any] = {"lengths": lengths, "starts": starts, "key_mask": key_mask, **window.window}
    out = chunked_attention(
        torch.cat((content, features.to(query.dtype)), dim=-1),
        torch.cat((key, key_features), dim=-1),
        torch.nn.functional.pad(value, (0, channels)),
        **options,
        query_offset=query_offset,
        backend=backend,
        scale=head_dim**-0.5 if scale is None else scale,
    )
    return out[..., :head_dim]


@lru_cache(maxsize=64)
def fourier_series(width: int, lowest: int, highest: int, base: float = 10000.0) -> tuple[int, np.ndarray, float]:
    """A period P and coefficients (channels, width) such that, for every integer n in [lowest, highest],

        phi(n) = sum over k >= 0 of coefficients[k] cos(2 pi k n / P) + those that follow, sin(2 pi k n / P) for k >= 1

    and the largest error of it. Least squares in float64, truncated so that coefficients stay small.
    """
    offsets = np.arange(lowest, highest + 1)
    frequencies = base ** (-np.arange(0, width, 2) / width)
    angles = offsets[:, None] * frequencies
    wanted = np.stack((np.sin(angles), np.cos(angles)), axis=-1).reshape(len(offsets), -1)
    period = int(np.ceil(_STRETCH * len(offsets)))
    count = min(int(np.ceil(period / (2 * np.pi))) + _BEYOND, (period - 1) // 2)
    turns = 2 * np.pi * (offsets[:, None] * np.arange(count + 1) % period) / period
    basis = np.concatenate((np.cos(turns), np.sin(turns[:, 1:])), axis=1)
    coefficients = np.linalg.lstsq(basis, wanted, rcond=_CUTOFF)[0]
    return period, coefficients, float(np.abs(basis @ coefficients - wanted).max())


def _turns(position: Tensor, period: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of ``2 pi k position / period`` for k = 0..count, (T, count + 1), at any position."""
    k = torch.arange(count + 1, device=position.device)
    angle = (position[:, None] % period * k % period).double() * (2 * torch.pi / period)
    return angle.cos().to(dtype), angle.sin().to(dtype)
