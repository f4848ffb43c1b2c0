"""CPU backend of ``masked_cross_entropy``: our own kernels where the processor has the instructions for them
(masked_cross_entropy_fused.py), else library matrix products over chunks of logits that stay in the cache.

for each chunk of masked rows                       (rows, V) is the only thing of its size
    h      = hidden[rows]                           gathered here, in the compute dtype
    logits = h @ weight.T + bias
    logits = softmax gradient, losses, accuracy     in place, one C++ pass
    grad_hidden[rows]  = logits @ weight            each row is written exactly once
    grad_weight       += logits.T @ h               fp32
    grad_bias         += logits.sum(0)              fp32
"""

import torch
from torch import Tensor

from . import native
from .masked_cross_entropy_fused import run_fused

CHUNK_BYTES = 16 * 2**20
"""Bytes of logits kept at a time. Fewer cost time where the weight gradient is long; see kernels/README.md."""

LOSS_CHUNK_LOGITS = 2**21
"""Logits kept at a time where no gradient is wanted: there is no weight gradient to read and write once a chunk."""

MIN_CHUNK_ROWS = 128
"""Fewer rows would make the accumulation of the weight gradient a visible cost."""

CLASSES_PER_PRODUCT = 2048
"""Classes whose bf16 logit gradients are converted to fp32 at a time, on a processor without bf16 dot products."""


