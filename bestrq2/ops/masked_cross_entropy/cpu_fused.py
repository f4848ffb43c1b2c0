"""``masked_cross_entropy`` on CPUs as a whole in C++ (csrc/masked_cross_entropy/), with products of its own."""

import torch
from torch import Tensor

from ..common import native

BF16_CHUNK_ROWS = 640
"""Rows of one chunk in bf16 at most, if there are several. Every chunk reads and writes the weight gradient once more,
every row of a chunk keeps its exponentials: docs/kernels/masked_cross_entropy.md has the measurement."""

BF16_SINGLE_CHUNK_ROWS = 1024
"""So many rows are one chunk in bf16: a second one would need an fp32 sum of weight gradients that takes more
memory."""

BF16_ROWS_MULTIPLE = 32
"""Rows of a panel of the bf16 kernels."""

FP32_INSTRUCTIONS = ("avx2",)
"""Instruction sets with which the fp32 kernels are faster than products of the library: where they are measured."""

FP32_FEATURES = 768
"""Widest rows for which they are faster; with 1024 features they took 4 % less to 9 % more time than the library."""

FP32_CHUNK_ROWS = 512
"""Rows of one chunk in fp32 at most. More would pass from a farther cache for every few classes of the gradient."""


def is_fused(dtype: torch.dtype, features: int) -> bool:
    """True if products in this dtype of rows of so many features are our own on this processor."""
    if dtype == torch.bfloat16:
        return native.extension().bf16_dot() != "none"
    suits = features <= FP32_FEATURES and native.extension().isa() in FP32_INSTRUCTIONS
    return dtype == torch.float32 and suits


def bf16_chunk_rows(count: int) -> int:
    """Rows of one chunk: an even division of ``count`` into as few chunks as the limits allow, in whole panels."""
    chunks = 1 if count <= BF16_SINGLE_CHUNK_ROWS else -(-count // BF16_CHUNK_ROWS)
    return max(BF16_ROWS_MULTIPLE, -(-count // chunks // BF16_ROWS_MULTIPLE) * BF16_ROWS_MULTIPLE)


def run_fused(
    dtype: torch.dtype,  # of the products, bf16 or fp32
    chunk_rows: int,
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (G, V, D)
    bias: Tensor | None,  # (G, V)
    targets: Tensor,  # (G, N) contiguous
    index: Tensor | None,  # (M,) the rows that count; None: all
    row_weights: Tensor | None,  # (N,) or (G, N) fp32 contiguous, or None: 1 each
    options: tuple[float, float, float],  # scale, label_smoothing, z_loss
    wanted: tuple[bool, bool, bool],
    losses: Tensor,  # (G, N) fp32, written where rows count
    correct: Tensor,  # (G, N) fp32, the same
) -> list[Tensor | None]:
    """The gradients that are wanted of hidden, weight and bias, in fp32 or bf16; None for the others.

    Operands in fp32 are rounded to bf16 on their way into the bf16 kernel, so autocast makes no copies of them.
    """
    rows, classes = (_kernel_dtype(x, dtype).contiguous() for x in (hidden, weight))
    # Added in fp32, after rounding: a bias has the dtype of the products.
    cast_bias = None if bias is None else bias.to(dtype).to(torch.float32).contiguous()
    count = len(rows) if index is None else len(index)
    # Rows that do not count are not written.
    grad_hidden = (torch.empty_like if index is None else torch.zeros_like)(rows) if wanted[0] else None
    grad_weight = torch.empty_like(classes) if wanted[1] else None
    grad_bias = torch.empty(classes.shape[:2], dtype=torch.float32, device="cpu") if wanted[2] else None
    extension = native.extension()
    run = extension.masked_cross_entropy_bf16 if dtype == torch.bfloat16 else extension.masked_cross_entropy_fp32
    run(
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
            "scale": options[0],
            "label_smoothing": options[1],
            "z_loss": options[2],
            "losses": _address(losses),
            "correct": _address(correct),
            "grad_hidden": _address(grad_hidden),
            "grad_weight": _address(grad_weight),
            "grad_bias": _address(grad_bias),
            "chunk_rows": chunk_rows,
            "threads": torch.get_num_threads(),
        }
    )
    return [grad_hidden, grad_weight, grad_bias]


def _kernel_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in a dtype that the kernel reads: bf16 kernels read fp32, too."""
    return x if dtype == torch.bfloat16 and x.dtype == torch.float32 else x.to(dtype)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
