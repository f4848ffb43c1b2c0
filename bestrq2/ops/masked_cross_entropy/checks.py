"""Argument checks of ``masked_cross_entropy``."""

from typing import Literal

import torch
from torch import Tensor

from ..common.shapes import check_devices, check_shapes

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def validate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    max_rows: int | None,
    dtype: torch.dtype,
) -> None:
    """Raise TypeError or ValueError for what no backend accepts; looks at no value of a tensor."""
    op = "masked_cross_entropy"
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss must be at least 0, got {z_loss}")
    if max_rows is not None and mask is None:
        raise ValueError(f"{op}: max_rows bounds the rows that a mask selects, but there is no mask")
    sizes = check_shapes(op, hidden=(hidden, "... D"), weight=(weight, "G? V D"), mask=(mask, "..."))
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight must have at least one class and one feature, got {tuple(weight.shape)}")
    several = "G" in sizes
    check_shapes(
        op,
        hidden=(hidden, "... D"),
        weight=(weight, "G V D" if several else "V D"),
        targets=(targets, "... G" if several else "..."),
        bias=(bias, "G V" if several else "V"),
    )
    if targets.dtype not in INTEGERS:
        raise TypeError(f"{op}: targets must be integers, got {targets.dtype}")
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in DTYPES:
            raise TypeError(f"{op}: mask must be bool or floating row weights, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError(f"{op}: row weights are not differentiable; pass mask.detach()")
    check_devices(op, hidden=hidden, weight=weight, bias=bias, targets=targets, mask=mask)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
        autocast = _autocast(hidden) and torch.float64 not in (dtype, tensor.dtype)
        if tensor.dtype != dtype and not autocast:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but the products run in {dtype}")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: that of autocast inside autocast, except for float64 rows."""
    if hidden.dtype != torch.float64 and _autocast(hidden):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _autocast(hidden: Tensor) -> bool:
    return hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type)


def check_rows(
    targets: Tensor,  # (G, N)
    row_weights: Tensor | None,  # (N,) or (G, N)
    num_classes: int,
    max_rows: int | None,
    *,
    any_weights: bool,
) -> None:
    """Name the first row that cannot be computed. Only for CPU tensors, where reading a value waits for nothing."""
    op = "masked_cross_entropy"
    if row_weights is not None and row_weights.dtype != torch.bool and not any_weights:
        bad = ~((row_weights >= 0) & (row_weights < torch.inf))
        if bad.any():
            row, given = int(bad.nonzero()[0][-1]), row_weights[bad][0].item()
            raise ValueError(f"{op}: row weights of a mean must be >= 0 and finite, got {given} in row {row}")
    if max_rows is not None and row_weights is not None:
        counts = row_weights != 0
        count = int((counts if counts.dim() == 1 else counts.any(0)).sum())
        if count > max_rows:
            raise ValueError(f"{op}: {count} rows are masked but max_rows is {max_rows}")
    bad = (targets < 0) | (targets >= num_classes)
    if row_weights is not None:
        bad &= row_weights != 0
    if bad.any():
        codebook, row = bad.nonzero()[0].tolist()
        of_codebook = f" of codebook {codebook}" if len(targets) > 1 else ""
        raise ValueError(
            f"{op}: target {int(targets[codebook, row])} of row {row}{of_codebook} is outside the {num_classes} classes"
        )
