"""The operator ``torch.ops.bestrq2.masked_cross_entropy``: choice of the backend, shapes for tracing, autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common import native
from ..common.dispatch import choose_backend
from ..common.library import fragment
from ..common.transforms import is_batched, refuse_second_derivative
from . import cpu, reference
from .checks import check_rows


class Options(NamedTuple):
    """Arguments of the operator after its tensors and the wanted gradients, in the order of its schema."""

    normalize: bool  # divide by the sum of the row weights of all codebooks
    dtype: torch.dtype  # of the products
    label_smoothing: float
    z_loss: float
    ignore_index: int | None
    max_rows: int | None
    backend: str


class MaskedCrossEntropy(torch.autograd.Function):
    """Loss and accuracy of the public function. Gradients are computed along with them, or in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, mask, reduction, recompute, wanted, options):  # type: ignore[override]
        several = weight.dim() == 3
        ctx.inputs = [None if x is None else (x.shape, x.dtype) for x in (hidden, weight, bias)]
        rows = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
        targets_GN = targets.reshape(-1, weight.shape[0]).T if several else targets.reshape(1, -1)
        row_weights = None if mask is None else mask.reshape(-1)  # (N,)
        if not several:
            weight, bias = weight[None], None if bias is None else bias[None]
        keep = reduction != "none" and not recompute
        losses, accuracy, factor, *grads = torch.ops.bestrq2.masked_cross_entropy.default(
            rows, weight, targets_GN, row_weights, bias, *(want and keep for want in wanted), *options
        )
        ctx.reduction, ctx.options, ctx.wanted, ctx.keep = reduction, options, wanted, keep
        if keep:
            ctx.save_for_backward(factor, *grads)
        else:
            ctx.save_for_backward(rows, weight, bias, targets_GN, row_weights)
        accuracy = accuracy if several else accuracy[0]
        ctx.mark_non_differentiable(accuracy)
        return losses.T.reshape(targets.shape) if reduction == "none" else losses.sum(), accuracy

    @staticmethod
    def backward(ctx, grad_loss, _grad_accuracy):  # type: ignore[override]
        refuse_second_derivative("masked_cross_entropy")
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
                rows, weight, targets, row_weights, bias, *ctx.wanted, *ctx.options
            )
        scale = factor if ctx.reduction == "none" else grad_loss * factor
        of_inputs = (
            _scaled(grad, scale, like[1]).reshape(like[0]) if want else None
            for grad, want, like in zip(grads, ctx.wanted, ctx.inputs)
        )
        return (*of_inputs, *(None,) * 6)


def _scaled(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * scale`` in ``dtype``, in place where no second backward can read ``grad`` again."""
    # A CPU scalar can be read without waiting for anything, and it usually is 1.
    free = not (torch.compiler.is_compiling() or is_batched(scale) or _graph_is_retained())
    if free and scale.device.type == "cpu" and scale.item() == 1.0:
        return grad.to(dtype)
    if free and grad.is_cuda and grad.is_contiguous() and native.triton_obstacle(grad.device) is None:
        from bestrq2.kernels.masked_cross_entropy.launch import scale as scale_in_place

        scale_in_place(grad, scale.float())
        return grad.to(dtype)
    scale = scale.reshape(1)  # a tensor without dimensions would first be rounded to the dtype of grad
    return (grad.mul_(scale) if free else grad * scale).to(dtype)


def _graph_is_retained() -> bool:
    """Return True if the running backward was called with ``retain_graph=True`` (or if torch does not tell)."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()


_library = fragment()
_library.define(
    "masked_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_weights, Tensor? bias, "
    "bool grad_hidden, bool grad_weight, bool grad_bias, bool normalize, ScalarType dtype, float label_smoothing, "
    "float z_loss, SymInt? ignore_index, SymInt? max_rows, str backend) "
    "-> (Tensor losses, Tensor accuracy, Tensor factor, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("bestrq2::masked_cross_entropy", "CompositeExplicitAutograd", lib=_library)
def _run(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (G, V, D)
    targets: Tensor,  # (G, N)
    row_weights: Tensor | None,  # (N,) or (G, N) bool or floating; rows of weight 0 are not looked at
    bias: Tensor | None,  # (G, V)
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Weighted losses (G, N), accuracies (G,), and the wanted gradients of the sum of losses: times ``factor``.

    ``factor`` is 1 unless the products run in fp16, whose range the division by many rows, or large and small weights
    of rows, would leave. Sums over many rows would leave it as well: then gradients of weight and bias are fp32.
    """
    options = Options(*rest)
    keep = None if options.ignore_index is None else targets != options.ignore_index
    if keep is not None and (hidden.device.type != "cpu" or not keep.all()):  # a GPU is not asked: it would wait
        if row_weights is None and options.max_rows is None:
            options = options._replace(max_rows=len(hidden))  # nearly every row counts: library products
        row_weights = _without_ignored(row_weights, keep)
        targets = torch.where(keep, targets, 0)
    else:
        keep = None
    if hidden.device.type == "cpu":
        check_rows(targets, row_weights, weight.shape[1], options.max_rows, any_weights=not options.normalize)
    if options.normalize and row_weights is not None and row_weights.is_floating_point():
        # On a GPU nothing reads the values. The mean of weights that cancel is undefined: it becomes NaN.
        row_weights = torch.where(row_weights >= 0, row_weights, torch.nan)
    # The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled.
    obstacles = {
        "triton": lambda: _triton_obstacle(hidden),
        "cpu": lambda: cpu.obstacle(hidden),
        "reference": lambda: None,
    }
    chosen = choose_backend("masked_cross_entropy", options.backend or None, obstacles)
    wanted = (grad_hidden, grad_weight, grad_bias)
    settings = (options.normalize, options.dtype, options.label_smoothing, options.z_loss)
    arguments = (hidden, weight, targets, row_weights, bias, *settings, wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "triton":
            losses, *results = _run_triton(*arguments, options.max_rows)
        else:
            losses, *results = (cpu.run if chosen == "cpu" else _run_reference)(*arguments)
    # A row that counts for another codebook was computed: its loss was multiplied by 0, which NaN and infinity survive.
    return losses if keep is None or len(weight) == 1 else losses.masked_fill(~keep, 0), *results


def _without_ignored(row_weights: Tensor | None, keep: Tensor) -> Tensor:
    """The row weights with 0 where ``keep`` (G, N) is not set: (N,) for one codebook, else (G, N)."""
    if len(keep) == 1 and (row_weights is None or row_weights.dim() == 1):
        keep = keep[0]
    if row_weights is None:
        return keep
    return row_weights & keep if row_weights.dtype == torch.bool else torch.where(keep, row_weights, 0)


def _triton_obstacle(hidden: Tensor) -> str | None:
    if hidden.dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, not in fp64"
    return native.triton_obstacle(hidden.device)


def _run_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from bestrq2.kernels.masked_cross_entropy.launch import masked_cross_entropy

    return masked_cross_entropy(*arguments)


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
    total = _nonzero(weights.sum()) * (len(weight) if weights.dim() == 1 else 1) if normalize else factor
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
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtype = Options(*rest).dtype
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
