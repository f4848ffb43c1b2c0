"""Run the kernels and products over chunks of logits that stay in the L2.

    for each codebook, for each chunk of rows           (rows, V), about 1536 x 8192 in bf16: 24 MiB
        logits = h @ weight.T + bias
        logits = softmax gradient, losses, accuracy     Triton, in place, one program per row
        grad_hidden       += logits @ weight            fp32; with one codebook written, once
        grad_weight       += logits.T @ h               fp32
        grad_bias         += logits.sum(0)              fp32, in the pass before

* Every row counts, or the caller gave an upper bound of their number: the products are the library's. Rows are gathered
  for them only where the bound leaves rows out.
* Row weights without a bound: the rows that count are listed first on the device, and Triton products stop at their
  number (products.py).
* No gradient is wanted: one fused kernel and no logits (loss.py).

Nothing here waits for the GPU: every shape follows from the number of rows given, not from how many of them are masked.
The order of all sums is fixed; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..integers import ceil_div, power_of_2
from ..tuning import load_configs
from .loss import loss_kernel, merge_kernel
from .products import hidden_gradient_kernel, logits_kernel, weight_gradient_kernel
from .scale import BLOCK, scale_kernel
from .softmax_gradient import softmax_gradient_kernel

OP = "masked_cross_entropy"
PROGRAMS = 264  # enough for two on every multiprocessor of an H100; more shares only add to the merge
MERGE_ROWS = 128


@dataclass
class _Rows:
    """The rows that count and one codebook: inputs, options and results that every form of the computation shares."""

    hidden: Tensor  # (N, D), unit feature stride
    weight: Tensor  # (V, D) contiguous, in the dtype of the products
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    weights: Tensor | None  # (N,) fp32, divided by their sum where the mean is wanted
    index: Tensor | None  # (N,) the rows that count first, None: every row
    count: Tensor | None  # () how many they are
    scale: float
    label_smoothing: float
    z_loss: float
    losses: Tensor  # (N,) fp32
    correct: Tensor  # (N,) fp32
    configs: dict[str, Any]

    @property
    def bits(self) -> int:
        return 8 * self.weight.dtype.itemsize

    def tile(self, kernel: str) -> dict[str, Any]:
        return {**self.configs[f"{kernel}/{self.bits}"], "PRECISION": precision(self.bits)}

    def or_unused(self, tensor: Tensor | None) -> Tensor:
        """A pointer for an argument that the kernel does not read where ``tensor`` is None."""
        return self.losses if tensor is None else tensor


def precision(bits: int) -> str:
    """fp32 products are IEEE fp32, as PyTorch's are unless TF32 was allowed."""
    return "ieee" if bits == 32 else "tf32"  # without meaning for 16-bit operands


def hidden_gradient_tile(add: bool) -> str:
    """Name of the tile for the gradient of the rows: adding in fp32 needs as many registers as the weight gradient."""
    return "weight_gradient" if add else "hidden_gradient"


