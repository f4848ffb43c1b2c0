"""Inputs, the plain PyTorch form and the backends for the tests of ``ops.masked_cross_entropy``."""

import os

import pytest
import torch
import torch.nn.functional as F

from bestrq2 import ops

# Triton's interpreter runs a program for every row.
USUAL = (3, 15) if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") else (3, 41)
FULL = {"label_smoothing": 0.1, "z_loss": 1e-2}

BACKENDS = ("reference", "cpu", "triton")


def usable(request, device):
    """Result of a fixture with ``params=BACKENDS``: the backend's name, or a skip if it cannot run."""
    try:
        problem = make(device=device, shape=(3,), features=2, classes=3)
        ops.masked_cross_entropy(*problem[:3], backend=request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def make(shape=USUAL, features=32, classes=203, dtype=torch.float32, device="cpu", scale=2.0):
    """hidden, weight, targets, bias, bool mask, row weights; logits of standard deviation about ``scale``."""
    hidden = torch.randn(*shape, features, device=device).to(dtype)
    weight = (scale * torch.randn(classes, features, device=device) / features**0.5).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    targets = torch.randint(classes, shape, device=device)
    mask = torch.rand(shape, device=device) < 0.6
    return hidden, weight, targets, bias, mask, mask * torch.rand(shape, device=device)


def grads_of(function, tensors, upstream=None):
    """Value of ``function`` at leaves made of ``tensors``, and its gradients under a non-constant upstream gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 2), device=loss.device)[-loss.numel() or 2 :]
    upstream = upstream[: loss.numel()].reshape(loss.shape).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)


def plain(hidden, weight, targets, bias, weights, reduction, label_smoothing=0.0, z_loss=0.0):
    """The usual PyTorch form: rows are gathered, logits are stored."""
    rows = weights.flatten().nonzero().squeeze(1)
    logits = F.linear(hidden.flatten(0, -2)[rows], weight, bias)
    losses = F.cross_entropy(logits, targets.flatten()[rows], reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(-1) ** 2
    weights = weights.flatten()[rows].to(losses.dtype)
    if reduction == "none":
        return losses.new_zeros(targets.numel()).index_put((rows,), losses * weights).reshape(targets.shape)
    return (losses * weights).sum() / (weights.sum() if reduction == "mean" else 1)
