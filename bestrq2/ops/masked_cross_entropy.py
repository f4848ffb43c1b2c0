"""Linear classifier and cross-entropy over the masked rows, without ever storing the (rows, classes) logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native, reference
from .arguments import integer, number, require_tensors
from .dispatch import choose_backend, requested
from .masked_cross_entropy_checks import check_rows, validate
from .masked_cross_entropy_cpu import run_cpu
from .transforms import is_batched, refuse_transforms

__all__ = ["masked_cross_entropy"]


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: bool = False,
    recompute: bool | None = None,
    max_rows: int | None = None,
    backend: str | None = None,
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

    Differentiable once in ``hidden``, ``weight`` and ``bias``; the gradients of ``weight`` and ``bias`` are accumulated
    in fp32 over chunks of rows, no gradient is filtered or approximated, and the result is deterministic. Nothing is
    computed for inputs that do not require a gradient. Two forms: the gradients are computed along with the loss and
    kept for the backward (the default for ``"mean"`` and ``"sum"``: the fewest operations), or the forward computes
    losses only and keeps nothing, and the backward computes the logits once more (``recompute=True``, always for
    ``"none"``: a third more operations). The second is for many losses of one graph, whose gradients would otherwise
    all be held at once; its forward is also what runs where no gradient is needed.

    Inside ``torch.autocast`` the products run in the autocast dtype like ``F.linear``; the gradients have the dtype of
    their inputs, and that of an fp32 weight is not rounded to the autocast dtype on its way. The transforms of
    ``torch.func`` do not work and say so.

    On a GPU the host never waits, so it never learns how many rows are masked. With a mask the rows that count are
    listed on the device and kernels of our own leave out the others. If nearly every row counts, or a bound of their
    number is known, ``max_rows`` replaces those kernels by library products over so many rows: use the number of rows
    for a mask that only excludes padding. On a CPU the masked rows are gathered inside.

    Args:
        hidden: (..., D) rows in fp32, bf16, fp16 or fp64, of any strides.
        weight: (V, D) one row per class, or (G, V, D), in the dtype of ``hidden`` unless inside autocast.
        targets: (...) or (..., G) int64 classes in [0, V). Where a row is not masked its target is ignored, also if out
            of range.
        mask: (...) bool, the rows that count, or floating row weights (0: does not count); None: every row. Rows that
            do not count may hold NaN. A weight of NaN or infinity counts and makes the loss so; those of a mean must be
            finite and not negative. Not differentiable.
        bias: (V,) or (G, V), added to the logits.
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
    if max_rows is not None:
        max_rows = integer(f"{op}: max_rows", max_rows, 0, " or None")
    refuse_transforms(op, hidden, weight, bias, any_level=True)
    dtype = _compute_dtype(hidden)
    validate(hidden, weight, targets, mask, bias, reduction, label_smoothing, z_loss, max_rows, dtype)
    if recompute is False and reduction == "none":
        raise ValueError('masked_cross_entropy: reduction "none" always recomputes; got recompute=False')
    with_grad = torch.is_grad_enabled()
    loss, accuracy = _MaskedCrossEntropy.apply(
        hidden,
        weight,
        bias,
        targets,
        None if mask is None else mask.detach(),
        reduction,
        bool(recompute),
        (dtype, label_smoothing, z_loss),
        (max_rows, requested(backend)),
        (
            with_grad and hidden.requires_grad,
            with_grad and weight.requires_grad,
            with_grad and bias is not None and bias.requires_grad,
        ),
    )
    return (loss, accuracy) if return_accuracy else loss


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, mask, reduction, recompute, options, execution, wanted):  # type: ignore[override]
        several = weight.dim() == 3
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (hidden, weight, bias)]
        rows = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
        targets_GN = targets.reshape(-1, weight.shape[0]).T if several else targets.reshape(1, -1)
        mask_N = None if mask is None else mask.reshape(-1)
        if not several:
            weight, bias = weight[None], None if bias is None else bias[None]
        keep = reduction != "none" and not recompute
        losses, accuracy, factor, *grads = torch.ops.bestrq2.masked_cross_entropy.default(
            rows, weight, targets_GN, mask_N, bias, reduction == "mean", *options,
            *(want and keep for want in wanted), *execution,
        )  # fmt: skip
        ctx.reduction, ctx.options, ctx.execution, ctx.wanted, ctx.keep = reduction, options, execution, wanted, keep
        if keep:
            ctx.save_for_backward(factor, *grads)
        else:
            ctx.save_for_backward(rows, weight, bias, targets_GN, mask_N)
        accuracy = accuracy if several else accuracy[0]
        ctx.mark_non_differentiable(accuracy)
        return losses.T.reshape(targets.shape) if reduction == "none" else losses.sum(), accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_accuracy):  # type: ignore[override]
        if ctx.keep:
            factor, *grads = ctx.saved_tensors
        else:
            rows, weight, bias, targets, row_weights = ctx.saved_tensors
            if ctx.reduction == "none":  # the upstream gradient of a row is a weight of that row
                upstream = grad_loss.reshape(targets.shape[::-1]).T
                row_weights = (
                    upstream if row_weights is None else torch.where(row_weights != 0, upstream * row_weights, 0)
                )
            _, _, factor, *grads = torch.ops.bestrq2.masked_cross_entropy.default(
                rows, weight, targets, row_weights, bias, ctx.reduction == "mean", *ctx.options, *ctx.wanted,
                *ctx.execution,
            )  # fmt: skip
        scale = factor if ctx.reduction == "none" else grad_loss * factor
        grad_hidden, grad_weight, grad_bias = (
            _scaled(grad, scale, like[1]).reshape(like[0]) if want else None
            for grad, want, like in zip(grads, ctx.wanted, ctx.inputs)
        )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None, None


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale`` in ``dtype``, in place where no second backward can read ``grad`` again."""
    # A CPU scalar can be read without waiting for anything, and it usually is 1.
    free = not (torch.compiler.is_compiling() or is_batched(scale) or _graph_is_retained())
    if free and scale.device.type == "cpu" and scale.item() == 1.0:
        return grad.to(dtype)
    scale = scale.reshape(1)  # a tensor without dimensions would first be rounded to the dtype of grad
    return (grad.mul_(scale) if free else grad * scale).to(dtype)