def chunk_rows(rows: int, num_classes: int, item_bytes: int, config: dict[str, int]) -> int:
    """Rows of one chunk: an even division of ``rows`` into chunks of about ``config["bytes"]`` of logits at most."""
    multiple = config["rows_multiple"]
    most = max(multiple, config["bytes"] // (num_classes * item_bytes))
    chunks = max(1, -(-rows // most))
    return max(multiple, -(-rows // chunks // multiple) * multiple)


def rows_that_count(row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers (N,) and how many count, on the device: rows of any weight (N,) or (G, N) other than 0 come first."""
    selected = counts(row_weights)
    return torch.argsort(selected, descending=True, stable=True), selected.sum()


def counts(row_weights: Tensor) -> Tensor:
    """Rows (N,) of any weight (N,) or (G, N) other than 0."""
    return row_weights != 0 if row_weights.dim() == 1 else (row_weights != 0).any(0)


def softmax_config(configs: Mapping[str, Any], classes: int, summed: bool = False) -> dict[str, Any]:
    """The block of a row of logits: as large as the row where registers hold it, else one that passes over it.

    With ``summed``, of the kernel that also keeps the sum of several rows.
    """
    whole = configs.get("softmax_gradient/whole")
    if whole is None or classes > whole["BLOCK_V"]:
        return {"WHOLE": False, **configs["softmax_gradient"]}
    if summed:
        whole = configs.get("softmax_gradient/summed", whole)
    return {"WHOLE": True, **whole, "BLOCK_V": max(1024, power_of_2(classes))}


def _softmax_gradient(r: _Rows, logits: Tensor, start: int, sums: Tensor | None = None) -> None:
    """Fill losses and accuracy of a chunk and overwrite its logits by the gradient of ``losses.sum()``.

    ``sums`` (programs, V): each program writes the sum of the gradients of its rows, or adds it if ``start`` is not 0.
    """
    config = softmax_config(r.configs, logits.shape[1], sums is not None)
    softmax_gradient_kernel[(logits.shape[0] if sums is None else sums.shape[0],)](
        logits, r.targets, r.or_unused(r.weights), r.or_unused(r.index), r.or_unused(r.count), r.losses, r.correct,
        r.or_unused(sums), logits.shape[0], start, logits.shape[1], r.scale, r.label_smoothing, r.z_loss,
        HAS_INDEX=r.index is not None, HAS_WEIGHTS=r.weights is not None, GRADIENT=True, SUM=sums is not None, **config,
    )  # fmt: skip


class _BiasGradient:
    """The sum of logit gradients over all rows, chunk by chunk, in a fixed order.

    Rows that fit a block are summed in the pass that computes their gradients; longer ones are read again.
    """

    def __init__(self, r: _Rows, total: Tensor | None, chunk: int) -> None:
        self.total, self.sums = total, None
        if total is not None and softmax_config(r.configs, len(total))["WHOLE"]:
            self.sums = total.new_empty(min(PROGRAMS, chunk), len(total))
        elif total is not None:
            total.zero_()

    def read(self, logits: Tensor) -> None:
        """Add the gradients (rows, V) of a chunk, unless they are in the sums already."""
        if self.total is not None and self.sums is None:
            self.total += logits.sum(0, dtype=torch.float32)

    def finish(self) -> None:
        if self.total is not None and self.sums is not None:
            torch.sum(self.sums, 0, out=self.total)


def _fused_losses(r: _Rows) -> None:
    """Fill losses and accuracy; no logits are stored."""
    rows, features = r.hidden.shape
    classes, tile = r.weight.shape[0], r.tile("loss")
    blocks, tiles = ceil_div(rows, tile["BM"]), ceil_div(classes, tile["BN"])
    tiles_per_share = ceil_div(tiles, max(1, min(tiles, PROGRAMS // blocks)))
    shares = ceil_div(tiles, tiles_per_share)
    parts = torch.empty(4, shares, rows, dtype=torch.float32, device=r.hidden.device)
    first = torch.empty(shares, rows, dtype=torch.int32, device=r.hidden.device)
    selection = {"HAS_INDEX": r.index is not None}
    loss_kernel[(blocks, shares)](
        r.hidden, r.weight, r.or_unused(r.bias), r.targets, r.or_unused(r.index), r.or_unused(r.count), parts, first,
        r.hidden.stride(0), rows, features, classes, tiles_per_share * tile["BN"],
        HAS_BIAS=r.bias is not None, SMOOTH=r.label_smoothing > 0, **selection, **tile,
    )  # fmt: skip
    merge_kernel[(ceil_div(rows, MERGE_ROWS),)](
        parts, first, r.targets, r.or_unused(r.weights), r.or_unused(r.index), r.or_unused(r.count),
        r.losses, r.correct, rows, classes, shares, r.scale, r.label_smoothing, r.z_loss,
        HAS_WEIGHTS=r.weights is not None, **selection, BM=MERGE_ROWS,
    )  # fmt: skip


def _bounded_gradients(
    r: _Rows, grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, add: bool
) -> None:
    """Losses and gradients over ``r.index[: r.count]``: tiles behind the count end at once.

    With ``add``, the gradient of the rows is added to ``grad_hidden``, in fp32.
    """
    assert r.index is not None
    assert r.count is not None
    (rows, features), classes = r.hidden.shape, r.weight.shape[0]
    step = chunk_rows(rows, classes, r.weight.dtype.itemsize, r.configs["chunk"])
    logits = torch.empty(min(step, rows), classes, dtype=r.weight.dtype, device=r.hidden.device)
    of_bias = _BiasGradient(r, grad_bias, min(step, rows))
    slots = torch.arange(min(step, rows) if of_bias.sums is None else 0, device=r.hidden.device).unsqueeze(1)
    for start in range(0, rows, step):
        chunk = min(step, rows - start)
        tile = r.tile("logits")
        logits_kernel[(ceil_div(chunk, tile["BM"]), ceil_div(classes, tile["BN"]))](
            r.hidden, r.weight, r.or_unused(r.bias), r.index, r.count, logits,
            r.hidden.stride(0), start, chunk, features, classes, HAS_BIAS=r.bias is not None, **tile,
        )  # fmt: skip
        _softmax_gradient(r, logits[:chunk], start, of_bias.sums)
        if grad_hidden is not None:
            tile = r.tile(hidden_gradient_tile(add))
            hidden_gradient_kernel[(ceil_div(chunk, tile["BM"]), ceil_div(features, tile["BN"]))](
                logits, r.weight, r.index, r.count, grad_hidden, start, chunk, features, classes, ADD=add, **tile
            )
        if grad_weight is not None:
            tile = r.tile("weight_gradient")
            weight_gradient_kernel[(ceil_div(classes, tile["BM"]), ceil_div(features, tile["BN"]))](
                logits, r.hidden, r.index, r.count, grad_weight,
                r.hidden.stride(0), start, chunk, features, classes, **tile,
            )  # fmt: skip
        if of_bias.sums is None and grad_bias is not None:  # rows of the buffer behind the count hold anything
            of_bias.read(torch.where(slots[:chunk] < r.count - start, logits[:chunk], 0))
    of_bias.finish()


@cache
def _fp32_products(device: torch.device, dtype: torch.dtype) -> str:
    """Way in which this torch adds a product of ``dtype`` matrices in fp32: "addmm", "mm" (then add) or "" (none)."""
    a, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device, dtype=torch.float32)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        return "addmm"
    except (RuntimeError, TypeError):
        pass
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        return "mm"
    except (RuntimeError, TypeError):
        return ""


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b`` in fp32; with ``first``, ``total = a @ b``."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if first else 1)
        return
    way = _fp32_products(a.device, a.dtype)
    if first and way:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
        return
    if first:
        total.zero_()
    if way == "addmm":
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # where neither call exists the operands are converted: rounding each product would lose the fp32 sum
        total += torch.mm(a, b, out_dtype=torch.float32) if way else torch.mm(a.float(), b.float())


def _library_gradients(
    r: _Rows, grad_hidden: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, add: bool
) -> None:
    """Losses and gradients of every row of ``r.hidden``, by library products; ``add`` as in _bounded_gradients."""
    rows, classes, dtype = len(r.hidden), len(r.weight), r.weight.dtype
    step = chunk_rows(rows, classes, dtype.itemsize, r.configs["chunk"])
    buffer = torch.empty(min(step, rows), classes, dtype=dtype, device=r.hidden.device)
    of_bias = _BiasGradient(r, grad_bias, min(step, rows))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        h = r.hidden[part].to(dtype)
        logits = buffer[: len(h)]
        if r.bias is None:
            torch.mm(h, r.weight.T, out=logits)
        else:
            torch.addmm(r.bias, h, r.weight.T, out=logits)
        _softmax_gradient(r, logits, start, of_bias.sums)
        if grad_hidden is not None and add:
            _add_product(grad_hidden[part], logits, r.weight, first=False)
        elif grad_hidden is not None and dtype == grad_hidden.dtype:
            torch.mm(logits, r.weight, out=grad_hidden[part])
        elif grad_hidden is not None:
            grad_hidden[part] = torch.mm(logits, r.weight)
        if grad_weight is not None:
            _add_product(grad_weight, logits.T, h, first=start == 0)
        of_bias.read(logits)
    of_bias.finish()


def masked_cross_entropy(
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
    max_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Result of the operator ``bestrq2::masked_cross_entropy``."""
    rows, codebooks, device = hidden.shape[0], weight.shape[0], hidden.device
    on_gpu = device.type == "cuda"
    losses, correct = torch.zeros(2, codebooks, rows, dtype=torch.float32, device=device).unbind()
    factor = torch.ones((), dtype=torch.float32, device=device)

    weights, index, count, scale, total = None, None, None, 1.0, factor * rows
    # Where nearly every row counts none is gathered: the others are zeros with a weight of 0.
    dense = row_weights is not None and max_rows is not None and max_rows >= rows and any(wanted)
    if row_weights is not None:
        weights = row_weights.float()
        if not dense:
            index, count = rows_that_count(row_weights)
        total = weights.sum(-1)  # () or (G,)
    divisor = total * codebooks if total.dim() == 0 else total.sum()
    divisor, total = (torch.where(x == 0, 1, x) for x in (divisor, total))
    coefficients = weights
    half = dtype == torch.float16
    if half:  # divided by many rows, or multiplied with large or small weights, gradients would leave the range of fp16
        # One NaN, or infinity, must not reach the other rows.
        largest = factor if weights is None or rows == 0 else weights.nan_to_num(0, 0, 0).abs().max()
        largest = torch.where(largest == 0, 1, largest)
        coefficients = None if weights is None else weights / largest
        factor = largest / divisor if normalize else largest
    elif normalize and weights is not None:
        coefficients = weights / divisor
    elif normalize:
        scale = 1 / max(rows * codebooks, 1)

    add = codebooks > 1
    grads: list[Tensor | None] = [None, None, None]
    if wanted[0]:  # several codebooks add to it; rows that a mask leaves out are not written
        create = torch.zeros_like if add or index is not None else torch.empty_like
        grads[0] = create(hidden, dtype=torch.float32 if add else hidden.dtype, memory_format=torch.contiguous_format)
    create = torch.empty_like if rows and max_rows != 0 else torch.zeros_like  # the first chunk writes
    for i, x in ((1, weight), (2, weight[..., 0] if bias is None else bias)):
        if wanted[i]:
            grads[i] = create(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    h = hidden if hidden.stride(1) == 1 or hidden.shape[1] == 1 else hidden.contiguous()
    if dense and row_weights is not None:  # NaN in a row that does not count must not reach others
        h = torch.where(counts(row_weights).unsqueeze(1), h, 0)
    w, b = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype).contiguous()
    configs = load_configs(OP, device)
    books = [
        _Rows(
            h, w[g], None if b is None else b[g], targets[g].contiguous(),
            coefficients if coefficients is None or coefficients.dim() == 1 else coefficients[g].contiguous(),
            index, count, float(scale), float(label_smoothing), float(z_loss), losses[g], correct[g], configs,
        )
        for g in range(codebooks)
    ]  # fmt: skip
    with torch.cuda.device(device) if on_gpu else nullcontext():
        if rows == 0:
            pass
        elif not any(wanted):
            for book in books:
                _fused_losses(book)
        elif index is None or max_rows is None:
            _each_codebook(_library_gradients if index is None else _bounded_gradients, books, grads, add)
        else:
            _gathered_gradients(books, max_rows, grads, add)
    if count is not None and max_rows is not None:
        losses = torch.where(count > max_rows, float("nan"), losses)
    accuracy = (correct if weights is None else correct * weights).sum(1) / total
    sources = (hidden, weight, weight if bias is None else bias)
    dtypes = [torch.float32 if half and x is not hidden else x.dtype for x in sources]
    results = (
        source.new_empty(0, dtype=kind) if grad is None else grad.to(kind)
        for grad, source, kind in zip(grads, sources, dtypes)
    )
    return losses * factor, accuracy, factor, *results


def scale(grad: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a 0-d fp32 tensor on its GPU, in place; a factor of 1 costs a launch only."""
    with torch.cuda.device(grad.device) if grad.is_cuda else nullcontext():
        scale_kernel[(ceil_div(grad.numel(), BLOCK),)](grad, factor, grad.numel(), BLOCK=BLOCK)


def _each_codebook(form: Callable[..., None], books: list[_Rows], grads: list[Tensor | None], add: bool) -> None:
    of_rows, *of_classifiers = grads
    for g, book in enumerate(books):
        form(book, of_rows, *(None if grad is None else grad[g] for grad in of_classifiers), add)


def _gathered_gradients(books: list[_Rows], most: int, grads: list[Tensor | None], add: bool) -> None:
    """Losses and gradients of at most ``most`` rows that count, gathered for the library products."""
    every = books[0]
    assert every.index is not None
    index = every.index[:most]
    # Rows behind the count pad to the bound. They may hold NaN, and 0 * NaN would reach the weight's gradient.
    assert every.count is not None
    counts = (torch.arange(len(index), device=index.device) < every.count).unsqueeze(1)
    rows = torch.where(counts, every.hidden[index], 0)
    gathered = [
        replace(
            r, hidden=rows, targets=r.targets[index], weights=None if r.weights is None else r.weights[index],
            index=None, count=None, losses=r.losses[index], correct=r.correct[index],
        )
        for r in books
    ]  # fmt: skip
    grad_hidden = grads[0]
    rows_gradient = None
    if grad_hidden is not None:
        rows_gradient = grad_hidden.new_zeros(rows.shape) if add else grad_hidden.new_empty(rows.shape)
    _each_codebook(_library_gradients, gathered, [rows_gradient, *grads[1:]], add)
    for r, g in zip(books, gathered):
        r.losses.index_copy_(0, index, g.losses)
        r.correct.index_copy_(0, index, g.correct)
    if grad_hidden is not None and rows_gradient is not None:
        grad_hidden.index_copy_(0, index, rows_gradient)
