"""Attention in chunks with Transformer-XL relative positions: memory linear in the length, deterministic gradients."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import chunked_attention_cpu, reference
from .arguments import integer, number, require_tensors
from .chunk_layouts import ChunkLayout
from .chunked_attention_autograd import register
from .dispatch import choose_backend, requested
from .native import triton_obstacle
from .reference.chunked_attention import forward as reference_forward
from .transforms import refuse_transforms

__all__ = ["chunked_attention"]

OFFSET_BITS = 29
"""Of ``query_offset``: the positions of the Triton kernels are int32 (kernels/chunked_attention/window.py)."""


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_size: int | None = None,
    left_context: int | None = None,
    right_context: int | None = 0,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_offset: int = 0,
    position: Tensor | None = None,
    position_zero: int | None = None,
    content_bias: Tensor | None = None,
    position_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend to the own chunk and its context, with relative positions (Dai et al., Transformer-XL, 2019).

    The query in row i stands at position ``n = i + query_offset``, in chunk ``c = n // chunk_size``. It sees key j iff

        c * chunk_size - left_context <= j < (c + 1) * chunk_size + right_context
        and   starts[b] <= j < lengths[b]   and   key_mask[b, j]

    For chunk_size 4, left_context 3, right_context 2 (x: own chunk, <: left context, >: right context):

        key    0 1 2 3 4 5 6 7 8 9
        n=0-3  x x x x > >
        n=4-7    < < < x x x x > >
        n=8-9            < < < x x        the last chunk is just shorter

    ``chunk_size=1`` is a sliding band, ``None`` full attention; see :class:`bestrq2.ops.ChunkLayout` for the settings
    of SpeechBrain, WeNet, NeMo and icefall. The score of a visible pair is

        ((q_i + content_bias) . k_j + (q_i + position_bias) . position[h, position_zero + n - j]) * scale

    A padded query (``starts``/``lengths`` given and its position outside them) and a query that sees no key give
    exactly 0 and zero gradients. Padding and masked keys are never read, so they may hold NaN. Nothing of size Tq x Tk
    is stored (except by the reference backend). Results and gradients are bit-deterministic and do not depend on the
    number of threads. Inside autocast the inputs are cast to the autocast dtype; scores and sums are fp32 whatever the
    dtype.

    Args:
        query: (B, H, Tq, d), fp32, bf16, fp16 or fp64, of any strides; d <= 256 for the compiled backends, which do not
            take fp64.
        key: (B, H, Tk, d), dtype of query.
        value: (B, H, Tk, d), dtype of query.
        chunk_size: frames per chunk, counted from position 0 whatever the offset; None: one chunk for everything.
        left_context: frames visible before the chunk; None: all.
        right_context: frames visible after the chunk; None: all.
        lengths: (B,) int32 or int64, first padded position of each item; None: nothing is padded.
        starts: (B,) int32 or int64, first valid position of each item (caches that are not yet full); None: 0.
        key_mask: (B, Tk) bool, False hides a key anywhere in an item, from every query and head; None: hides nothing.
            Prefer lengths and starts for padding at the ends: they also skip its work and zero the padded queries.
        query_offset: position of query row 0 (streaming: the number of cached keys in front of it), below 2^29.
        position: (H, R, d) table of relative positions, row ``position_zero + n - j``. Must have a row for each
            visible offset (:meth:`ChunkLayout.offsets`). Tables ordered by j - n: pass ``position.flip(1)``.
        position_zero: row of offset 0; default (R - 1) // 2.
        content_bias: (H, d), Transformer-XL's u.
        position_bias: (H, d), Transformer-XL's v; needs ``position``.
        scale: factor of both terms; default 1 / sqrt(d).
        backend: "triton", "cpu", "reference"; None: the first that can run the call. position and the biases are
            converted to query's dtype.

    Returns:
        (B, H, Tq, d) in query's dtype and memory order. Differentiable once in query, key, value, position and biases,
        not by ``torch.func.grad``.

    Raises:
        TypeError: for what is no tensor, integer or number where one is expected.
        ValueError: for wrong shapes, dtypes or settings, and for a table that lacks a visible offset.
        RuntimeError: if the requested backend cannot run the call.

    Example:
        >>> q, k, v = torch.randn(3, 2, 4, 100, 64)
        >>> position = torch.randn(4, 2 * 100 - 1, 64)
        >>> chunked_attention(q, k, v, chunk_size=16, left_context=32, position=position).shape
        torch.Size([2, 4, 100, 64])
    """
    op = "chunked_attention"
    optional = {"lengths": lengths, "starts": starts, "key_mask": key_mask}
    optional |= {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    require_tensors(op, {"query": query, "key": key, "value": value}, optional)
    query, key, value = autocast(query, key, value)
    tables = {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    position, content_bias, position_bias = in_dtype_of(query, op, tables)
    refuse_transforms(op, query, key, value, position, content_bias, position_bias)
    layout = ChunkLayout(chunk_size, left_context, right_context)  # raises for impossible settings
    validate(query, key, value, lengths, starts, key_mask, position, content_bias, position_bias)
    if position_zero is None:
        position_zero = 0 if position is None else (position.shape[1] - 1) // 2
    out, _ = torch.ops.bestrq2.chunked_attention.default(
        query,
        key,
        value,
        position,
        content_bias,
        position_bias,
        lengths,
        starts,
        key_mask,
        layout.chunk_size,
        layout.left_context,
        layout.right_context,
        integer(f"{op}: query_offset", query_offset, 0, bits=OFFSET_BITS),
        integer(f"{op}: position_zero", position_zero),
        query.shape[-1] ** -0.5 if scale is None else number(f"{op}: scale", scale),
        requested(backend),
    )
    return out


def autocast(*frames: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of the inputs of a product: every floating tensor but float64 in its dtype."""
    device = frames[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return frames
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in frames)


def in_dtype_of(query: Tensor, op: str, tables: dict[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Tables, which are often parameters in fp32, in query's dtype."""
    for name, x in tables.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating, got {x.dtype}")
    return tuple(None if x is None else x.to(query.dtype) for x in tables.values())


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    starts: Tensor | None,
    key_mask: Tensor | None,
    position: Tensor | None,
    content_bias: Tensor | None,
    position_bias: Tensor | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.shape != key.shape:
        raise ValueError(f"chunked_attention: expected {_EXPECTED}, got {_shapes(query, key, value)}")
    batch, heads, _, head_dim = query.shape
    if heads < 1 or head_dim < 1:
        raise ValueError(
            f"chunked_attention: expected at least one head and one channel, got {_shapes(query, key, value)}"
        )
    if key.shape[:2] != query.shape[:2] or key.shape[3] != head_dim:
        raise ValueError(f"chunked_attention: expected {_EXPECTED}, got {_shapes(query, key, value)}")
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"chunked_attention: query must be fp32, bf16, fp16 or fp64, got {query.dtype}")
    if key.dtype != query.dtype or value.dtype != query.dtype:
        raise ValueError(
            f"chunked_attention: query, key and value must share a dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, bound in (("lengths", lengths), ("starts", starts)):
        if bound is not None and (bound.shape != (batch,) or bound.dtype not in (torch.int64, torch.int32)):
            raise ValueError(
                f"chunked_attention: {name} must be an int32 or int64 tensor of shape ({batch},), got {bound.dtype} "
                f"{tuple(bound.shape)}"
            )
    if key_mask is not None and (key_mask.shape != (batch, key.shape[2]) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"chunked_attention: key_mask must be a bool tensor of shape (B, Tk) = ({batch}, {key.shape[2]}), got "
            f"{key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if position is not None and (position.dim() != 3 or position.shape[0] != heads or position.shape[2] != head_dim):
        raise ValueError(
            f"chunked_attention: position must be (H, R, d) = ({heads}, R, {head_dim}), got {tuple(position.shape)}"
        )
    for name, bias in (("content_bias", content_bias), ("position_bias", position_bias)):
        if bias is not None and bias.shape != (heads, head_dim):
            raise ValueError(
                f"chunked_attention: {name} must be (H, d) = ({heads}, {head_dim}), got {tuple(bias.shape)}"
            )
    if position_bias is not None and position is None:
        raise ValueError("chunked_attention: position_bias needs position, got position=None")
    others = {"key": key, "value": value, "lengths": lengths, "starts": starts, "key_mask": key_mask}
    others["position"] = position
    for name, other in {**others, "content_bias": content_bias, "position_bias": position_bias}.items():
        if other is not None and other.device != query.device:
            raise ValueError(f"chunked_attention: {name} is on {other.device} but query is on {query.device}")


_EXPECTED = "query (B, H, Tq, d) and key, value (B, H, Tk, d)"


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"


_library = torch.library.Library("bestrq2", "FRAGMENT")
_OPTIONS = (
    "Tensor? position, Tensor? content_bias, Tensor? position_bias, Tensor? lengths, Tensor? starts, "
    "Tensor? key_mask, SymInt? chunk_size, SymInt? left_context, SymInt? right_context, SymInt query_offset, "
    "SymInt position_zero, float scale, str backend"
)
_library.define(
    f"chunked_attention(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "chunked_attention_backward(Tensor grad, Tensor out, Tensor logsumexp, Tensor query, Tensor key, Tensor value, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _choose(query: Tensor, backend: str) -> str:
    """The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled."""
    obstacles = {
        "triton": lambda: _triton_obstacle(query),
        "cpu": lambda: chunked_attention_cpu.obstacle(query),
        "reference": lambda: None,
    }
    return choose_backend("chunked_attention", backend or None, obstacles)


def _triton_obstacle(query: Tensor) -> str | None:
    if query.dtype == torch.float64:
        return "float64 runs on the reference backend only"
    if query.shape[-1] > chunked_attention_cpu.MAX_HEAD_DIM:
        return f"head size {query.shape[-1]} exceeds {chunked_attention_cpu.MAX_HEAD_DIM}"
    return triton_obstacle(query.device)


def _compiled(name: str) -> Any:
    """The module whose forward() and backward() run a compiled backend; triton is imported at the first call."""
    return chunked_attention_cpu if name == "cpu" else import_module("bestrq2.kernels.chunked_attention.launch")


@torch.library.impl("bestrq2::chunked_attention", "CompositeExplicitAutograd", lib=_library)
def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    position, _, _, _, _, _, chunk_size, left, right, offset, zero, _, backend = options
    if position is not None:
        _check_table(position, zero, ChunkLayout(chunk_size, left, right), query.shape[2], key.shape[2], offset)
    chosen = _choose(query, backend)
    if chosen != "reference" and len(query):  # nothing to launch for no items
        return _compiled(chosen).forward(query, key, value, _named(options))
    out, logsumexp = reference_forward(query, key, value, **_named(options))
    return torch.empty_like(query).copy_(out), logsumexp.float()


@torch.library.impl("bestrq2::chunked_attention_backward", "CompositeExplicitAutograd", lib=_library)
def _backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    chosen = _choose(query, options[-1])
    if chosen != "reference" and len(query):
        gradients = _compiled(chosen).backward(grad, out, logsumexp, query, key, value, _named(options))
        inputs = (query, key, value, *options[:3])
        return tuple(grad.new_empty((0,)) if x is None else laid_out(x, like) for x, like in zip(gradients, inputs))
    return _reference_backward(grad, query, key, value, options)


def laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` with the strides that torch.compile was promised: those of ``empty_like(like)``."""
    promised = torch.empty_like(like, device="meta").stride()
    return gradient if gradient.stride() == promised else torch.empty_like(like).copy_(gradient)


def _reference_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, options: Any) -> tuple[Tensor, ...]:
    tensors: list[Any] = [x if x is None else x.detach().requires_grad_() for x in (query, key, value, *options[:3])]
    named = _named((*tensors[3:], *options[3:]))
    with torch.enable_grad():
        out = reference.chunked_attention(*tensors[:3], **named)
    wanted = [x for x in tensors if x is not None]
    gradients = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True))
    return tuple(grad.new_empty((0,)) if x is None else torch.empty_like(x).copy_(next(gradients)) for x in tensors)


def _named(options: Any) -> dict[str, Any]:
    names = ("position", "content_bias", "position_bias", "lengths", "starts", "key_mask", "chunk_size")
    return dict(zip((*names, "left_context", "right_context", "query_offset", "position_zero", "scale"), options))


def _check_table(
    position: Tensor, zero: int, layout: ChunkLayout, query_length: int, key_length: int, query_offset: int
) -> None:
    lowest, highest = layout.offsets(query_length, key_length, query_offset=query_offset)
    if (
        query_length
        and key_length
        and lowest <= highest
        and not 0 <= zero + lowest <= zero + highest < len(position[0])
    ):
        raise ValueError(
            f"chunked_attention: the window has offsets {lowest} to {highest}, rows {zero + lowest} to "
            f"{zero + highest} with position_zero={zero}, but position has rows 0 to {position.shape[1] - 1}"
        )


register("chunked_attention", _library)
