"""The operator ``torch.ops.bestrq2.quantize``: choice of the backend, and shapes for tracing."""

import torch
from torch import Tensor

from ..common import native
from ..common.devices import has_float64
from ..common.dispatch import choose_backend
from ..common.library import fragment
from . import cpu, cuda, reference
from .checks import num_codebooks

TRITON_MAX_DIMS = 64

_library = fragment()
_library.define(
    "quantize(Tensor x, Tensor projection, Tensor codebook, Tensor? mask, str normalize, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("bestrq2::quantize", "CompositeExplicitAutograd", lib=_library)
def _run(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str, backend: str) -> Tensor:
    if not has_float64(x.device):
        given = (x.cpu(), projection.cpu(), codebook.cpu(), None if mask is None else mask.cpu())
        return torch.ops.bestrq2.quantize.default(*given, normalize, backend).to(x.device)
    # The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled.
    obstacles = {
        "triton": lambda: _triton_obstacle(x, codebook),
        "cuda": lambda: cuda.obstacle(x, codebook),
        "cpu": lambda: cpu.obstacle(x),
        "reference": lambda: None,
    }
    choice = choose_backend("quantize", backend or None, obstacles)
    if choice == "triton":
        return _run_triton(x, projection, codebook, mask, normalize)
    if choice == "cuda":
        return cuda.run(x, projection, codebook, mask, normalize)
    if choice == "cpu":
        return cpu.run(x, projection, codebook, mask, normalize)
    return reference.quantize(x, projection, codebook, normalize=normalize, mask=mask)


def _triton_obstacle(x: Tensor, codebook: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in fp32 and x is fp64"
    if codebook.shape[-1] > TRITON_MAX_DIMS:
        return f"it takes codes of at most {TRITON_MAX_DIMS} dimensions, got {codebook.shape[-1]}"
    return native.triton_obstacle(x.device)


def _run_triton(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str) -> Tensor:
    from bestrq2.kernels import quantize as kernel

    books = num_codebooks(projection, codebook)
    codes = kernel.quantize(
        x.reshape(-1, x.shape[-1]),
        projection.reshape(-1, *projection.shape[-2:]),
        codebook.reshape(-1, *codebook.shape[-2:]),
        None if mask is None else mask.reshape(-1),
        normalize == "layer_norm",
    )
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))


@torch.library.register_fake("bestrq2::quantize", lib=_library)
def _fake(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str, backend: str) -> Tensor:
    books = num_codebooks(projection, codebook)
    shape = x.shape[:-1] if books is None else (*x.shape[:-1], books)
    return x.new_empty(shape, dtype=torch.int64)
