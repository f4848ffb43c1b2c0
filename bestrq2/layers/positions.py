"""Positions on the (frequency, time) grid: fixed sin-cos vectors and rotary embedding."""

from typing import Literal, get_args

import torch
from torch import Tensor

from .precision import wide

PositionKind = Literal["sincos", "rope"]


def _bands(num: int, base: float, device: torch.device) -> Tensor:
    return base ** (-torch.arange(num, device=device, dtype=torch.float32) / num)


def sincos_2d(positions: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Fixed 2-D sin-cos position vectors, channels ``sin(f) | sin(t) | cos(f) | cos(t)`` (the layout of published
    BEST-RQ-2 checkpoints).

    Shapes: positions ``(..., 2)`` as (frequency row, time column) -> ``(..., dim)`` float32.

    Raises:
        ValueError: if ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    angles = positions[..., None].float() * _bands(dim // 4, temperature, positions.device)  # (..., 2, dim/4)
    return torch.cat((angles.sin().flatten(-2), angles.cos().flatten(-2)), dim=-1)


def rotary_angles(positions: Tensor, head_dim: int, rows: int, base: float = 10000.0) -> Tensor:
    """Rotation angles of each channel pair of a head (RoPE, Su et al. 2021).

    With one frequency row (strip patches) all pairs turn with time. With several, the first half of the pairs turns
    with the frequency row and the second with time.

    Shapes: positions ``(..., 2)`` -> ``(..., head_dim / 2)`` float32 radians.

    Raises:
        ValueError: if ``head_dim`` is odd, or not a multiple of 4 on a two-dimensional grid.
    """
    if head_dim % (2 if rows == 1 else 4):
        raise ValueError(f"rotary positions need a head width divisible by {2 if rows == 1 else 4}, got {head_dim}")
    if rows == 1:
        return positions[..., 1:].float() * _bands(head_dim // 2, base, positions.device)
    bands = _bands(head_dim // 4, base, positions.device)
    return (positions[..., None].float() * bands).flatten(-2)


def check_positions(kind: PositionKind, width: int, head_dim: int, rows: int) -> None:
    """Raise a :class:`ValueError` for an unknown kind, or a width of tokens or heads that it cannot take."""
    if kind not in get_args(PositionKind):
        raise ValueError(f"position must be one of {get_args(PositionKind)}, got {kind!r}")
    place = torch.zeros(1, 2, dtype=torch.int64, device="cpu")
    if kind == "sincos":
        sincos_2d(place, width)
    else:
        rotary_angles(place, head_dim, rows)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of ``x`` by ``angles``.

    Shapes: x ``(B, H, N, d)``, angles ``(B or 1, N, d / 2)`` -> like x, in x's dtype (arithmetic in fp32 or float64).
    """
    return turn(x, angles.cos(), angles.sin())


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """:func:`rotate` with cosines and sines that are already there: they are the same in every block."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = wide(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def published_short_clip_positions(positions: Tensor, columns: int, published_columns: int = 16) -> Tensor:
    """The positions that the published inference code gives to clips shorter than it was trained on (a fault kept only
    to reproduce old checkpoints' numbers).

    It takes the first N rows of the position table of the full grid, whose order is frequency-major with
    ``published_columns`` columns, for the tokens of a grid with fewer columns.

    Shapes: positions ``(N, 2)`` -> ``(N, 2)``.

    Raises:
        ValueError: if the clip has more columns than the published table, where that code fails.
    """
    if columns > published_columns:
        raise ValueError(f"published_positions reaches {published_columns} time columns, got {columns}")
    token = positions[:, 0] * columns + positions[:, 1]
    return torch.stack((token // published_columns, token % published_columns), dim=-1)
