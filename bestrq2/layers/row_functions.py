"""Autograd functions around the passes of csrc/block_rows; the formulas are those of block_rows.py."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bestrq2.ops.common import native
from bestrq2.ops.common.dispatch import forced_backend
from bestrq2.ops.common.transforms import refuse_second_derivative


def is_fused(x: Tensor, *weights: Tensor | None) -> bool:
    """Return True if the C++ kernels take these activations and weights."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and have_addresses(x, *weights)
        and all(w is None or (w.is_cpu and w.dtype == torch.float32 and w.is_contiguous()) for w in weights)
        and x.numel() > 0
        and forced_backend() in (None, "cpu")
        and native.extension_obstacle() is None
    )


def have_addresses(*tensors: Tensor | None) -> bool:
    """Return True if kernels may read these by address. Subclasses hold their values elsewhere, or do not have them
    yet: the result of a layer that ``parallelize_module`` split is an AsyncCollectiveTensor."""
    return all(x is None or type(x) is Tensor or type(x) is nn.Parameter for x in tensors)


def arrived(x: Tensor) -> Tensor:
    """A gradient as a plain tensor: that of a split layer is waited for."""
    return x.trigger_wait() if hasattr(x, "trigger_wait") else x


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _exact(x: Tensor | None) -> Tensor | None:
    """Factors or angles as the kernels read them: FSDP's mixed precision, for one, casts all that a block gets."""
    return None if x is None else x.float().contiguous()


class NormSettings(NamedTuple):
    """Arguments of :class:`ResidualNorm` without a gradient.

    Attributes:
        layer_norm: RMSNorm if not.
        factor: of the branch.
        branch_place, out_place: ``Kept.place`` of the clips that the branch has, and of those that are normalised; None
            for all.
        num_out: how many clips are normalised.
    """

    layer_norm: bool
    factor: float
    eps: float
    branch_place: Tensor | None
    out_place: Tensor | None
    num_out: int


class ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        branch_bias: Tensor | None,
        settings: NormSettings,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows, scale = x.contiguous(), _exact(scale)
        branch = None if branch is None else branch.contiguous()
        total = rows if branch is None else torch.empty_like(rows)
        layer_norm, factor, eps, *places, num_out = settings
        out = rows.new_empty(num_out, *x.shape[1:])
        width = x.shape[-1]
        sizes = (x.dtype == torch.bfloat16, layer_norm, x.numel() // width, width, x.numel() // (len(x) * width))
        native.extension().norm_rows_forward(
            *sizes, rows.data_ptr(), address(branch), address(branch_bias), *map(address, places), address(scale),
            factor, eps, weight.data_ptr(), address(bias), total.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, scale, *places)
        ctx.sizes, ctx.factor, ctx.eps = sizes, factor, eps
        ctx.branch_shape = None if branch is None else branch.shape
        # A branch that is added as it is has the gradient of x.
        ctx.same = scale is None and factor == 1.0 and settings.branch_place is None
        return x if branch is None else total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        total, weight, scale, *places = ctx.saved_tensors
        if grad_total is None and grad_out is None:
            return (None,) * 7
        if grad_out is None and ctx.branch_shape is None:
            return grad_total, *(None,) * 6
        grad_total = None if grad_total is None else arrived(grad_total).to(total.dtype).contiguous()
        grad_out = None if grad_out is None else arrived(grad_out).to(total.dtype).contiguous()
        grad_x = torch.empty_like(total)
        grad_branch = None
        if ctx.branch_shape is not None and not ctx.same and ctx.needs_input_grad[1]:
            grad_branch = total.new_empty(ctx.branch_shape)
        wanted = [ctx.needs_input_grad[place] for place in (3, 4, 5)]
        of_weights = [torch.empty_like(weight) if want else None for want in wanted]
        native.extension().norm_rows_backward(
            *ctx.sizes, *map(address, places), address(scale), ctx.factor, ctx.eps, weight.data_ptr(),
            total.data_ptr(), address(grad_total), address(grad_out), grad_x.data_ptr(), address(grad_branch),
            *map(address, of_weights), torch.get_num_threads(),
        )  # fmt: skip
        if ctx.branch_shape is not None and ctx.same:
            grad_branch = grad_x
        return grad_x, grad_branch, None, *of_weights, None


class ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        factor: float,
        place: Tensor | None,
    ) -> Tensor:
        x, branch, scale = x.contiguous(), branch.contiguous(), _exact(scale)
        total, width = torch.empty_like(x), x.shape[-1]
        ctx.sizes = (x.dtype == torch.bfloat16, False, x.numel() // width, width, x.numel() // (len(x) * width))
        native.extension().norm_rows_forward(
            *ctx.sizes, x.data_ptr(), branch.data_ptr(), address(bias), address(place), 0, address(scale), factor,
            0.0, 0, 0, total.data_ptr(), 0, torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(scale, place)
        ctx.factor, ctx.shape, ctx.same = factor, branch.shape, scale is None and factor == 1.0 and place is None
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        scale, place = ctx.saved_tensors
        of_bias = grad.new_empty(grad.shape[-1], dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if ctx.same and of_bias is None:
            return grad, grad, *(None,) * 4
        grad = arrived(grad).contiguous()
        grad_x = torch.empty_like(grad)
        grad_branch = None if ctx.same else grad.new_empty(ctx.shape)
        native.extension().norm_rows_backward(
            *ctx.sizes, address(place), 0, address(scale), ctx.factor, 0.0, 0, 0, grad.data_ptr(), 0,
            grad_x.data_ptr(), address(grad_branch), 0, 0, address(of_bias), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_x if grad_branch is None else grad_branch, of_bias, None, None, None


class Bf16Product(torch.autograd.Function):
    """``x W^T`` of ``x (M, K)`` bf16 and ``W (N, K)`` float32 rounded to bf16, as under autocast.

    The gradient of W is handed on in bf16, as it was computed. Autograd converts it, unless W accepts it as it is
    (``Tensor.grad_dtype``).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rounded = weight.to(torch.bfloat16)
        ctx.save_for_backward(x, rounded)
        return _bf16_product(x, rounded.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        x, weight = ctx.saved_tensors
        grad = grad.to(torch.bfloat16)
        grad_x = _bf16_product(grad, weight) if ctx.needs_input_grad[0] else None
        return grad_x, _bf16_product(grad.t(), x) if ctx.needs_input_grad[1] else None


def _bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of bf16 matrices, rounded once. A processor without bf16 instructions multiplies in fp32: the library
    would imitate them a hundred times slower."""
    if native.extension().bf16_dot() != "none":
        return torch.mm(a, b)
    with torch.autocast("cpu", enabled=False):  # it would make them bf16 again
        return torch.mm(a.float(), b.float()).to(torch.bfloat16)


class Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        # The product has no other reader, and its own backward pass does not need it. Detached, because autograd would
        # take a change in place of a view for one of its base.
        out = x.detach()
        width = x.shape[-1]
        ctx.sizes = (x.dtype == torch.bfloat16, x.numel() // width, width)
        native.extension().add_bias_rows(*ctx.sizes, out.data_ptr(), bias.data_ptr(), torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        if not ctx.needs_input_grad[1]:
            return grad, None
        grad = arrived(grad).contiguous()
        sums = grad.new_empty(grad.shape[-1], dtype=torch.float32)
        native.extension().sum_rows(*ctx.sizes, grad.data_ptr(), sums.data_ptr(), torch.get_num_threads())
        return grad, sums


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        ctx.sizes = (x.dtype == torch.bfloat16, x.numel() // width, width)
        native.extension().gelu_rows_forward(
            *ctx.sizes, x.data_ptr(), address(bias), out.data_ptr(), torch.get_num_threads()
        )
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        x, bias = ctx.saved_tensors
        grad, grad_x = arrived(grad).to(x.dtype).contiguous(), torch.empty_like(x)
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[1] else None
        native.extension().gelu_rows_backward(
            *ctx.sizes, x.data_ptr(), address(bias), grad.data_ptr(), grad_x.data_ptr(), address(of_bias),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, of_bias


class Gated(torch.autograd.Function):
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
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative("a fused layer")
        (x,) = ctx.saved_tensors
        grad, grad_x = arrived(grad).to(x.dtype).contiguous(), torch.empty_like(x)
        native.extension().gated_rows_backward(
            *ctx.sizes, x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), torch.get_num_threads()
        )
        return grad_x


class SplitHeads(torch.autograd.Function):
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
        cos, sin = _exact(cos), _exact(sin)
        out = qkv.new_empty(clips, tokens, 2, heads, dim)
        angle_rows = 1 if cos is None else cos.shape[0] * cos.shape[1]
        ctx.sizes = (qkv.dtype == torch.bfloat16, clips * tokens, heads, dim, angle_rows, eps)
        native.extension().rotary_rows_forward(
            *ctx.sizes, qkv.data_ptr(), address(q_weight), address(k_weight), address(cos), address(sin),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        q, k = out.permute(2, 0, 3, 1, 4).unbind()
        return q, k, qkv.select(2, 2).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a fused layer")
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        upstream = []
        for grad in grads:
            grad = arrived(grad).to(qkv.dtype)
            upstream.append(grad if grad.stride(-1) == 1 else grad.contiguous())
        grad_qkv = torch.empty_like(qkv)
        grad_q = None if q_weight is None else torch.empty_like(q_weight)
        grad_k = None if k_weight is None else torch.empty_like(k_weight)
        places = [(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1)) for x in upstream]
        native.extension().rotary_rows_backward(
            *ctx.sizes, qkv.data_ptr(), address(q_weight), address(k_weight), address(cos), address(sin),
            qkv.shape[1], *places, grad_qkv.data_ptr(), address(grad_q), address(grad_k), torch.get_num_threads(),
        )  # fmt: skip
        return grad_qkv, grad_q, grad_k, None, None, None
