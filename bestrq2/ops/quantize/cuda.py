"""CUDA C++ backend of ``quantize`` (csrc/quantize/quantize.cu)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common import native
from .checks import num_codebooks
from .cpu import addresses


def obstacle(x: Tensor, codebook: Tensor) -> str | None:
    """Reason why the CUDA kernel cannot take these rows and codes, or None."""
    if x.device.type != "cuda":
        return f"it needs CUDA tensors, got {x.device.type!r}"
    if x.dtype == torch.float64:
        return "it computes in fp32 and x is fp64"
    reason = native.extension_obstacle(cuda=True)
    if reason is None and codebook.shape[-1] > native.extension().quantize_cuda_dims:
        return f"it takes codes of at most {native.extension().quantize_cuda_dims} dimensions, got {codebook.shape[-1]}"
    return reason


def run(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str) -> Tensor:
    """Queue the kernel on the current stream of the device of ``x``."""
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        return run_kernel(native.extension().quantize_cuda, x, projection, codebook, mask, normalize, stream)


def run_kernel(
    kernel: Callable[[dict[str, Any]], None],
    x: Tensor,
    projection: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    normalize: str,
    stream: int,
) -> Tensor:
    """Call ``_C.quantize_cuda``, or ``_C.quantize_cuda_emulated``: the same arithmetic on CPU tensors, for tests."""
    books = num_codebooks(projection, codebook)
    projection, codebook = projection.float().contiguous(), codebook.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(len(rows), books or 1, dtype=torch.int64, device=x.device)
    # Bounds of the kernel's errors come from these; the factor covers their own rounding.
    norm = torch.linalg.vector_norm(projection.reshape(-1, *projection.shape[-2:]), dim=(1, 2)) * 1.001
    reach = torch.linalg.vector_norm(codebook.reshape(-1, *codebook.shape[-2:]), dim=2).amax(1) * 1.001
    sizes = {"projection_norm": norm.data_ptr(), "reach": reach.data_ptr()}
    kernel({**addresses(rows, projection, codebook, mask, normalize, codes), **sizes, "stream": stream})
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))
