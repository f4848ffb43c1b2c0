"""``masked_cross_entropy`` on CPUs with bf16 instructions: the whole operation in C++ (csrc/masked_cross_entropy/)."""

import torch
from torch import Tensor

from .._impl import native

CHUNK_ROWS = 640
"""Rows of one chunk at most, if there are several. Every chunk reads and writes the weight gradient once more, every
row of a chunk keeps its exponentials: docs/kernels/masked_cross_entropy.md has the measurement."""

SINGLE_CHUNK_ROWS = 1024
"""So many rows are one chunk: a second one would need an fp32 sum of weight gradients that takes more memory."""

ROWS_MULTIPLE = 32
"""Rows of a panel of the kernels."""


def chunk_rows(count: int) -> int:
    """Rows of one chunk: an even division of ``count`` into as few chunks as the limits allow, in whole panels."""
    chunks = 1 if count <= SINGLE_CHUNK_ROWS else -(-count // CHUNK_ROWS)
    return max(ROWS_MULTIPLE, -(-count // chunks // ROWS_MULTIPLE) * ROWS_MULTIPLE)


def run_bf16(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (G, V, D)
    bias: Tensor | None,  # (G, V)
    targets: Tensor,  # (G, N) contiguous
    index: Tensor | None,  # (M,) the rows that count; None: all
    row_weights: Tensor | None,  # (N,) or (G, N) fp32 contiguous, or None: 1 each
    scale: float,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool, bool],
    losses: Tensor,  # (G, N) fp32, written where rows count
    correct: Tensor,  # (G, N) fp32, the same
) -> list[Tensor]:
    """The gradients that are wanted of hidden, weight and bias, in their dtypes; the others empty.

    Operands in fp32 are rounded to bf16 on their way into the kernel, so autocast makes no copies of them.
    """
    rows, classes = (_kernel_dtype(x).contiguous() for x in (hidden, weight))
    # Added in fp32, after rounding: a bias has the dtype of the products.
    cast_bias = None if bias is None else bias.to(torch.bfloat16).to(torch.float32).contiguous()
    count = len(rows) if index is None else len(index)
    # Rows that do not count are not written.
    grad_hidden = (torch.empty_like if index is None else torch.zeros_like)(rows) if wanted[0] else None
    grad_weight = torch.empty_like(classes) if wanted[1] else None
    grad_bias = torch.empty(classes.shape[:2], dtype=torch.float32, device="cpu") if wanted[2] else None
    native.extension().masked_cross_entropy(
        {
            "hidden": _address(rows),
            "hidden_bf16": rows.dtype == torch.bfloat16,
            "weight": _address(classes),
            "weight_bf16": classes.dtype == torch.bfloat16,
            "bias": _address(cast_bias),
            "rows": len(rows),
            "count": count,
            "num_codebooks": classes.shape[0],
            "classes": classes.shape[1],
            "features": classes.shape[2],
            "index": _address(index),
            "targets": _address(targets),
            "row_weights": _address(row_weights),
            "row_weights_stride": 0 if row_weights is None or row_weights.dim() == 1 else len(rows),
            "scale": scale,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "losses": _address(losses),
            "correct": _address(correct),
            "grad_hidden": _address(grad_hidden),
            "grad_weight": _address(grad_weight),
            "grad_bias": _address(grad_bias),
            "chunk_rows": chunk_rows(count),
            "threads": torch.get_num_threads(),
        }
    )
    sources = (hidden, weight, weight if bias is None else bias)
    grads = (grad_hidden, grad_weight, grad_bias)
    return [x.new_empty(0) if grad is None else grad.to(x.dtype) for x, grad in zip(sources, grads)]


def _kernel_dtype(x: Tensor) -> Tensor:
    """``x`` in a dtype that the kernel reads: its own, except fp16."""
    return x.to(torch.bfloat16) if x.dtype == torch.float16 else x


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
