"""Loss, top-1 hit and logit gradient of rows of logits, in place; and the sum of the gradients, for a bias."""

import triton
import triton.language as tl

from .arguments import OF_ROWS


@triton.jit(do_not_specialize=["rows", "start"], do_not_specialize_on_alignment=OF_ROWS)
def softmax_gradient_kernel(
    p_logits,  # (rows, V) contiguous; overwritten with its gradient
    p_targets,  # (N,) int64
    p_weights,  # (N,) fp32, already divided by their sum where the mean is wanted
    p_index,  # (N,) int64: row of the inputs of every slot
    p_count,  # () int64: slots that exist
    p_losses,  # (N,) fp32
    p_correct,  # (N,) fp32
    p_sums,  # (programs, V) fp32, where SUM: written for slot 0, added to for later ones
    rows,  # of logits
    start,  # slot of the first row of logits
    num_classes,
    scale,  # multiplies every weight
    label_smoothing,
    z_loss,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SUM: tl.constexpr,  # only with WHOLE
    WHOLE: tl.constexpr,  # the row fits the block
    BLOCK_V: tl.constexpr,
):
    """Loss, top-1 hit and logit gradient: the formulas of ``reference.masked_cross_entropy_gradients``.

    One program a row. With ``SUM``, a program takes every ``num_programs``-th row and keeps the sum of its gradients in
    registers: the gradient of a bias without a second reading, added in a fixed order.
    """
    if SUM:
        o_v = tl.arange(0, BLOCK_V)
        p_sums += tl.program_id(0).to(tl.int64) * num_classes
        b_sums = tl.zeros([BLOCK_V], dtype=tl.float32)
        i_row = tl.program_id(0).to(tl.int64)
        for _ in range(tl.program_id(0), rows, tl.num_programs(0)):
            b_sums += _row(
                p_logits, p_targets, p_weights, p_index, p_count, p_losses, p_correct, i_row, start, num_classes,
                scale, label_smoothing, z_loss, HAS_INDEX, HAS_WEIGHTS, GRADIENT, WHOLE, BLOCK_V,
            )  # fmt: skip
            i_row += tl.num_programs(0)
        b_before = tl.load(p_sums + o_v, mask=(o_v < num_classes) & (start > 0), other=0.0)
        tl.store(p_sums + o_v, b_before + b_sums, mask=o_v < num_classes)
    else:
        _row(
            p_logits, p_targets, p_weights, p_index, p_count, p_losses, p_correct, tl.program_id(0).to(tl.int64), start,
            num_classes, scale, label_smoothing, z_loss, HAS_INDEX, HAS_WEIGHTS, GRADIENT, WHOLE, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _row(
    p_logits, p_targets, p_weights, p_index, p_count, p_losses, p_correct, i_row, start, num_classes,
    scale, label_smoothing, z_loss,
    HAS_INDEX: tl.constexpr, HAS_WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row; returns its gradient [BLOCK_V] where WHOLE, zeros otherwise.

    A row that fits the block is read once and stays in registers. Else the first loop keeps, per position of the
    block, a running maximum, the sum of exponentials relative to it, the sum of logits and the first class that reached
    the maximum; they are merged across the block once, at the end. The second loop reads the row again, from the L1 or
    L2 cache, and writes the gradient.
    """
    slot = i_row + start
    p_row = p_logits + i_row * num_classes
    o_v = tl.arange(0, BLOCK_V)
    b_grad = tl.zeros([BLOCK_V], dtype=tl.float32)
    exists = slot >= 0
    if HAS_INDEX:
        exists = slot < tl.load(p_count)
    if exists:
        if HAS_INDEX:
            slot = tl.load(p_index + slot)
        weight = scale
        if HAS_WEIGHTS:
            weight = scale * tl.load(p_weights + slot)

        if weight == 0.0:
            tl.store(p_losses + slot, 0.0)
            tl.store(p_correct + slot, 0.0)
            if GRADIENT:
                for v in range(0, num_classes, BLOCK_V):
                    b_zero = tl.zeros([BLOCK_V], dtype=tl.float32)
                    tl.store(p_row + v + o_v, b_zero.to(p_logits.dtype.element_ty), mask=v + o_v < num_classes)
        else:
            target = tl.load(p_targets + slot)
            valid = (target >= 0) & (target < num_classes)
            target = tl.where(valid, target, 0)
            z_target = tl.load(p_row + target).to(tl.float32)

            z_sum = 0.0
            if WHOLE:
                b_z = tl.load(p_row + o_v, mask=o_v < num_classes, other=float("-inf")).to(tl.float32)  # [BLOCK_V]
                z_max = tl.max(b_z, axis=0)
                first = tl.min(tl.where(b_z == z_max, o_v, 2147483647), axis=0)
                if label_smoothing > 0.0:
                    z_sum = tl.sum(tl.where(o_v < num_classes, b_z, 0.0), axis=0)
                b_exp = tl.exp(b_z - z_max)
                total = tl.sum(b_exp, axis=0)
            else:
                b_max = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)  # [BLOCK_V]
                b_sum = tl.zeros([BLOCK_V], dtype=tl.float32)
                b_total = tl.zeros([BLOCK_V], dtype=tl.float32)
                b_first = tl.zeros([BLOCK_V], dtype=tl.int32)
                for v in range(0, num_classes, BLOCK_V):
                    m_v = v + o_v < num_classes
                    b_z = tl.load(p_row + v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
                    b_larger = tl.where(b_z > b_max, b_z, b_max)
                    # Where nothing but -inf was seen the difference would be NaN.
                    b_base = tl.where(b_larger == float("-inf"), 0.0, b_larger)
                    b_sum = b_sum * tl.exp(b_max - b_base) + tl.exp(b_z - b_base)
                    b_first = tl.where(b_z > b_max, v + o_v, b_first)
                    b_total += tl.where(m_v, b_z, 0.0)
                    b_max = b_larger
                z_max = tl.max(b_max, axis=0)
                b_base = tl.where(b_max == float("-inf"), z_max, b_max)
                total = tl.sum(b_sum * tl.exp(b_base - z_max), axis=0)
                first = tl.min(tl.where(b_max == z_max, b_first, 2147483647), axis=0)
                z_sum = tl.sum(b_total, axis=0)
            log_total = tl.log(total)
            lse = z_max + log_total
            kept = 1.0 - label_smoothing
            loss = log_total - kept * (z_target - z_max) + z_loss * lse * lse
            if label_smoothing > 0.0:  # also keeps a class of logit -inf harmless where there is no smoothing
                loss -= label_smoothing * (z_sum / num_classes - z_max)
            loss = tl.where(valid, weight * loss, float("nan"))
            tl.store(p_losses + slot, loss)
            tl.store(p_correct + slot, tl.where(first == target, 1.0, 0.0))

            if GRADIENT:
                factor = weight * (1.0 + 2.0 * z_loss * lse) / total
                uniform = weight * label_smoothing / num_classes
                if WHOLE:
                    b_grad = b_exp * factor - uniform
                    b_grad = tl.where(o_v == target, b_grad - weight * kept, b_grad)
                    tl.store(p_row + o_v, b_grad.to(p_logits.dtype.element_ty), mask=o_v < num_classes)
                else:
                    for v in range(0, num_classes, BLOCK_V):
                        m_v = v + o_v < num_classes
                        b_z = tl.load(p_row + v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
                        b_part = tl.exp(b_z - z_max) * factor - uniform
                        b_part = tl.where(v + o_v == target, b_part - weight * kept, b_part)
                        tl.store(p_row + v + o_v, b_part.to(p_logits.dtype.element_ty), mask=m_v)
    return b_grad
