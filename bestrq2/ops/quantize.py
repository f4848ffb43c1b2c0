"""Random projection and nearest code, exact in fp32, without ever storing the (rows, codes) scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native, reference
from .arguments import require_tensors
from .dispatch import choose_backend, requested
from .reference.quantize import not_finite

__all__ = ["check_codes", "quantize"]

NORMALIZE = ("none", "layer_norm")
TRITON_MAX_DIMS = 64


def quantize(
    x: Tensor,
    projection: Tensor,
    codebook: Tensor,
    *,
    normalize: str = "none",
    mask: Tensor | None = None,
    backend: str | None = None,
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
    _validate(x, projection, codebook, normalize, mask)
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


def _validate(x: Tensor, projection: Tensor, codebook: Tensor, normalize: str, mask: Tensor | None) -> None:
    if normalize not in NORMALIZE:
        raise ValueError(f"quantize: normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if x.dim() < 1 or projection.dim() not in (2, 3) or codebook.dim() not in (2, 3):
        raise ValueError(
            "quantize: expected x (..., D), projection (D, d) or (G, D, d) and codebook (V, d) or (G, V, d), got "
            f"{_shapes(x, projection, codebook)}"
        )
    if x.shape[-1] != projection.shape[-2]:
        raise ValueError(
            f"quantize: x has {x.shape[-1]} features but projection takes {projection.shape[-2]}: "
            f"{_shapes(x, projection, codebook)}"
        )
    if projection.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"quantize: projection gives {projection.shape[-1]} dimensions but a code has {codebook.shape[-1]}: "
            f"{_shapes(x, projection, codebook)}"
        )
    if projection.dim() == codebook.dim() == 3 and projection.shape[0] != codebook.shape[0]:
        raise ValueError(
            f"quantize: {projection.shape[0]} projections but {codebook.shape[0]} codebooks: "
            f"{_shapes(x, projection, codebook)}"
        )
    if min(*projection.shape, *codebook.shape) < 1:
        raise ValueError(f"quantize: projection and codebook must not be empty: {_shapes(x, projection, codebook)}")
    for name, tensor in (("x", x), ("projection", projection), ("codebook", codebook)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"quantize: {name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"quantize: {name} is on {tensor.device} but x is on {x.device}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device):
        raise ValueError(
            f"quantize: mask must be a bool tensor of shape {tuple(x.shape[:-1])} on {x.device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )


def _shapes(x: Tensor, projection: Tensor, codebook: Tensor) -> str:
    return f"x {tuple(x.shape)}, projection {tuple(projection.shape)}, codebook {tuple(codebook.shape)}"


def _books(projection: Tensor, codebook: Tensor) -> int | None:
    """Number of codebooks G, or None when the codes have no codebook axis."""
    if projection.dim() == 3:
        return projection.shape[0]
    return codebook.shape[0] if codebook.dim() == 3 else None


_library = torch.library.Library("bestrq2", "FRAGMENT")
_library.define(
    "quantize(Tensor x, Tensor projection, Tensor codebook, Tensor? mask, str normalize, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("bestrq2::quantize", "CompositeExplicitAutograd", lib=_library)
def _run(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str, backend: str) -> Tensor:
    # The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled.
    obstacles = {
        "triton": lambda: _triton_obstacle(x, codebook),
        "cuda": lambda: _cuda_obstacle(x, codebook),
        "cpu": lambda: _cpu_obstacle(x),
        "reference": lambda: None,
    }
    choice = choose_backend("quantize", backend or None, obstacles)
    if choice == "triton":
        return _run_triton(x, projection, codebook, mask, normalize)
    if choice == "cuda":
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream().cuda_stream
            return run_cuda(native.extension().quantize_cuda, x, projection, codebook, mask, normalize, stream)
    if choice == "cpu":
        return _run_cpu(x, projection, codebook, mask, normalize)
    return reference.quantize(x, projection, codebook, normalize=normalize, mask=mask)


def _triton_obstacle(x: Tensor, codebook: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "it computes in fp32 and x is fp64"
    if codebook.shape[-1] > TRITON_MAX_DIMS:
        return f"it takes codes of at most {TRITON_MAX_DIMS} dimensions, got {codebook.shape[-1]}"
    return native.triton_obstacle(x.device)


def _run_triton(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str) -> Tensor:
    from bestrq2.kernels import quantize as kernel

    books = _books(projection, codebook)
    codes = kernel.quantize(
        x.reshape(-1, x.shape[-1]),
        projection.reshape(-1, *projection.shape[-2:]),
        codebook.reshape(-1, *codebook.shape[-2:]),
        None if mask is None else mask.reshape(-1),
        normalize == "layer_norm",
    )
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))


def _cpu_obstacle(x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"it needs CPU tensors, got {x.device.type!r}"
    return native.extension_obstacle()


def _cuda_obstacle(x: Tensor, codebook: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"it needs CUDA tensors, got {x.device.type!r}"
    if x.dtype == torch.float64:
        return "it computes in fp32 and x is fp64"
    reason = native.extension_obstacle(cuda=True)
    if reason is None and codebook.shape[-1] > native.extension().quantize_cuda_dims:
        return f"it takes codes of at most {native.extension().quantize_cuda_dims} dimensions, got {codebook.shape[-1]}"
    return reason


def run_cuda(
    kernel: Callable[..., None],
    x: Tensor,
    projection: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    normalize: str,
    stream: int,
) -> Tensor:
    """Call ``_C.quantize_cuda``, or ``_C.quantize_cuda_emulated``: the same arithmetic on CPU tensors, for tests."""
    books = _books(projection, codebook)
    projection, codebook = projection.float().contiguous(), codebook.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(len(rows), books or 1, dtype=torch.int64, device=x.device)
    kernel({**_addresses(rows, projection, codebook, mask, normalize, codes), "stream": stream})
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))


def _addresses(
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


def _run_cpu(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str) -> Tensor:
    books = _books(projection, codebook)
    projection = projection.double().contiguous()  # products and sums of the projection are done in float64
    codebook = codebook.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(len(rows), books or 1, dtype=torch.int64)
    arguments = _addresses(rows, projection, codebook, mask, normalize, codes)
    bad = native.extension().quantize({**arguments, "threads": torch.get_num_threads()})
    if bad >= 0:
        raise ValueError(not_finite(x, bad))
    return codes.reshape(x.shape[:-1] if books is None else (*x.shape[:-1], books))


@torch.library.register_fake("bestrq2::quantize", lib=_library)
def _fake(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, normalize: str, backend: str) -> Tensor:
    books = _books(projection, codebook)
    shape = x.shape[:-1] if books is None else (*x.shape[:-1], books)
    return x.new_empty(shape, dtype=torch.int64)
