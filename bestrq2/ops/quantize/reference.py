"""Specification of ``bestrq2.ops.quantize``: the nearest code on the unit sphere, in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-5
TIE = 2.0**-46
"""Cosines closer than this are a tie: the rounding of float64 must not choose between equal codes."""
SMALLEST = 2.0**-1074
"""The smallest positive float64: what a row of zeros is divided by."""
CHUNK = 2**21
"""Scores held at once (16 MiB of float64), whatever the number of rows."""


def quantize(
    x: Tensor, projection: Tensor, codebook: Tensor, *, normalize: str = "none", mask: Tensor | None = None
) -> Tensor:
    """Return ``argmax_v <y, c_v>`` with ``y = normalize(x) @ projection``; see :func:`bestrq2.ops.quantize`.

    Everything is computed in float64 and in chunks of rows, so a row's code depends on nothing but the row.
    """
    squeeze = projection.dim() == 2 and codebook.dim() == 2
    books = max(t.shape[0] if t.dim() == 3 else 1 for t in (projection, codebook))
    projection = projection.detach().double().expand(books, *projection.shape[-2:])
    codebook = codebook.detach().double().expand(books, *codebook.shape[-2:])
    if not (torch.isfinite(projection).all() and torch.isfinite(codebook).all()):
        raise ValueError("quantize: projection and codebook must be finite")

    rows = x.detach().reshape(-1, x.shape[-1])
    selected = torch.arange(len(rows), device=x.device) if mask is None else mask.reshape(-1).nonzero().squeeze(1)
    codes = torch.full((len(rows), books), -1, dtype=torch.int64, device=x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for index in selected.split(max(1, CHUNK // max(codebook.shape[1], x.shape[-1]))):
            chunk = rows[index].double()
            finite = torch.isfinite(chunk).all(dim=1)
            if not finite.all():
                raise ValueError(not_finite(x, int(index[~finite][0])))
            # No code depends on a row's size, which may be such that its sums or squares leave the range of float64.
            chunk = chunk / chunk.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
            if normalize == "layer_norm":
                chunk = F.layer_norm(chunk, chunk.shape[-1:], eps=LAYER_NORM_EPS)
            for book in range(books):
                y = chunk @ projection[book]
                y = y / y.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST)
                cosines = F.normalize(y, dim=1) @ codebook[book].T
                tie = TIE * codebook[book].norm(dim=1).amax()
                best = cosines.amax(dim=1, keepdim=True)
                codes[index, book] = (cosines >= best - tie).byte().argmax(dim=1)  # the first of the best
    shape = x.shape[:-1] if squeeze else (*x.shape[:-1], books)
    return codes.reshape(shape)


def not_finite(x: Tensor, row: int) -> str:
    """Message about the flat row ``row`` of ``x`` (..., D) that holds NaN or inf, with its index in ``x``."""
    index = []
    for size in reversed(x.shape[:-1]):
        row, rest = divmod(row, size)
        index.append(rest)
    which = f"x[{', '.join(map(str, reversed(index)))}]" if index else "x"
    return f"quantize: {which} contains NaN or inf (x has shape {tuple(x.shape)})"
