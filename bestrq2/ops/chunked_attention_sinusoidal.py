"""Chunked attention with projected sinusoidal positions and no table: the position term as an inner product.

The Triton kernels are kernels/chunked_attention/sinusoidal*.py.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import chunked_attention_cpu
from . import chunked_attention_sinusoidal_appended as appended
from .arguments import integer, number, require_tensors
from .chunk_layouts import ChunkLayout
from .chunked_attention import OFFSET_BITS, autocast, in_dtype_of, laid_out, validate
from .chunked_attention_autograd import register
from .chunked_attention_sinusoidal_series import device_tables, series_size
from .dispatch import choose_backend, requested
from .native import triton_obstacle
from .transforms import refuse_transforms

__all__ = ["chunked_attention_sinusoidal"]


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
    that depend on i alone and channels that depend on j alone, so it adds to the one of query and key. Within a
    window all D / 2 frequencies are sums of the few that the window can tell apart: with W offsets, about
    1.3 W / pi + 17 channels replace D (an oversampled Fourier series; the idea of extra channels is that of FlashBias,
    arXiv:2505.12044). They reproduce the sinusoids to about 1e-8.

    It stores no (H, R, d) table and no band of scores. The Triton kernels compute the channels of a query inside, for
    head sizes up to 128 and windows of up to about 570 offsets (fp32: 64 and 265). Elsewhere the channels are appended
    to query, key and value, which grow by them. On CPUs the table is faster (kernels/README.md has numbers), which is
    why ``ConformerEncoder`` uses the table; on GPUs nobody has measured yet.

    The series of a window is fitted on the host when the call runs, once for each number of offsets: about a
    millisecond for a short window, 0.3 s for a thousand offsets.

    Args:
        query, key, value: as for :func:`chunked_attention`.
        projection: (H, d, D), D even: the layer that turns sinusoids into positions, one matrix per head.
        chunk_size, left_context, right_context, lengths, starts, key_mask, query_offset: the same.
        content_bias, position_bias: (H, d).
        scale: default 1 / sqrt(d).
        base: of the frequencies.
        backend: the same. Where channels are appended, the compiled backends take head sizes up to 256, with them.

    Returns:
        (B, H, Tq, d) in query's dtype and memory order. Differentiable once in query, key, value, projection, biases.

    Raises:
        TypeError: as :func:`chunked_attention`.
        ValueError: for a projection of the wrong shape, and where the window has so many offsets that their channels
            exceed what a compiled backend takes; otherwise as :func:`chunked_attention`.
    """
    op = "chunked_attention_sinusoidal"
    optional = {"lengths": lengths, "starts": starts, "key_mask": key_mask}
    optional |= {"content_bias": content_bias, "position_bias": position_bias}
    require_tensors(op, {"query": query, "key": key, "value": value, "projection": projection}, optional)
    query, key, value = autocast(query, key, value)
    tables = {"content_bias": content_bias, "position_bias": position_bias}
    content_bias, position_bias = in_dtype_of(query, op, tables)
    if not projection.is_floating_point():
        raise ValueError(f"{op}: projection must be floating, got {projection.dtype}")
    refuse_transforms(op, query, key, value, projection, content_bias, position_bias)
    layout = ChunkLayout(chunk_size, left_context, right_context)  # raises for impossible settings
    validate(query, key, value, lengths, starts, key_mask, None, content_bias, None)
    heads, head_dim = query.shape[1], query.shape[-1]
    width = projection.shape[2] if projection.dim() == 3 else 0
    if width < 2 or width % 2 or projection.shape[:2] != (heads, head_dim):
        raise ValueError(
            f"{op}: projection must be (H, d, D) = ({heads}, {head_dim}, even), got {tuple(projection.shape)}"
        )
    if position_bias is not None and position_bias.shape != (heads, head_dim):
        raise ValueError(
            f"{op}: position_bias must be (H, d) = ({heads}, {head_dim}), got {tuple(position_bias.shape)}"
        )
    for name, x in (("projection", projection), ("position_bias", position_bias)):
        if x is not None and x.device != query.device:
            raise ValueError(f"{op}: {name} is on {x.device} but query is on {query.device}")
    base = number(f"{op}: base", base)
    if base <= 0:
        raise ValueError(f"{op}: base must be positive, got {base}")
    out, _ = torch.ops.bestrq2.chunked_attention_sinusoidal.default(
        query,
        key,
        value,
        projection,
        content_bias,
        position_bias,
        lengths,
        starts,
        key_mask,
        layout.chunk_size,
        layout.left_context,
        layout.right_context,
        integer(f"{op}: query_offset", query_offset, 0, bits=OFFSET_BITS),
        head_dim**-0.5 if scale is None else number(f"{op}: scale", scale),
        base,
        requested(backend),
    )
    return out


