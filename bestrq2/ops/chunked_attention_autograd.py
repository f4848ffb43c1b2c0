"""Shapes and first derivative of the operator ``chunked_attention``."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def register(name: str, library: torch.library.Library) -> None:
    """Register fake kernels and autograd of ``bestrq2::<name>`` and ``bestrq2::<name>_backward``.

    The operator takes six tensors to differentiate, three that are not (lengths, starts, key_mask), then settings; it
    returns output and log-sum-exp, which with the gradient of the output come first in its backward.
    """

    def fake_forward(query: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)

    def fake_backward(grad: Tensor, out: Tensor, logsumexp: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(grad.new_empty((0,)) if x is None else torch.empty_like(x) for x in inputs[:6])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        out, logsumexp = output
        ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(out, logsumexp, *inputs[:9])
        ctx.settings = inputs[9:]

    @once_differentiable
    def autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        out, logsumexp, *inputs = ctx.saved_tensors
        backward = getattr(torch.ops.bestrq2, f"{name}_backward").default
        gradients = backward(grad, out, logsumexp, *inputs, *ctx.settings)
        wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad))
        return (*wanted, *(None,) * (3 + len(ctx.settings)))

    torch.library.register_fake(f"bestrq2::{name}", fake_forward, lib=library)
    torch.library.register_fake(f"bestrq2::{name}_backward", fake_backward, lib=library)
    torch.library.register_autograd(f"bestrq2::{name}", autograd, setup_context=setup_context, lib=library)
