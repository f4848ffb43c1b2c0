"""CPU backend of ``quantize``: hands addresses and sizes to the C++ kernels (csrc/quantize/)."""

from typing import Any

import torch
from torch import Tensor

from ..common import native
from .checks import num_codebooks
from .reference import not_finite


def obstacle(x: Tensor) -> str | None:
    """Reason why the C++ kernels cannot take these rows, or None."""
    if x.device.type != "cpu":
        return f"it needs CPU tensors, got {x.device.type!r}"
    return native.extension_obstacle()


def run(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str) -> Tensor:
    books = num_codebooks(projection, codebook)
    projection = projection.double().contiguous()  # products and sums of the projection are done in float64
    codebook = codebook.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(len(rows), books or 1, dtype=torch.int64, device="cpu")
    arguments = addresses(rows, projection, codebook, mask, normalize, codes)
    bad = native.extension().quantize({**arguments, "threads": torch.get_num_threads()})
    if bad >= 0:
        raise ValueError(not_finite(x, bad))
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))


def addresses(
    rows: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str, codes: Tensor
) -> dict[str, Any]:
    """Arguments that the C++ and CUDA kernels share; the caller keeps the tensors alive."""
    return {
        "x": rows.data_ptr(),
        "x_type": str(rows.dtype).removeprefix("torch."),
        "rows": rows.shape[0],
        "features": rows.shape[1],
        "row_stride": rows.stride(0),
        "feature_stride": rows.stride(1),
        "mask": 0 if mask is None else mask.data_ptr(),
        "projection": projection.data_ptr(),
        "shared_projection": projection.dim() == 2,
        "codebook": codebook.data_ptr(),
        "shared_codebook": codebook.dim() == 2,
        "num_codebooks": codes.shape[1],
        "codebook_size": codebook.shape[-2],
        "codebook_dim": codebook.shape[-1],
        "layer_norm": normalize == "layer_norm",
        "out": codes.data_ptr(),
    }
