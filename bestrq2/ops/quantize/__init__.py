"""Random projection and nearest code, exact in fp32, without ever storing the (rows, codes) scores."""

from typing import Literal

import torch
from torch import Tensor

from ..common.arguments import require_tensors
from ..common.dispatch import Backend, requested
from . import operator  # noqa: F401  (registers torch.ops.bestrq2.quantize)
from .checks import validate

__all__ = ["check_codes", "quantize"]


def quantize(
    x: Tensor,
    projection: Tensor,
    codebook: Tensor,
    *,
    normalize: Literal["none", "layer_norm"] = "none",
    mask: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Return the index of the code nearest to each projected row: the targets of BEST-RQ (Chiu et al., 2022).

    ``code = argmax_v <y, c_v>`` with ``y = norm(x) @ projection``. With unit codes this is the code of the largest
    cosine, which is also the nearest one in Euclidean distance after both sides are normalised; the norm of ``y`` does
    not matter and is never divided by.

    Always exact in fp32, also inside autocast: the code equals the float64 argmax except where the two best cosines
    differ by less than 2^-21, for finite rows of any size. Ties go to the lowest index, a row whose projection is zero
    gets code 0, and a row's code does not depend on the other rows of the batch. Memory is linear in the rows. Not
    differentiable.

    Args:
        x: (..., D) rows in fp32, bf16, fp16 or fp64, of any strides.
        projection: (D, d), or (G, D, d) for G codebooks, floating.
        codebook: (V, d), or (G, V, d), floating; unit rows. One of the two may have two dimensions: it is then shared
            by all G. The compiled backends read it in fp32.
        normalize: what is done to a row before the projection: ``"none"`` or ``"layer_norm"`` (no affine, eps 1e-5).
        mask: (...) bool, the rows to quantize; the others get -1 and are never read. None selects every row.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"``, ``"reference"``; None chooses the first that can run the call.

    Returns:
        int64 codes (...), or (..., G) if ``projection`` or ``codebook`` has three dimensions.

    Raises:
        TypeError: for what is no tensor.
        ValueError: for wrong shapes, dtypes or devices; on the reference and CPU backends also for NaN or inf in a
            selected row, naming the first one. GPU backends do not wait for the result: such a row gets code -1, and
            :func:`check_codes` finds it.
        RuntimeError: if the requested backend cannot run the call.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> projection = torch.randn(80, 16, generator=generator)
        >>> codebook = torch.nn.functional.normalize(torch.randn(512, 16, generator=generator), dim=-1)
        >>> quantize(torch.randn(2, 100, 80, generator=generator), projection, codebook).shape
        torch.Size([2, 100])
    """
    require_tensors("quantize", {"x": x, "projection": projection, "codebook": codebook}, {"mask": mask})
    validate(x, projection, codebook, normalize, mask)
    return torch.ops.bestrq2.quantize.default(
        x.detach(), projection.detach(), codebook.detach(), mask, normalize, requested(backend)
    )


def check_codes(codes: Tensor, mask: Tensor | None = None) -> None:
    """Raise ValueError if a row that should have a code has none (-1).

    The GPU backends of :func:`quantize` mark a row that contains NaN or inf with code -1 instead of stopping the queue.
    Call this where waiting for the device is acceptable, for example at the logging interval.

    Args:
        codes: (...) or (..., G) codes of :func:`quantize`.
        mask: the ``mask`` (...) that was given to :func:`quantize`.
    """
    require_tensors("check_codes", {"codes": codes}, {"mask": mask})
    bad = codes < 0
    if mask is not None:
        bad = bad & (mask if mask.dim() == codes.dim() else mask.unsqueeze(-1))
    if bad.any():
        first = ", ".join(map(str, bad.nonzero()[0].tolist()))
        where = f" at ({first})" if first else ""
        raise ValueError(
            f"quantize gave no code{where} ({int(bad.sum())} of {codes.numel()}): its row of x has NaN or inf"
        )
