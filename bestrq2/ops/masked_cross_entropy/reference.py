"""Specification of ``masked_cross_entropy``: every product, logit and gradient in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D), or (G, V, D)
    targets: Tensor,  # (...), or (..., G), int64
    *,
    mask: Tensor | None = None,  # (...) bool, or float row weights
    bias: Tensor | None = None,  # (V,), or (G, V)
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``(loss, accuracy)`` as :func:`bestrq2.ops.masked_cross_entropy` defines them; differentiable by autograd.

    Computes the logits of every row and stores them, in static shapes and without a host synchronisation. The loss is
    float32 (float64 for float64 logits).
    """
    if weight.dim() == 3:
        results = [
            masked_cross_entropy(
                hidden, w, targets[..., g], mask=mask, bias=None if bias is None else bias[g],
                ignore_index=ignore_index, reduction="sum" if reduction == "mean" else reduction,
                label_smoothing=label_smoothing, z_loss=z_loss,
            )
            for g, w in enumerate(weight)
        ]  # fmt: skip
        losses, accuracies = (torch.stack(parts, -1) for parts in zip(*results))
        if reduction == "mean":  # over all pairs of a row and a codebook that count
            return losses.sum() / _mean_divisor(_row_weights(targets, mask, ignore_index, losses.dtype)), accuracies
        return losses if reduction == "none" else losses.sum(), accuracies

    targets_given = targets = targets.long()
    num_classes = weight.shape[0]
    selected = _row_weights(targets, mask, ignore_index, torch.float32) != 0
    valid = (targets >= 0) & (targets < num_classes)
    # Rows that do not count may hold anything (padding, NaN, target -1): replace them before they meet arithmetic.
    targets = torch.where(selected & valid, targets, 0)
    hidden = torch.where(selected.unsqueeze(-1), hidden, 0)

    logits = F.linear(hidden, weight, bias)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).flatten(0, -2)  # (N, V)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(-1).square()
    losses = losses.reshape(targets.shape).masked_fill(selected & ~valid, float("nan"))
    correct = (logits.detach().argmax(-1).reshape(targets.shape) == targets).to(losses.dtype)

    weights = _row_weights(targets_given, mask, ignore_index, losses.dtype)
    total = weights.sum()
    losses = torch.where(selected, losses * weights, 0)
    accuracy = (correct * weights).sum() / torch.where(total == 0, 1, total)
    if reduction == "none":
        return losses, accuracy
    return (losses.sum() / _mean_divisor(weights) if reduction == "mean" else losses.sum()), accuracy


def _row_weights(targets: Tensor, mask: Tensor | None, ignore_index: int | None, dtype: torch.dtype) -> Tensor:
    """The weight of every target, of its shape; 0 where the row is not masked or the target is ``ignore_index``."""
    weights = torch.ones_like(targets, dtype=dtype)
    if mask is not None:
        mask = mask if mask.dim() == targets.dim() else mask.unsqueeze(-1)
        weights = torch.where(mask != 0, mask, 0).to(dtype).expand(targets.shape)
    return weights if ignore_index is None else torch.where(targets != ignore_index, weights, 0)


def _mean_divisor(weights: Tensor) -> Tensor:
    """Their sum, 1 where it is 0; NaN if one is negative, because the mean of weights that cancel is undefined."""
    total = torch.where(weights >= 0, weights, torch.nan).sum()
    return torch.where(total == 0, 1, total)


def masked_cross_entropy_gradients(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,) int64
    *,
    row_weights: Tensor,  # (N,) floating, of the dtype of the loss
    bias: Tensor | None,  # (V,)
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, ...]:
    """The same in formulas, as the kernels compute it: weighted losses (N,), accuracy, and the gradients of their sum.

    With probabilities ``p = exp(z - lse)`` and row weight ``w``, the gradient of a row's loss in its logits is

        dz = w * (p * (1 + 2 * z_loss * lse) - (1 - label_smoothing) * onehot(target) - label_smoothing / V)

    from which ``d hidden = dz @ weight``, ``d weight = dz^T @ hidden`` and ``d bias = sum of dz over rows``. Gradients
    that are not ``wanted`` (in this order) are empty.
    """
    num_classes = weight.shape[0]
    selected = row_weights != 0
    valid = (targets >= 0) & (targets < num_classes)
    targets = torch.where(selected & valid, targets, 0)
    hidden = torch.where(selected.unsqueeze(-1), hidden, 0)

    z = F.linear(hidden, weight, bias).to(row_weights.dtype)  # (N, V)
    largest = z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # finite also where every logit is -inf
    relative = z - largest  # large common offsets would round differences away
    log_sum = relative.logsumexp(-1, keepdim=True)  # (N, 1)
    lse = largest + log_sum
    target_z = relative.gather(1, targets.unsqueeze(1))  # (N, 1)
    losses = log_sum - (1 - label_smoothing) * target_z + z_loss * lse.square()
    if label_smoothing:  # 0 times the mean over a class that the bias excludes by -inf would be NaN
        losses = losses - label_smoothing * relative.mean(1, keepdim=True)
    losses = torch.where(selected, losses.squeeze(1) * row_weights, 0).masked_fill(selected & ~valid, float("nan"))
    correct = (z.argmax(1) == targets).to(row_weights.dtype)
    total = row_weights.sum()
    accuracy = (correct * row_weights).sum() / torch.where(total == 0, 1, total)

    grads = [hidden.new_empty(0) for _ in wanted]
    if any(wanted):
        dz = (relative - log_sum).exp_().mul_(1 + 2 * z_loss * lse).sub_(label_smoothing / num_classes)
        dz.scatter_add_(1, targets.unsqueeze(1), torch.full_like(target_z, label_smoothing - 1))
        dz = torch.where(selected.unsqueeze(1), dz * row_weights.unsqueeze(1), 0)
        dz_low = dz.to(hidden.dtype)
        grads = [
            dz_low @ weight if wanted[0] else grads[0],
            dz_low.T @ hidden if wanted[1] else grads[1],
            dz.sum(0).to(hidden.dtype) if wanted[2] else grads[2],
        ]
    return losses, accuracy, *grads
