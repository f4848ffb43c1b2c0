"""The row-wise work of a block between its products: residual sum and norm, rotary positions, query and key norms,
SwiGLU. Each is one pass over memory on CPUs (csrc/block_rows.h), with fp32 arithmetic on fp32 or bf16 activations.

The plain PyTorch formulas below are the specification. They run on GPUs (where torch.compile fuses them), under
torch.compile and function transforms, in other dtypes, and where the extension is not built.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bestrq2.ops._impl import native
from bestrq2.ops._impl.dispatch import forced_backend

from .positions import turn

Rotation = tuple[Tensor, Tensor]


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    norm: nn.LayerNorm | nn.RMSNorm,
    scale: Tensor | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``total = x + factor * scale * branch`` and ``norm(total)``.

    Args:
        x: ``(B, N, D)``.
        branch: like x, or None: total is x.
        norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` over D.
        scale: ``(B,)`` float32 of stochastic depth, or None: 1.
        factor: constant of the branch (Conformer: 0.5).

    Returns:
        total and norm(total), both like x. Use the returned total, not x, for the residual path: the gradients of both
        are then joined in one pass.
    """
    if _is_fused(x, norm.weight) and (branch is None or branch.dtype == x.dtype):
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        return _ResidualNorm.apply(x, branch, scale, norm.weight, bias, isinstance(norm, nn.LayerNorm), factor, eps)
    total = x if branch is None else x + scaled(branch, scale, factor)
    return total, plain_norm(total, norm)


def plain_norm(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """Result of ``norm`` for x, in PyTorch's own operators."""
    shape = [*norm.normalized_shape]
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, shape, norm.weight, norm.eps)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, in one pass on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return residual_norm(x, None, self)[1]


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension, in one pass on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return residual_norm(x, None, self)[1]


def scaled(branch: Tensor, scale: Tensor | None, factor: float = 1.0) -> Tensor:
    """``factor * scale[b] * branch[b]`` in the dtype of ``branch (B, N, D)``."""
    if scale is None:
        return branch if factor == 1.0 else branch * factor
    return branch * (scale * factor)[:, None, None].to(branch.dtype)


def stochastic_depth(rates: list[float], branches: int, num_clips: int, device: torch.device) -> Tensor | None:
    """Factors of the residual branches of all blocks (stochastic depth, Huang et al. 2016): a branch is dropped for
    whole clips with its block's probability, the others are scaled up to keep the mean.

    Returns:
        ``(blocks, branches, B)`` float32, or None where every rate is 0.
    """
    if not any(rates):
        return None
    keep = 1.0 - torch.tensor(rates, dtype=torch.float32, device="cpu").to(device, non_blocking=True)[:, None, None]
    return (torch.rand(len(rates), branches, num_clips, device=device, dtype=torch.float32) < keep) / keep


