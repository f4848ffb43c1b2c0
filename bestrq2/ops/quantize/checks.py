"""Argument checks of ``quantize``."""

import torch
from torch import Tensor

from ..common.shapes import check_devices, check_shapes

NORMALIZE = ("none", "layer_norm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def validate(x: Tensor, projection: Tensor, codebook: Tensor, normalize: str, mask: Tensor | None) -> None:
    """Raise ValueError for what no backend accepts; looks at no value of a tensor."""
    op = "quantize"
    if normalize not in NORMALIZE:
        raise ValueError(f"{op}: normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    check_shapes(
        op, x=(x, "... D"), projection=(projection, "G? D d"), codebook=(codebook, "G? V d"), mask=(mask, "...")
    )
    if min(*projection.shape, *codebook.shape) < 1:
        given = f"projection {tuple(projection.shape)}, codebook {tuple(codebook.shape)}"
        raise ValueError(f"{op}: projection and codebook must not be empty, got {given}")
    for name, tensor in (("x", x), ("projection", projection), ("codebook", codebook)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool, got {mask.dtype}")
    check_devices(op, x=x, projection=projection, codebook=codebook, mask=mask)


def num_codebooks(projection: Tensor, codebook: Tensor) -> int | None:
    """Number of codebooks G, or None when the codes have no codebook axis."""
    if projection.dim() == 3:
        return projection.shape[0]
    return codebook.shape[0] if codebook.dim() == 3 else None
