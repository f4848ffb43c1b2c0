"""Attention over few keys: a registered operator for GPUs, and a function of autograd for CPUs.

The operator runs Triton kernels on NVIDIA GPUs, and the formula in PyTorch elsewhere. Other than
``scaled_dot_product_attention`` it takes queries, keys and values as the views that a linear layer gives, writes their
gradients side by side, and prepares nothing for a new number of tokens. torch.compile takes it as one operator.

:class:`CachedAttention` runs csrc/short_attention, in eager mode alone. ``layers/attention.py`` has the rule for when
each of them runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bestrq2.ops.common import native
from bestrq2.ops.common.library import fragment
from bestrq2.ops.common.transforms import refuse_second_derivative

from .padding import length_mask
from .row_functions import address, arrived


def short_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over the first ``lengths[b]`` keys of every clip.

    Args:
        query: ``(B, H, Nq, d)``. Where Nq = Nk, queries from ``lengths`` on give zero. The kernels take bf16 and fp16;
            other dtypes take the formula.
        key, value: ``(B, H, Nk, d)``, on GPUs Nk at most 256 (128 where d > 64, and before sm_90).
        lengths: ``(B,)`` int64 on the device, at least 1; None: all.

    Returns:
        ``(B, H, Nq, d)`` in the memory order ``(B, Nq, H, d)``.
    """
    return torch.ops.bestrq2.short_attention.default(query, key, value, lengths, 0)[0].transpose(1, 2)


def short_self_attention(qkv: Tensor, lengths: Tensor | None = None, first: int = 0) -> Tensor:
    """:func:`short_attention` of one linear layer's ``(B, N, 3, H, d)`` for the queries from ``first`` on."""
    return torch.ops.bestrq2.short_attention.default(qkv, None, None, lengths, first)[0].transpose(1, 2)


def runs_kernels(query: Tensor) -> bool:
    """Return True if the Triton kernels take tensors of this dtype on this device."""
    return query.dtype in (torch.bfloat16, torch.float16) and native.triton_obstacle(query.device) is None