def gated(x: Tensor) -> Tensor:
    """SwiGLU: ``(..., 2 h)`` as gate | value -> ``silu(gate) * value``, ``(..., h)``."""
    if _is_fused(x):
        return _Gated.apply(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def split_heads(
    qkv: Tensor, q_norm: nn.Module, k_norm: nn.Module, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(B, H, N, d)`` of ``qkv (B, N, 3, H, d)``.

    Args:
        qkv: output of one linear layer.
        q_norm, k_norm: ``nn.RMSNorm`` over d, or ``nn.Identity``.
        rotation: cos and sin ``(B or 1, N, d / 2)`` float32 of rotary positions, or None.
    """
    weights = [getattr(norm, "weight", None) for norm in (q_norm, k_norm)]
    plain = rotation is None and weights[0] is None
    if not plain and _is_fused(qkv, *weights):
        cos, sin = (None, None) if rotation is None else rotation
        return _SplitHeads.apply(qkv, *weights, cos, sin, getattr(q_norm, "eps", 0.0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = q_norm(q).to(v.dtype), k_norm(k).to(v.dtype)
    if rotation is not None:
        q, k = turn(q, *rotation), turn(k, *rotation)
    return q, k, v


def _is_fused(x: Tensor, *weights: Tensor | None) -> bool:
    """Return True if the C++ kernels take these activations and weights."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(x) is Tensor
        and all(w is None or (w.dtype == torch.float32 and w.is_contiguous()) for w in weights)
        and x.numel() > 0
        and forced_backend() in (None, "cpu")
        and native.extension_obstacle() is None
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        layer_norm: bool,
        factor: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        total = rows if branch is None else torch.empty_like(rows)
        out = torch.empty_like(rows)
        width = x.shape[-1]
        sizes = (x.dtype == torch.bfloat16, layer_norm, x.numel() // width, width, x.numel() // (len(x) * width))
        native.extension().norm_rows_forward(
            *sizes, rows.data_ptr(), _address(branch), _address(scale), factor, eps, weight.data_ptr(), _address(bias),
            total.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, scale)
        ctx.sizes, ctx.factor, ctx.eps = sizes, factor, eps
        # A branch that is added as it is has the gradient of x.
        ctx.same = scale is None and factor == 1.0
        ctx.has_branch, ctx.has_bias = branch is not None, bias is not None
        return x if branch is None else total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if grad_out is None:
            grad_branch = None
            if ctx.has_branch and grad_total is not None:
                grad_branch = scaled(grad_total, scale, ctx.factor)
            return grad_total, grad_branch, *(None,) * 6
        grad_total = None if grad_total is None else grad_total.to(total.dtype).contiguous()
        grad_out = grad_out.to(total.dtype).contiguous()
        grad_x = torch.empty_like(total)
        separate = ctx.has_branch and not ctx.same
        grad_branch = torch.empty_like(total) if separate else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[3] else None
        grad_bias = torch.empty_like(weight) if ctx.has_bias and ctx.needs_input_grad[4] else None
        native.extension().norm_rows_backward(
            *ctx.sizes, _address(scale), ctx.factor, ctx.eps, weight.data_ptr(), total.data_ptr(),
            _address(grad_total), grad_out.data_ptr(), grad_x.data_ptr(), _address(grad_branch),
            _address(grad_weight), _address(grad_bias), torch.get_num_threads(),
        )  # fmt: skip
        if ctx.has_branch and ctx.same:
            grad_branch = grad_x
        return grad_x, grad_branch, None, grad_weight, grad_bias, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        ctx.sizes = (x.dtype == torch.bfloat16, x.numel() // (2 * width), width)
        native.extension().gated_rows_forward(*ctx.sizes, x.data_ptr(), out.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad, grad_x = grad.to(x.dtype).contiguous(), torch.empty_like(x)
        native.extension().gated_rows_backward(
            *ctx.sizes, x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), torch.get_num_threads()
        )
        return grad_x


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = qkv.contiguous()
        clips, tokens, _, heads, dim = qkv.shape
        cos, sin = (None if x is None else x.contiguous() for x in (cos, sin))
        out = qkv.new_empty(clips, tokens, 2, heads, dim)
        angle_rows = 1 if cos is None else cos.shape[0] * cos.shape[1]
        ctx.sizes = (qkv.dtype == torch.bfloat16, clips * tokens, heads, dim, angle_rows, eps)
        native.extension().rotary_rows_forward(
            *ctx.sizes, qkv.data_ptr(), _address(q_weight), _address(k_weight), _address(cos), _address(sin),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        q, k = out.permute(2, 0, 3, 1, 4).unbind()
        return q, k, qkv.select(2, 2).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        upstream = []
        for grad in grads:
            grad = grad.to(qkv.dtype)
            upstream.append(grad if grad.stride(-1) == 1 else grad.contiguous())
        grad_qkv = torch.empty_like(qkv)
        grad_q = None if q_weight is None else torch.empty_like(q_weight)
        grad_k = None if k_weight is None else torch.empty_like(k_weight)
        places = [(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)) for x in upstream]
        native.extension().rotary_rows_backward(
            *ctx.sizes, qkv.data_ptr(), _address(q_weight), _address(k_weight), _address(cos), _address(sin),
            qkv.shape[1], *places, grad_qkv.data_ptr(), _address(grad_q), _address(grad_k), torch.get_num_threads(),
        )  # fmt: skip
        return grad_qkv, grad_q, grad_k, None, None, None
