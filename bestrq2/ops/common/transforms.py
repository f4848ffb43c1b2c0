"""Reject forward-mode differentiation and the transforms of torch.func with a clear error."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["is_batched", "refuse_transforms"]


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


def is_batched(x: Tensor) -> bool:
    """Return True if ``x`` stands for a batch of tensors, as in ``torch.autograd.grad(is_grads_batched=True)``."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)
