"""Windows, inputs and results by name for the tests of ``ops.chunked_attention``."""

import torch
from torch import Tensor

from bestrq2 import ops

WINDOWS = {
    "full": {},
    "chunk 16, left 32": {"chunk_size": 16, "left_context": 32},
    "chunk 25, all left": {"chunk_size": 25},
    "chunk 7, left 10, right 3": {"chunk_size": 7, "left_context": 10, "right_context": 3},
    "chunk 64, left 0": {"chunk_size": 64, "left_context": 0},
    "chunk 200": {"chunk_size": 200, "left_context": 100},
    "band 9, 4": {"chunk_size": 1, "left_context": 9, "right_context": 4},
    "chunk 5, left 0, all right": {"chunk_size": 5, "left_context": 0, "right_context": None},
}


def make_inputs(batch=2, heads=2, queries=130, keys=None, head_dim=16, dtype=torch.float64) -> dict[str, Tensor]:
    """Random inputs whose (B, H, T, d) are views of (B, T, H, d), rounded to ``dtype``, all terms of similar size."""
    keys = queries if keys is None else keys
    reach = max(queries, keys, 1)
    shapes = {"query": (batch, queries, heads, head_dim), "key": (batch, keys, heads, head_dim)}
    shapes |= {"value": shapes["key"], "position": (heads, 2 * reach - 1, head_dim)}
    shapes |= {"content_bias": (heads, head_dim), "position_bias": (heads, head_dim)}
    tensors = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    return {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in tensors.items()}


def run(inputs: dict[str, Tensor], dtype: torch.dtype, function=None, upstream: Tensor | None = None, **options):
    """Output and, given an upstream gradient, the gradient of every input, by name."""
    leaves = {name: x.detach().to(dtype).requires_grad_(upstream is not None) for name, x in inputs.items()}
    out = (function or ops.reference.chunked_attention)(**leaves, **options)
    results = {"out": out.detach()}
    if upstream is not None:
        names = list(leaves)
        gradients = torch.autograd.grad(out, [leaves[name] for name in names], upstream.to(dtype))
        results |= {f"grad of {name}": gradient for name, gradient in zip(names, gradients)}
    return results


def make_key_mask(keys: int = 150) -> Tensor:
    """Item 0: spans hidden, among them a whole tile of 64 keys and whole windows. Item 1: everything. Item 2: noise."""
    mask = torch.ones(3, keys, dtype=torch.bool)
    mask[0, 3:20] = mask[0, 60:130] = False
    mask[1] = False
    mask[2] = torch.rand(keys) < 0.5
    return mask
