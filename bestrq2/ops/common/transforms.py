"""Reject second derivatives, forward-mode differentiation and the transforms of torch.func with a clear error."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_batched", "refuse_second_derivative", "refuse_transforms"]


def refuse_transforms(op: str, *tensors: Tensor | None, any_level: bool = False) -> None:
    """Raise RuntimeError for a forward-mode tangent, which would be dropped, and inside ``torch.func`` transforms.

    ``any_level``: ``torch.func.vmap`` without a gradient does not work, either.
    """
    if torch.compiler.is_compiling():
        return
    given = [x for x in tensors if x is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in given):
        raise RuntimeError(f"{op} has no forward-mode derivative (torch.func.jvp); use reverse mode")
    if torch._C._are_functorch_transforms_active() and (any_level or any(x.requires_grad for x in given)):
        raise RuntimeError(
            f"{op} does not run inside the transforms of torch.func; use torch.autograd.grad or backward"
        )


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward that is called with ``create_graph=True``. To be called first in a backward.

    ``once_differentiable`` refuses only what comes through the upstream gradient, and only if ``backward`` runs into
    it: the derivative of a gradient with respect to what the forward saved would be left out without a word.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op} has no second derivative: use it without create_graph=True. Penalties of gradients and products "
            "with a Hessian need plain PyTorch, such as bestrq2.ops.reference"
        )


def is_batched(x: Tensor) -> bool:
    """Return True if ``x`` stands for a batch of tensors, as in ``torch.autograd.grad(is_grads_batched=True)``."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)
