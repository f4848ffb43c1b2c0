"""What ``masked_cross_entropy`` accepts, and the errors for everything else."""

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
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
    if hidden.dim() < 1 or weight.dim() not in (2, 3) or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{op}: expected hidden (..., D) and weight (V, D) or (G, V, D), got hidden {tuple(hidden.shape)} and "
            f"weight {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight must have at least one class and one feature, got {tuple(weight.shape)}")
    expected = (*hidden.shape[:-1], *weight.shape[:-2])
    if targets.shape != expected:
        raise ValueError(
            f"{op}: expected targets {tuple(expected)} with weight {tuple(weight.shape)}, got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be int64, got {targets.dtype}")
    if mask is not None:
        if mask.shape != hidden.shape[:-1]:
            raise ValueError(f"{op}: expected mask {tuple(hidden.shape[:-1])}, got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and mask.dtype not in DTYPES:
            raise TypeError(f"{op}: mask must be bool or floating row weights, got {mask.dtype}")
        if mask.requires_grad:
            raise ValueError(f"{op}: row weights are not differentiable; pass mask.detach()")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"{op}: expected bias {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias), ("targets", targets), ("mask", mask)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but hidden is on {hidden.device}")
        if name in ("hidden", "weight", "bias"):
            if tensor.dtype not in DTYPES:
                raise TypeError(f"{op}: {name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
            device = hidden.device.type
            autocast = device != "meta" and torch.is_autocast_enabled(device)
            autocast = autocast and torch.float64 not in (dtype, tensor.dtype)
            if tensor.dtype != dtype and not autocast:
                raise TypeError(f"{op}: {name} is {tensor.dtype} but the products run in {dtype}")


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
            row, given = int(bad.nonzero()[0]), row_weights[bad][0].item()
            raise ValueError(f"{op}: row weights of a mean must be >= 0 and finite, got {given} in row {row}")
    if max_rows is not None and row_weights is not None:
        count = int((row_weights != 0).reshape(-1, targets.shape[1]).any(0).sum())
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