def chunk_rows(rows: int, num_classes: int, item_bytes: int, *, gradients: bool) -> int:
    """Rows of one chunk: an even division of ``rows`` into chunks of about the wanted size at most, in steps of 16."""
    logits = CHUNK_BYTES // item_bytes if gradients else LOSS_CHUNK_LOGITS
    most = max(MIN_CHUNK_ROWS, logits // num_classes)
    chunks = max(1, -(-rows // most))
    return max(16, -(-rows // chunks // 16) * 16)


def run_cpu(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    row_weights: Tensor | None,  # (N,)
    bias: Tensor | None,  # (V,)
    normalize: bool,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """What the operator ``bestrq2::masked_cross_entropy`` returns, for fp32, bf16 and fp16 CPU tensors."""
    half = dtype == torch.float16
    if half:
        dtype = torch.float32  # products in fp16 are slower on a CPU than converting to fp32, and less exact
    rows, num_classes = hidden.shape[0], weight.shape[0]
    losses, correct = torch.zeros(2, rows, dtype=torch.float32).unbind()
    weights = None if row_weights is None else row_weights.to(torch.float32).contiguous()
    index = None if weights is None else weights.nonzero().squeeze(1)  # (M,)
    count = rows if index is None else len(index)
    total = (count if weights is None else weights.sum().item()) or 1
    divisor = total if normalize else 1
    scale, factor = 1 / divisor, torch.ones((), dtype=torch.float32)
    if half:  # divided by many rows, or multiplied with large or small weights, gradients would leave the range of fp16
        largest = (1.0 if weights is None or not count else weights.nan_to_num(0, 0, 0).abs().max().item()) or 1.0
        scale, factor = 1 / largest, torch.tensor(largest / divisor, dtype=torch.float32)
    if count == 0:
        sources = (hidden, weight, weight if bias is None else bias)
        dtypes = [torch.float32 if half and x is not hidden else x.dtype for x in sources]
        grads = [x.new_zeros(x.shape if want else 0, dtype=kind) for x, want, kind in zip(sources, wanted, dtypes)]
        return losses, torch.zeros_like(factor), factor, *grads

    targets = targets.contiguous()
    if dtype == torch.bfloat16 and native.extension().bf16_dot() != "none":
        grads = run_fused(
            hidden, weight, bias, targets, index, weights, scale, label_smoothing, z_loss, wanted, losses, correct
        )
        accuracy = (correct.sum() if weights is None else torch.dot(correct, weights)) / total
        return losses * factor if half else losses, accuracy, factor, *grads

    cast_weight = weight.to(dtype)
    cast_bias = None if bias is None else bias.to(dtype)
    # Rows that do not count get no product, so their gradient has to be there already.
    grad_hidden = hidden.new_zeros(hidden.shape) if index is not None and wanted[0] else hidden.new_empty(0)
    if index is None and wanted[0]:
        grad_hidden = hidden.new_empty(hidden.shape)
    grad_weight = _WeightGradient(cast_weight, weight.dtype) if wanted[1] else None
    grad_bias = torch.zeros(num_classes, dtype=torch.float32) if wanted[2] else None

    step = chunk_rows(count, num_classes, dtype.itemsize, gradients=any(wanted))
    buffer = torch.empty(min(step, count), num_classes, dtype=dtype)
    for start in range(0, count, step):
        stop = min(start + step, count)
        logits = buffer[: stop - start]  # (rows of the chunk, V)
        chosen = None if index is None else index[start:stop]
        h = (hidden[start:stop] if chosen is None else hidden.index_select(0, chosen)).to(dtype)
        if cast_bias is None:
            torch.mm(h, cast_weight.T, out=logits)
        else:
            torch.addmm(cast_bias, h, cast_weight.T, out=logits)
        offset = start if chosen is None else 0
        native.extension().softmax_gradient(
            logits=logits.data_ptr(),
            bf16=dtype == torch.bfloat16,
            rows=stop - start,
            classes=num_classes,
            index=0 if chosen is None else chosen.data_ptr(),
            targets=targets[offset:].data_ptr(),
            weights=0 if weights is None else weights.data_ptr(),
            scale=scale,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            gradient=any(wanted),
            losses=losses[offset:].data_ptr(),
            correct=correct[offset:].data_ptr(),
            threads=torch.get_num_threads(),
        )
        if wanted[0]:
            if chosen is None and dtype == hidden.dtype:
                torch.mm(logits, cast_weight, out=grad_hidden[start:stop])
            elif chosen is None:
                grad_hidden[start:stop] = logits @ cast_weight
            else:
                grad_hidden.index_copy_(0, chosen, (logits @ cast_weight).to(hidden.dtype))
        if grad_weight is not None:
            grad_weight.add(logits, h, last=stop == count)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    del buffer, logits, h  # before the gradients are converted
    accuracy = (correct.sum() if weights is None else torch.dot(correct, weights)) / total
    return (
        losses * factor if half else losses,
        accuracy,
        factor,
        grad_hidden,
        _result(None if grad_weight is None else grad_weight.total, weight, half),
        _result(grad_bias, weight if bias is None else bias, half),
    )


def _result(grad: Tensor | None, source: Tensor, half: bool) -> Tensor:
    """What the operator returns: a gradient in the dtype of its source; of fp16 products in fp32, not yet scaled."""
    dtype = torch.float32 if half else source.dtype
    return source.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype)


class _WeightGradient:
    """Sum over chunks of ``logits.T @ h``, in fp32 whatever the dtype of the products.

    No CPU product of PyTorch takes bf16 and returns fp32, and rounding the product of every chunk to bf16 would lose
    what the fp32 sum is for. So bf16 operands are converted; a processor that gets here has no bf16 instructions.
    """

    def __init__(self, weight: Tensor, result: torch.dtype) -> None:
        self.shape, self.dtype, self.result = weight.shape, weight.dtype, result
        self.total: Tensor = torch.empty(0, dtype=torch.float32)

    def add(self, logits: Tensor, h: Tensor, *, last: bool) -> None:
        """Add one chunk: ``logits`` (rows, V) holds its logit gradients, ``h`` (rows, D) its rows."""
        first = not self.total.numel()
        if first and (self.dtype == torch.float32 or (last and self.result == self.dtype)):
            self.total = torch.mm(logits.T, h)  # also for the only chunk: one product, rounded once, at its end
            return
        if self.dtype == torch.float32:
            self.total.addmm_(logits.T, h)
            return
        if first:
            self.total = torch.zeros(self.shape, dtype=torch.float32)
        h = h.float()
        for begin in range(0, self.shape[0], CLASSES_PER_PRODUCT):
            part = slice(begin, begin + CLASSES_PER_PRODUCT)
            self.total[part].addmm_(logits[:, part].float().T, h)