# query: (B, H, Nq, d) with key and value, or all three packed (B, N, 3, H, d). Output (B, Nq, H, d).
_INPUTS = "Tensor query, Tensor? key, Tensor? value, Tensor? lengths, SymInt first"
_library = fragment()
_library.define(f"short_attention({_INPUTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"short_attention_backward(Tensor grad, Tensor logsumexp, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
Frames = tuple[Tensor, Tensor, Tensor]


def _split(frames: Sequence[Tensor | None], first: int) -> Frames:
    """Query, key and value ``(B, H, N, d)`` as views."""
    query, key, value = frames
    assert query is not None
    if key is None or value is None:
        query, key, value = query.permute(2, 0, 3, 1, 4).unbind()
        query = query[:, :, first:]
    return query, key, value


def _is_of_self(frames: Frames, packed: bool) -> bool:
    return packed or frames[0].shape[2] == frames[1].shape[2]


def _results(query: Tensor, packed: bool, first: int) -> tuple[Tensor, Tensor]:
    """Memory for output and log-sum-exp."""
    if packed:
        batch, tokens, _, heads, dim = query.shape
        queries = tokens - first
    else:
        batch, heads, queries, dim = query.shape
    logsumexp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    return query.new_empty((batch, queries, heads, dim)), logsumexp


def _gradients(query: Tensor, key: Tensor | None, value: Tensor | None) -> Frames:
    """Memory for the gradients, which of packed inputs are one tensor."""
    if key is None or value is None:
        return query.new_empty(query.shape), query.new_empty((0,)), query.new_empty((0,))
    return _by_token(query), _by_token(key), _by_token(value)


def _by_token(x: Tensor) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


@torch.library.impl("bestrq2::short_attention", "CompositeExplicitAutograd", lib=_library)
def _forward(
    query: Tensor, key: Tensor | None, value: Tensor | None, lengths: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    packed = key is None
    out, logsumexp = _results(query, packed, first)
    frames = _split((query, key, value), first)
    if out.numel() == 0:
        return out, logsumexp
    if runs_kernels(query):
        from bestrq2.kernels import short_attention as kernel

        lengths = None if lengths is None else lengths.contiguous()
        kernel.forward(*frames, out.transpose(1, 2), logsumexp, lengths, _is_of_self(frames, packed))
        return out, logsumexp
    query, key, value, valid, scores = _scores(frames, lengths, _is_of_self(frames, packed))
    logsumexp.copy_(scores.logsumexp(-1))
    out.transpose(1, 2).copy_(scores.softmax(-1) @ value * valid)
    return out, logsumexp


@torch.library.impl("bestrq2::short_attention_backward", "CompositeExplicitAutograd", lib=_library)
def _backward(
    grad: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    lengths: Tensor | None,
    first: int,
) -> Frames:
    packed = key is None
    results = _gradients(query, key, value)
    if packed and first:
        results[0][:, :first, 0].zero_()
    frames = _split((query, key, value), first)
    targets = _split((results[0], None, None), first) if packed else results
    grad = grad.to(query.dtype).transpose(1, 2)
    if grad.numel() == 0:
        return tuple(x.zero_() for x in results)  # type: ignore[return-value]
    if runs_kernels(query):
        from bestrq2.kernels import short_attention as kernel

        lengths = None if lengths is None else lengths.contiguous()
        kernel.backward(grad, *frames, logsumexp, lengths, _is_of_self(frames, packed), targets)
        return results
    query, key, value, valid, scores = _scores(frames, lengths, _is_of_self(frames, packed))
    weights, upstream = (scores - logsumexp[..., None].to(scores.dtype)).exp(), grad.to(scores.dtype) * valid
    of_weights = upstream @ value.mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    for target, gradient in zip(targets, (of_scores @ key, of_scores.mT @ query, weights.mT @ upstream)):
        target.copy_(gradient)
    return results


def _scores(frames: Frames, lengths: Tensor | None, of_self: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value with zeros in padding, valid queries ``(B, 1, Nq, 1)`` and scores ``(B, H, Nq, Nk)``, in
    fp32 or float64."""
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in frames)
    if lengths is None:
        lengths = torch.full((len(key),), key.shape[2], device=key.device)
    valid = length_mask(lengths, key.shape[2], key.device)[:, None, :, None]
    key, value = key.masked_fill(~valid, 0.0), value.masked_fill(~valid, 0.0)
    of_queries = valid[:, :, key.shape[2] - query.shape[2] :] if of_self else valid.new_ones(len(key), 1, 1, 1)
    query = query.masked_fill(~of_queries, 0.0)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~valid.mT, float("-inf"))
    return query, key, value, of_queries, scores


@torch.library.register_fake("bestrq2::short_attention", lib=_library)
def _fake_forward(
    query: Tensor, key: Tensor | None, value: Tensor | None, lengths: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    return _results(query, key is None, first)


@torch.library.register_fake("bestrq2::short_attention_backward", lib=_library)
def _fake_backward(
    grad: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None, *_: Any
) -> Frames:
    return _gradients(query, key, value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.first = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("short attention")
    logsumexp, query, key, value, lengths = ctx.saved_tensors
    gradients = torch.ops.bestrq2.short_attention_backward.default(
        grad, logsumexp, query, key, value, lengths, ctx.first
    )
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad)]
    return *wanted, None, None


torch.library.register_autograd("bestrq2::short_attention", _autograd, setup_context=_setup_context, lib=_library)


class CachedAttention(torch.autograd.Function):
    """Of query, key and value ``(B, H, N, d)`` on the CPU; or all three packed in query, ``(B, N, 3, H, d)``, of which
    the queries from ``first`` on count, plus ``bias (3 H d,)`` or None.

    The bias of the keys adds the same number to all scores of a row, so it has no effect and its gradient is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        lengths: Tensor | None,
        first: int,
        bias: Tensor | None,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
    ) -> Tensor:
        inputs = [None if x is None else _rows(x) for x in (query, key, value)]
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()  # read by address
        out, logsumexp = _results(query, key is None, first)
        out = out.transpose(1, 2)
        query, key, value = _split(inputs, first)
        batch, heads, num_queries, dim = query.shape
        ctx.sizes, ctx.scale, ctx.first = (batch, heads, num_queries, key.shape[2], dim), dim**-0.5, first
        native.extension().short_attention_forward(
            query.dtype == torch.bfloat16, ctx.sizes, address(lengths), ctx.scale,
            [*map(_place, (query, key, value, out))], _biases(bias, heads * dim), logsumexp.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(lengths, logsumexp, bias, *inputs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("short attention")
        lengths, logsumexp, bias, *inputs = ctx.saved_tensors
        packed, results = inputs[1] is None, _gradients(*inputs)
        if packed:
            results[0][:, : ctx.first, 0] = 0
        query, key, value = _split(inputs, ctx.first)
        targets = _split((results[0], None, None), ctx.first) if packed else results
        grad = _rows(arrived(grad).to(query.dtype))
        batch, heads, _, _, dim = ctx.sizes
        sums = None  # of each clip
        if ctx.needs_input_grad[2]:
            sums = torch.empty(batch, 3 * heads * dim, dtype=torch.float32, device="cpu")
        native.extension().short_attention_backward(
            query.dtype == torch.bfloat16, ctx.sizes, address(lengths), ctx.scale,
            [*map(_place, (query, key, value, grad, grad, *targets))],  # the fourth, the output, is not read
            _biases(bias, heads * dim), logsumexp.data_ptr(), address(sums), torch.get_num_threads(),
        )  # fmt: skip
        of_bias = None if sums is None else sums.sum(0)
        return None, None, of_bias, *((results[0], None, None) if packed else results)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[int, ...]:
    """Address and strides of batch, head and token."""
    return (x.data_ptr(), *x.stride()[:3])


def _biases(bias: Tensor | None, width: int) -> tuple[int, int]:
    """Addresses of the biases of queries and values."""
    return (0, 0) if bias is None else (bias.data_ptr(), bias.data_ptr() + 2 * width * bias.element_size())
