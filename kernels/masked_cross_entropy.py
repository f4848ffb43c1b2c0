"""Masked cross-entropy on a GPU: library matrix products around one Triton kernel, over chunks that stay in the L2.

    for each chunk of rows                              (rows, V), about 1536 x 8192 in bf16: 24 MiB
        logits = h @ weight.T + bias                    cuBLAS
        logits = softmax gradient, losses, accuracy     Triton, in place, one program per row
        grad_hidden        = logits @ weight            cuBLAS, each row is written exactly once
        grad_weight       += logits.T @ h               cuBLAS, fp32 accumulator
        grad_bias         += logits.sum(0)              fp32

Nothing here waits for the GPU: every shape follows from the number of rows given, not from how many of them are masked.
A row of weight 0 gets a zero row of logit gradients. The order of all sums is fixed; there are no atomics.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import load_configs

OP = "masked_cross_entropy"

CANDIDATES = {
    "softmax_gradient": [
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    ],
    # Logits held at once: more than 48 MiB would no longer stay in the L2 cache of any GPU of today.
    "chunk": [{"bytes": mebibytes * 2**20, "rows_multiple": 128} for mebibytes in (8, 12, 16, 24, 32, 48)],
}


@triton.jit
def softmax_gradient_kernel(
    p_logits,  # (rows, V) contiguous; overwritten with its gradient
    p_targets,  # (rows,) int64
    p_weights,  # (rows,) fp32, already divided by their sum where the mean is wanted
    p_losses,  # (rows,) fp32
    p_correct,  # (rows,) fp32
    num_classes,
    scale,  # multiplies every weight
    label_smoothing,
    z_loss,
    HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Loss, top-1 hit and logit gradient of one row: the formulas of ``reference.masked_cross_entropy_gradients``.

    The first loop keeps, per position of the block, a running maximum, the sum of exponentials relative to it, the sum
    of logits and the first class that reached the maximum; they are merged across the block once, at the end. The
    second loop reads the row again, from the L1 or L2 cache, and writes the gradient.
    """
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * num_classes
    o_v = tl.arange(0, BLOCK_V)
    weight = scale
    if HAS_WEIGHTS:
        weight = scale * tl.load(p_weights + i_row)

    if weight == 0.0:
        tl.store(p_losses + i_row, 0.0)
        tl.store(p_correct + i_row, 0.0)
        if GRADIENT:
            for start in range(0, num_classes, BLOCK_V):
                b_zero = tl.zeros([BLOCK_V], dtype=tl.float32)
                tl.store(p_row + start + o_v, b_zero.to(p_logits.dtype.element_ty), mask=start + o_v < num_classes)
    else:
        target = tl.load(p_targets + i_row)
        valid = (target >= 0) & (target < num_classes)
        target = tl.where(valid, target, 0)
        z_target = tl.load(p_row + target).to(tl.float32)

        b_max = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)  # [BLOCK_V]
        b_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
        b_total = tl.zeros([BLOCK_V], dtype=tl.float32)
        b_first = tl.zeros([BLOCK_V], dtype=tl.int32)
        for start in range(0, num_classes, BLOCK_V):
            m_v = start + o_v < num_classes
            b_z = tl.load(p_row + start + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_larger = tl.where(b_z > b_max, b_z, b_max)
            # Where nothing but -inf was seen the difference would be NaN.
            b_base = tl.where(b_larger == float("-inf"), 0.0, b_larger)
            b_sum = b_sum * tl.exp(b_max - b_base) + tl.exp(b_z - b_base)
            b_first = tl.where(b_z > b_max, start + o_v, b_first)
            b_total += tl.where(m_v, b_z, 0.0)
            b_max = b_larger
        z_max = tl.max(b_max, axis=0)
        b_base = tl.where(b_max == float("-inf"), z_max, b_max)
        total = tl.sum(b_sum * tl.exp(b_base - z_max), axis=0)
        first = tl.min(tl.where(b_max == z_max, b_first, 2147483647), axis=0)
        log_total = tl.log(total)
        lse = z_max + log_total
        kept = 1.0 - label_smoothing
        loss = log_total - kept * (z_target - z_max) + z_loss * lse * lse
        if label_smoothing > 0.0:  # also keeps a class of logit -inf harmless where there is no smoothing
            loss -= label_smoothing * (tl.sum(b_total, axis=0) / num_classes - z_max)
        loss = tl.where(valid, weight * loss, float("nan"))
        tl.store(p_losses + i_row, loss)
        tl.store(p_correct + i_row, tl.where(first == target, 1.0, 0.0))

        if GRADIENT:
            factor = weight * (1.0 + 2.0 * z_loss * lse) / total
            uniform = weight * label_smoothing / num_classes
            for start in range(0, num_classes, BLOCK_V):
                m_v = start + o_v < num_classes
                b_z = tl.load(p_row + start + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
                b_grad = tl.exp(b_z - z_max) * factor - uniform
                b_grad = tl.where(start + o_v == target, b_grad - weight * kept, b_grad)
                tl.store(p_row + start + o_v, b_grad.to(p_logits.dtype.element_ty), mask=m_v)


def softmax_gradient(
    logits: Tensor,  # (rows, V) contiguous
    targets: Tensor,  # (rows,)
    weights: Tensor | None,  # (rows,) fp32
    losses: Tensor,  # (rows,) fp32
    correct: Tensor,  # (rows,) fp32
    *,
    scale: float,
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
    config: dict[str, Any],
) -> None:
    """Fill ``losses`` and ``correct``; with ``gradient`` overwrite ``logits`` by the gradient of ``losses.sum()``."""
    rows, num_classes = logits.shape
    softmax_gradient_kernel[(rows,)](
        logits,
        targets,
        losses if weights is None else weights,
        losses,
        correct,
        num_classes,
        float(scale),
        float(label_smoothing),
        float(z_loss),
        HAS_WEIGHTS=weights is not None,
        GRADIENT=gradient,
        **config,
    )


def chunk_rows(rows: int, num_classes: int, item_bytes: int, config: dict[str, int]) -> int:
    """Rows of one chunk: an even division of ``rows`` into chunks of about ``config["bytes"]`` of logits at most."""
    multiple = config["rows_multiple"]
    most = max(multiple, config["bytes"] // (num_classes * item_bytes))
    chunks = max(1, -(-rows // most))
    return max(multiple, -(-rows // chunks // multiple) * multiple)


@cache
def _fp32_products(device: torch.device, dtype: torch.dtype) -> str:
    """How this torch adds a product of ``dtype`` matrices in fp32: "addmm", "mm" (then add) or "" (not at all)."""
    a, total = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
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


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b`` in fp32, in place (None: the product alone)."""
    if a.dtype == torch.float32:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    way = _fp32_products(a.device, a.dtype)
    if total is not None and way == "addmm":
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    product = torch.mm(a, b, out_dtype=torch.float32) if way else torch.mm(a, b).float()
    return product if total is None else total.add_(product)


def masked_cross_entropy(
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
    """What the operator ``bestrq2::masked_cross_entropy`` returns."""
    rows, num_classes, device = hidden.shape[0], weight.shape[0], hidden.device
    on_gpu = device.type == "cuda"
    config = load_configs(OP, torch.cuda.get_device_name(device) if on_gpu else None)
    losses, correct = torch.zeros(2, rows, device=device).unbind()
    factor = torch.ones((), device=device)

    weights, selected, scale, total = None, None, 1.0, factor * rows
    if row_weights is not None:
        weights, selected = row_weights.float(), (row_weights != 0).unsqueeze(1)
        total = weights.sum()
    total = torch.where(total == 0, 1, total)
    coefficients = weights
    if normalize and dtype == torch.float16:  # divided by many rows, the gradient of one would leave the range of fp16
        factor = 1 / total
    elif normalize and weights is not None:
        coefficients = weights / total
    elif normalize:
        scale = 1 / max(rows, 1)

    targets, weight_cast = targets.contiguous(), weight.to(dtype)
    bias_cast = None if bias is None else bias.to(dtype)
    grad_hidden = torch.empty_like(hidden if wanted[0] else hidden[:0, 0], memory_format=torch.contiguous_format)
    grad_weight: Tensor | None = None
    grad_bias = torch.zeros(num_classes, device=device)

    step = chunk_rows(rows, num_classes, dtype.itemsize, config["chunk"])
    buffer = torch.empty(min(step, rows), num_classes, dtype=dtype, device=device)
    with torch.cuda.device(device) if on_gpu else nullcontext():
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            h = hidden[part]
            if selected is not None:  # rows that do not count may hold NaN, and 0 * NaN would reach grad_weight
                h = torch.where(selected[part], h, 0)
            h = h.to(dtype)
            logits = buffer[: len(h)]
            if bias_cast is None:
                torch.mm(h, weight_cast.T, out=logits)
            else:
                torch.addmm(bias_cast, h, weight_cast.T, out=logits)
            softmax_gradient(
                logits,
                targets[part],
                None if coefficients is None else coefficients[part],
                losses[part],
                correct[part],
                scale=scale,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                gradient=any(wanted),
                config=config["softmax_gradient"],
            )
            if wanted[0] and dtype == hidden.dtype:
                torch.mm(logits, weight_cast, out=grad_hidden[part])
            elif wanted[0]:
                grad_hidden[part] = torch.mm(logits, weight_cast)
            if wanted[1]:
                grad_weight = _add_product(grad_weight, logits.T, h)
            if wanted[2]:
                grad_bias += logits.sum(0, dtype=torch.float32)
    del buffer  # before the gradients are converted
    if wanted[1]:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
    accuracy = (correct if weights is None else correct * weights).sum() / total
    return (
        losses * factor,
        accuracy,
        factor,
        grad_hidden,
        weight.new_empty(0) if grad_weight is None else grad_weight,
        grad_bias.to(weight.dtype if bias is None else bias.dtype) if wanted[2] else weight.new_empty(0),
    )


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel variant of every shipped configuration, as arguments of an ahead-of-time compilation."""
    from .tuning import all_configs

    return [
        {
            "name": f"{file}-{dtype}{'-weights' if weights else ''}{'' if gradient else '-loss_only'}",
            "kernel": softmax_gradient_kernel,
            "signature": {
                "p_logits": f"*{dtype}",
                "p_targets": "*i64",
                "p_weights": "*fp32",
                "p_losses": "*fp32",
                "p_correct": "*fp32",
                "num_classes": "i32",
                "scale": "fp32",
                "label_smoothing": "fp32",
                "z_loss": "fp32",
            },
            "constexprs": {
                "HAS_WEIGHTS": weights,
                "GRADIENT": gradient,
                "BLOCK_V": configs["softmax_gradient"]["BLOCK_V"],
            },
            "num_warps": configs["softmax_gradient"]["num_warps"],
            "num_stages": configs["softmax_gradient"]["num_stages"],
            "divisible_by_16": ("p_logits", "p_targets", "p_weights", "p_losses", "p_correct", "num_classes"),
        }
        for file, configs in all_configs(OP).items()
        for dtype in ("bf16", "fp16", "fp32")
        for weights in (False, True)
        for gradient in (False, True)
    ]
