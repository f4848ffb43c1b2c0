"""CPU backend of ``masked_cross_entropy``: our own kernels where they are faster than a library's (cpu_fused.py),
else library matrix products over chunks of logits that stay in the cache.

for each codebook, for each chunk of masked rows    (rows, V) is the only thing of its size
    h      = hidden[rows]                           gathered here, in fp32
    logits = h @ weight.T
    logits = softmax gradient, losses, accuracy     in place, one C++ pass that adds the bias
    grad_hidden[rows] += logits @ weight            fp32; with one codebook written, once
    grad_weight       += logits.T @ h               fp32
    grad_bias         += logits.sum(0)              fp32
"""

import torch
from torch import Tensor

from ..common import native
from .cpu_fused import FP32_CHUNK_ROWS, bf16_chunk_rows, is_fused, run_fused

CHUNK_BYTES = 16 * 2**20
"""Bytes of logits kept at a time. Fewer cost time where the weight gradient is long: docs/kernels has numbers."""

LOSS_CHUNK_LOGITS = 2**21
"""Logits kept at a time where no gradient is wanted: there is no weight gradient to read and write once a chunk."""

MIN_CHUNK_ROWS = 128
"""Fewer rows would make the accumulation of the weight gradient a visible cost."""


def chunk_rows(rows: int, num_classes: int, item_bytes: int, most: int = 2**63, *, gradients: bool) -> int:
    """Rows of one chunk: an even division of ``rows`` into chunks of about the wanted size at most, in steps of 16."""
    logits = CHUNK_BYTES // item_bytes if gradients else LOSS_CHUNK_LOGITS
    most = min(most, max(MIN_CHUNK_ROWS, logits // num_classes))
    chunks = max(1, -(-rows // most))
    return max(16, -(-rows // chunks // 16) * 16)


def obstacle(hidden: Tensor) -> str | None:
    """Reason why the C++ kernels cannot take these rows, or None."""
    if hidden.device.type != "cpu":
        return f"it needs CPU tensors, got {hidden.device.type!r}"
    if hidden.dtype == torch.float64:
        return "it computes in fp32 and bf16, not in fp64"
    return native.extension_obstacle()


def run(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (G, V, D)
    targets: Tensor,  # (G, N)
    row_weights: Tensor | None,  # (N,) or (G, N)
    bias: Tensor | None,  # (G, V)
    normalize: bool,
    dtype: torch.dtype,
    label_smoothing: float,
    z_loss: float,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Result of the operator ``bestrq2::masked_cross_entropy`` for fp32, bf16 and fp16 CPU tensors."""
    half = dtype == torch.float16
    if half:
        dtype = torch.float32  # products in fp16 are slower on a CPU than converting to fp32, and less exact
    if dtype == torch.bfloat16 and native.extension().bf16_dot() == "none":
        dtype = torch.float32  # likewise where bf16 has no instructions
    rows, codebooks = hidden.shape[0], weight.shape[0]
    losses, correct = torch.zeros(2, codebooks, rows, dtype=torch.float32, device="cpu").unbind()
    row_weights = None if row_weights is None else row_weights.to(torch.float32).contiguous()
    index = None  # (M,)
    if row_weights is not None:
        index = (row_weights if row_weights.dim() == 1 else row_weights.any(0)).nonzero().squeeze(1)
    count = rows if index is None else len(index)
    total = (count if row_weights is None else row_weights.sum().item()) or 1
    shared = row_weights is None or row_weights.dim() == 1  # by all codebooks
    divisor = (total * codebooks if shared else total) if normalize else 1
    scale, factor = 1 / divisor, torch.ones((), dtype=torch.float32, device="cpu")
    if half:  # divided by many rows, or multiplied with large or small weights, gradients would leave the range of fp16
        largest = 1.0 if row_weights is None or not count else row_weights.nan_to_num(0, 0, 0).abs().max().item() or 1.0
        scale, factor = 1 / largest, torch.tensor(largest / divisor, dtype=torch.float32, device="cpu")
    sources = (hidden, weight, weight if bias is None else bias)
    dtypes = [torch.float32 if half and x is not hidden else x.dtype for x in sources]
    if count == 0:
        zeros = [x.new_zeros(x.shape if want else 0, dtype=kind) for x, want, kind in zip(sources, wanted, dtypes)]
        return losses, torch.zeros(codebooks, dtype=torch.float32, device="cpu"), factor, *zeros

    targets = targets.contiguous()
    grads: list[Tensor | None]
    if is_fused(dtype, hidden.shape[1]):
        step = bf16_chunk_rows(count)
        if dtype == torch.float32:
            step = chunk_rows(count, weight.shape[1], dtype.itemsize, FP32_CHUNK_ROWS, gradients=any(wanted))
        options = (scale, label_smoothing, z_loss)
        grads = run_fused(
            dtype, step, hidden, weight, bias, targets, index, row_weights, options, wanted, losses, correct
        )
    else:
        grad_hidden = _RowsGradient(hidden, index, count, codebooks) if wanted[0] else None
        grad_weight = torch.empty(weight.shape if wanted[1] else 0, dtype=torch.float32, device="cpu")
        grad_bias = torch.zeros(weight.shape[:2] if wanted[2] else 0, dtype=torch.float32, device="cpu")
        for g, of_codebook in enumerate(targets):
            _run_library(
                hidden,
                weight[g].float(),
                None if bias is None else bias[g].float().contiguous(),
                of_codebook,
                index,
                row_weights if row_weights is None or row_weights.dim() == 1 else row_weights[g],
                (scale, label_smoothing, z_loss),
                grad_hidden,
                grad_weight[g] if wanted[1] else None,
                grad_bias[g] if wanted[2] else None,
                losses[g],
                correct[g],
            )
        grads = [None if grad_hidden is None else grad_hidden.result(), grad_weight, grad_bias]
    if row_weights is None:
        accuracy = correct.sum(1) / total
    else:
        totals = row_weights.sum(-1)  # () or (G,)
        accuracy = (correct * row_weights).sum(1) / torch.where(totals == 0, 1, totals)
    results = [
        x.new_empty(0, dtype=kind) if grad is None or not want else grad.to(kind)
        for x, grad, want, kind in zip(sources, grads, wanted, dtypes)
    ]
    return losses * factor if half else losses, accuracy, factor, *results


def _run_library(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D) fp32
    bias: Tensor | None,  # (V,) fp32 contiguous
    targets: Tensor,  # (N,) contiguous
    index: Tensor | None,  # (M,)
    row_weights: Tensor | None,  # (N,) fp32 contiguous
    options: tuple[float, float, float],  # scale, label_smoothing, z_loss
    grad_hidden: "_RowsGradient | None",
    grad_weight: Tensor | None,  # (V, D) fp32, written
    grad_bias: Tensor | None,  # (V,) fp32 zeros
    losses: Tensor,  # (N,) fp32, written where rows count
    correct: Tensor,  # (N,) fp32, the same
) -> None:
    """One codebook, by products of the library over chunks of rows."""
    num_classes = weight.shape[0]
    scale, label_smoothing, z_loss = options
    gradient = any(grad is not None for grad in (grad_hidden, grad_weight, grad_bias))
    count = hidden.shape[0] if index is None else len(index)
    step = chunk_rows(count, num_classes, weight.itemsize, gradients=gradient)
    buffer = torch.empty(min(step, count), num_classes, dtype=torch.float32, device="cpu")
    for start in range(0, count, step):
        stop = min(start + step, count)
        logits = buffer[: stop - start]  # (rows of the chunk, V)
        chosen = None if index is None else index[start:stop]
        h = (hidden[start:stop] if chosen is None else hidden.index_select(0, chosen)).float()
        torch.mm(h, weight.T, out=logits)
        offset = start if chosen is None else 0
        native.extension().softmax_gradient(
            {
                "logits": logits.data_ptr(),
                "rows": stop - start,
                "classes": num_classes,
                "index": 0 if chosen is None else chosen.data_ptr(),
                "targets": targets[offset:].data_ptr(),
                "row_weights": 0 if row_weights is None else row_weights.data_ptr(),
                "scale": scale,
                "label_smoothing": label_smoothing,
                "z_loss": z_loss,
                "gradient": gradient,
                "bias": 0 if bias is None else bias.data_ptr(),
                "losses": losses[offset:].data_ptr(),
                "correct": correct[offset:].data_ptr(),
                "threads": torch.get_num_threads(),
            }
        )
        if grad_hidden is not None:
            grad_hidden.add(start, stop, logits, weight)
        if grad_weight is not None:
            torch.addmm(grad_weight, logits.T, h, beta=int(start > 0), out=grad_weight)  # what is new is not read
        if grad_bias is not None:
            grad_bias += logits.sum(0)


class _RowsGradient:
    """``logits @ weight`` of the rows that count, summed over codebooks in fp32; 0 for the other rows."""

    def __init__(self, hidden: Tensor, index: Tensor | None, count: int, codebooks: int) -> None:
        self.index, self.codebooks, self.added = index, codebooks, 0
        # Rows that do not count get no product, so their gradient has to be there already.
        self.grad = hidden.new_empty(hidden.shape) if index is None else hidden.new_zeros(hidden.shape)
        self.sum: Tensor | None = None  # (M, D)
        if codebooks > 1:
            direct = index is None and hidden.dtype == torch.float32
            self.sum = self.grad if direct else torch.empty(count, hidden.shape[1], dtype=torch.float32, device="cpu")

    def add(self, start: int, stop: int, logits: Tensor, weight: Tensor) -> None:
        """Add rows ``[start, stop)`` of those that count; every codebook adds them in order."""
        if self.sum is not None:
            part = self.sum[start:stop]
            if self.added == 0:
                torch.mm(logits, weight, out=part)
            else:
                part.addmm_(logits, weight)
            self.added += stop == len(self.sum)
        elif self.index is not None:
            self.grad.index_copy_(0, self.index[start:stop], (logits @ weight).to(self.grad.dtype))
        elif self.grad.dtype == weight.dtype:
            torch.mm(logits, weight, out=self.grad[start:stop])
        else:
            self.grad[start:stop] = logits @ weight

    def result(self) -> Tensor:
        """(N, D) in the dtype of the rows, once every codebook was added."""
        if self.sum is None or self.sum is self.grad:
            return self.grad
        if self.index is None:
            return self.grad.copy_(self.sum)
        return self.grad.index_copy_(0, self.index, self.sum.to(self.grad.dtype))
