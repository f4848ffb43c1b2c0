"""Linear classifier and cross-entropy over the masked rows, without ever storing the (rows, classes) logits."""

from typing import Literal, overload

import torch
from torch import Tensor

from ..common.arguments import integer, number, require_tensors
from ..common.dispatch import Backend, requested
from ..common.transforms import refuse_transforms
from .checks import Reduction, compute_dtype, validate
from .operator import MaskedCrossEntropy, Options

__all__ = ["masked_cross_entropy"]


@overload
def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: Literal[False] = False,
    recompute: bool | None = None,
    max_rows: int | None = None,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: Literal[True],
    recompute: bool | None = None,
    max_rows: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: bool,
    recompute: bool | None = None,
    max_rows: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: bool = False,
    recompute: bool | None = None,
    max_rows: int | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return ``cross_entropy(linear(hidden, weight, bias), targets)`` over the masked rows.

    With ``z = linear(hidden, weight, bias)`` and, in fp32, ``lse = log sum_v exp(z_v)``, one row costs

        loss = lse - (1 - label_smoothing) * z[target] - label_smoothing * mean_v(z_v) + z_loss * lse^2

    (label smoothing as in ``torch.nn.functional.cross_entropy``; the z-loss keeps the normaliser near 1: Chowdhery et
    al., PaLM, 2022, section 5, where its coefficient is 1e-4). Rows are weighted by ``mask`` and the mean divides by
    the sum of the weights. Where nothing is masked, the loss is 0 and every gradient is 0.

    Several codebooks, each with a classifier of its own on the same rows, are one call: ``weight`` (G, V, D) and
    ``targets`` (..., G), as :func:`bestrq2.ops.quantize` returns them. ``"mean"`` is then the mean over the codebooks
    too. The rows are read once, and their gradient is summed over the codebooks in fp32.

    Differentiable once in ``hidden``, ``weight`` and ``bias``, deterministic, without filtering or approximation of
    gradients. Sums of gradients are fp32, and so is the loss. Inside ``torch.autocast`` the products run in the
    autocast dtype like ``F.linear``. How it is computed, and what ``recompute`` and ``max_rows`` cost or save, is in
    docs/kernels/masked_cross_entropy.md.

    Compared with ``torch.nn.functional.linear_cross_entropy`` (torch 2.13 and later): ``hidden`` is its ``input``,
    ``weight`` its ``linear_weight`` (not its ``weight``, which are class weights), ``targets`` its ``target``, ``bias``
    its ``linear_bias``. ``ignore_index``, ``reduction`` and ``label_smoothing`` mean the same.

    Args:
        hidden: (..., D) rows in fp32, bf16, fp16 or fp64, of any strides.
        weight: (V, D) one row per class, or (G, V, D), in the dtype of ``hidden`` unless inside autocast.
        targets: (...) or (..., G) integer classes in [0, V). Where a row is not masked its target is ignored, also if
            out of range.
        mask: (...) bool, the rows that count, or floating row weights (0: does not count); None: every row. Rows that
            do not count may hold NaN. A weight of NaN or infinity counts and makes the loss so; those of a mean must be
            finite and not negative. Not differentiable.
        bias: (V,) or (G, V), added to the logits.
        ignore_index: a row with this target counts as not masked. With several codebooks a row is left out only for the
            codebooks whose target is this; the mean then divides by the sum of weights over all (row, codebook) pairs
            that count. May be any integer, also a class. None: no target is ignored, which saves a GPU a gather of the
            rows where there is no mask.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (the weighted loss of each row, 0 where it does not count).
        label_smoothing: in [0, 1].
        z_loss: coefficient of ``lse^2``, at least 0.
        return_accuracy: also return the top-1 accuracy of the masked rows.
        recompute: compute the logits again in the backward instead of keeping gradients; None: as above. Inside
            ``torch.no_grad`` it changes nothing.
        max_rows: the caller's promise that at most so many rows of the mask count. More of them are an error for CPU
            tensors and make the loss NaN on a GPU.
        backend: ``"triton"``, ``"cpu"``, ``"reference"``; None chooses the first that can run the call.

    Returns:
        The loss, fp32 (fp64 for fp64 products): a scalar, or like ``targets`` for ``"none"``. With ``return_accuracy``
        the pair of loss and accuracy: the weighted share of masked rows whose largest logit (the first of equal ones)
        is the target's, a detached scalar (with codebooks (G,), one each), 0 where nothing is masked.

    Raises:
        TypeError: for wrong dtypes, and for what is no tensor, integer or number where one is expected.
        ValueError: for wrong shapes, devices or options; for CPU tensors also for a masked row whose target is outside
            [0, V) and for a negative, infinite or NaN weight of ``"mean"``, naming the first such row, and for more
            masked rows than ``max_rows``. GPU backends do not wait for the data: there such a target or weight makes
            the loss NaN.
        RuntimeError: if the requested backend cannot run the call.

    Example:
        >>> hidden, weight = torch.randn(2, 50, 64), torch.randn(512, 64)
        >>> targets, mask = torch.randint(512, (2, 50)), torch.rand(2, 50) < 0.5
        >>> loss, accuracy = masked_cross_entropy(hidden, weight, targets, mask=mask, return_accuracy=True)
        >>> loss.shape, accuracy.shape
        (torch.Size([]), torch.Size([]))
    """
    op = "masked_cross_entropy"
    required = {"hidden": hidden, "weight": weight, "targets": targets}
    require_tensors(op, required, {"mask": mask, "bias": bias})
    label_smoothing = number(f"{op}: label_smoothing", label_smoothing)
    z_loss = number(f"{op}: z_loss", z_loss)
    if ignore_index is not None:
        ignore_index = integer(f"{op}: ignore_index", ignore_index, also=" or None")
    if max_rows is not None:
        max_rows = integer(f"{op}: max_rows", max_rows, 0, " or None")
    refuse_transforms(op, hidden, weight, bias, any_level=True)
    dtype = compute_dtype(hidden)
    validate(hidden, weight, targets, mask, bias, reduction, label_smoothing, z_loss, max_rows, dtype)
    if recompute is False and reduction == "none":
        raise ValueError(f'{op}: reduction "none" always recomputes; got recompute=False')
    with_grad = torch.is_grad_enabled()
    loss, accuracy = MaskedCrossEntropy.apply(
        hidden,
        weight,
        bias,
        targets.long(),
        None if mask is None else mask.detach(),
        reduction,
        bool(recompute),
        tuple(with_grad and x is not None and x.requires_grad for x in (hidden, weight, bias)),
        Options(reduction == "mean", dtype, label_smoothing, z_loss, ignore_index, max_rows, requested(backend)),
    )
    # detach: torch.compile of torch 2.11 takes it for differentiable otherwise.
    return (loss, accuracy.detach()) if return_accuracy else loss