def _graph_is_retained() -> bool:
    """Whether the backward that is running was called with ``retain_graph=True`` (True where torch does not tell)."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if hidden.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


_library = torch.library.Library("bestrq2", "FRAGMENT")
_library.define(
    "masked_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_weights, Tensor? bias, "
    "bool normalize, ScalarType dtype, float label_smoothing, float z_loss, "
    "bool grad_hidden, bool grad_weight, bool grad_bias, SymInt? max_rows, str backend) "
    "-> (Tensor losses, Tensor accuracy, Tensor factor, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("bestrq2::masked_cross_entropy", "CompositeExplicitAutograd", lib=_library)
def _run(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (G, V, D)
    targets: Tensor,  # (G, N)
    row_weights: Tensor | None,  # (N,) bool or floating; rows of weight 0 are not looked at. (G, N): unless normalize
    bias: Tensor | None,  # (G, V)
    normalize: bool,  # divide by the sum of the row weights, and by G
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    max_rows: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """Weighted losses (G, N), accuracies (G,), and the wanted gradients of the sum of losses: times ``factor``.

    ``factor`` is 1 unless the products run in fp16, whose range the division by many rows, or large and small weights
    of rows, would leave. Sums over many rows would leave it as well: then gradients of weight and bias are fp32.
    """
    if hidden.device.type == "cpu":
        check_rows(targets, row_weights, weight.shape[1], max_rows, any_weights=not normalize)
    if normalize and row_weights is not None and row_weights.is_floating_point():
        # Elsewhere nobody waits for the values. Weights that cancel would give a mean of no meaning: NaN says so.
        row_weights = torch.where(row_weights >= 0, row_weights, torch.nan)
    # The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled.
    chosen = choose_backend(
        "masked_cross_entropy",
        backend or None,
        {
            "triton": lambda: _triton_obstacle(hidden),
            "cpu": lambda: _cpu_obstacle(hidden),
            "reference": lambda: None,
        },
    )
    wanted = (grad_hidden, grad_weight, grad_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        arguments = (hidden, weight, targets, row_weights, bias, normalize, dtype, label_smoothing, z_loss, wanted)
        if chosen == "triton":
            return _run_triton(*arguments, max_rows)
        return (run_cpu if chosen == "cpu" else _run_reference)(*arguments)


def _triton_obstacle(hidden: Tensor) -> str | None:
    if hidden.dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, not in fp64"
    return native.triton_obstacle(hidden.device)


def _run_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from bestrq2.kernels.masked_cross_entropy.launch import masked_cross_entropy

    return masked_cross_entropy(*arguments)


def _cpu_obstacle(hidden: Tensor) -> str | None:
    if hidden.device.type != "cpu":
        return f"it needs CPU tensors, got {hidden.device.type!r}"
    if hidden.dtype == torch.float64:
        return "it computes in fp32 and bf16, not in fp64"
    return native.extension_obstacle()


def _run_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.ones_like(targets[0], dtype=loss_dtype) if row_weights is None else row_weights.to(loss_dtype)
    factor = torch.ones_like(weights.flatten()[:0].sum())
    total = _nonzero(weights.sum()) * len(weight) if normalize else factor
    half = dtype == torch.float16
    if half and weights.numel():
        largest = _nonzero(weights.nan_to_num(0, 0, 0).abs().max())  # one NaN must not reach the other rows
        weights, factor = weights / largest, largest / total
    elif not half:
        weights = weights / total
    operands: list[Any] = [
        None if x is None else x.to(dtype).float() if half else x.to(dtype) for x in (hidden, weight, bias)
    ]
    results = [
        reference.masked_cross_entropy_gradients(
            operands[0], operands[1][g], of_codebook, row_weights=weights if weights.dim() == 1 else weights[g],
            bias=None if bias is None else operands[2][g],
            label_smoothing=label_smoothing, z_loss=z_loss, wanted=wanted,
        )
        for g, of_codebook in enumerate(targets)
    ]  # fmt: skip
    losses, accuracy, of_hidden, *of_classifiers = (torch.stack(parts) for parts in zip(*results))
    grads = [of_hidden[0] if len(of_hidden) == 1 else of_hidden.sum(0, dtype=loss_dtype)]
    grads += [grad if want else grad[0] for grad, want in zip(of_classifiers, wanted[1:])]
    sources = (hidden, weight, weight if bias is None else bias)
    dtypes = [torch.float32 if half and x is not hidden else x.dtype for x in sources]
    return losses * factor, accuracy, factor, *(grad.to(x) for grad, x in zip(grads, dtypes))


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1, total)


@torch.library.register_fake("bestrq2::masked_cross_entropy", lib=_library)
def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    bias: Tensor | None,
    normalize: bool,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    max_rows: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    losses = hidden.new_empty(targets.shape, dtype=loss_dtype)

    def gradient(source: Tensor | None, wanted: bool) -> Any:
        of = weight if source is None else source
        low = dtype == torch.float16 and source is not hidden  # see _run
        return of.new_empty(of.shape if wanted else 0, dtype=torch.float32 if low else of.dtype)

    return (
        losses,
        losses.new_empty(targets.shape[:1]),
        losses.new_empty(()),
        gradient(hidden, grad_hidden),
        gradient(weight, grad_weight),
        gradient(bias, grad_bias),
    )