_library = torch.library.Library("bestrq2", "FRAGMENT")
_TENSORS = ("query", "key", "value", "projection", "content_bias", "position_bias")
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor projection, Tensor? content_bias, Tensor? position_bias, "
    "Tensor? lengths, Tensor? starts, Tensor? key_mask, SymInt? chunk_size, SymInt? left_context, "
    "SymInt? right_context, SymInt query_offset, float scale, float base, str backend"
)
# Tables of a window are made in the first call that needs them and kept: not inside the memory of a CUDA graph.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(f"chunked_attention_sinusoidal({_INPUTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"chunked_attention_sinusoidal_backward(Tensor grad, Tensor out, Tensor logsumexp, {_INPUTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _named(inputs: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors that may need a gradient, and the other inputs with the bounds of the offsets."""
    names = ("lengths", "starts", "key_mask", "chunk_size", "left_context", "right_context", "query_offset")
    options = dict(zip((*names, "scale", "base", "backend"), inputs[6:]))
    query, key = inputs[:2]
    layout = ChunkLayout(options["chunk_size"], options["left_context"], options["right_context"])
    lowest, highest = layout.offsets(query.shape[2], key.shape[2], query_offset=options["query_offset"])
    options["offsets"] = (lowest, max(highest, lowest))
    return dict(zip(_TENSORS, inputs)), options


def _launcher() -> Any:
    return import_module("bestrq2.kernels.chunked_attention.sinusoidal_launch")


def _choose(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[str, int | None]:
    """The backend, and for its own kernels the padded number of frequencies: None where channels are appended."""
    query = tensors["query"]
    head_dim, (lowest, highest) = query.shape[-1], options["offsets"]
    obstacles = {
        "triton": lambda: (
            "float64 runs on the reference backend only"
            if query.dtype == torch.float64
            else triton_obstacle(query.device)
        ),
        "cpu": lambda: chunked_attention_cpu.obstacle(query),
        "reference": lambda: None,
    }
    backend = choose_backend("chunked_attention_sinusoidal", options["backend"] or None, obstacles)
    if not len(query):  # nothing to launch for no items
        return "reference", None
    frequencies = series_size(highest - lowest + 1)[1] + 1
    if backend == "triton":
        padded = _launcher().padded_frequencies(head_dim, frequencies, query.dtype, query.device)
        if padded is not None:
            return backend, padded
    channels = 2 * frequencies - 1
    if head_dim + channels > chunked_attention_cpu.MAX_HEAD_DIM and backend != "reference":
        raise ValueError(
            f"chunked_attention_sinusoidal: {highest - lowest + 1} offsets need {channels} channels beside the "
            f"{head_dim} of a head, more than the {chunked_attention_cpu.MAX_HEAD_DIM} of a compiled backend: use "
            "chunked_attention with a table, or a shorter window"
        )
    return backend, None


def _series(tensors: dict[str, Any], options: dict[str, Any], padded: int) -> tuple[dict[str, Any], Tensor]:
    """What the kernels take instead of a projection, and the coefficients (2K, D) that lead back to it."""
    query, projection = tensors["query"], tensors["projection"]
    rows, device = _launcher().MORE_ROWS, query.device
    arguments = (projection.shape[2], *options["offsets"], options["base"], padded, rows)
    period, coefficients, turns, basis = device_tables(*arguments, query.dtype, device)
    onto = (projection.float() @ coefficients.mT).to(query.dtype)  # (H, d, 2K)
    return {"onto": onto, "period": period, "turns": turns, "basis": basis}, coefficients


@torch.library.impl("bestrq2::chunked_attention_sinusoidal", "CompositeExplicitAutograd", lib=_library)
def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    tensors, options = _named(inputs)
    backend, padded = _choose(tensors, options)
    with torch.autocast(inputs[0].device.type, enabled=False):
        if padded is None:
            return appended.forward(tensors, options, backend)
        series, _ = _series(tensors, options, padded)
        return _launcher().forward(*inputs[:3], series, tensors | options)


@torch.library.impl("bestrq2::chunked_attention_sinusoidal_backward", "CompositeExplicitAutograd", lib=_library)
def _backward(grad: Tensor, out: Tensor, logsumexp: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    tensors, options = _named(inputs)
    backend, padded = _choose(tensors, options)
    with torch.autocast(inputs[0].device.type, enabled=False):
        if padded is None:
            gradients = appended.backward(grad, out, logsumexp, tensors, options, backend)
        else:
            series, coefficients = _series(tensors, options, padded)
            of_all = _launcher().backward(grad, out, logsumexp, *inputs[:3], series, tensors | options)
            gradients = [*of_all[:3], (of_all[3] @ coefficients).to(tensors["projection"].dtype), *of_all[4:]]
    return tuple(grad.new_empty((0,)) if x is None else laid_out(x, like) for x, like in zip(gradients, inputs))


register("chunked_attention_sinusoidal", _library)
