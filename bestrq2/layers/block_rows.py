"""The row-wise work of a block between its products: residual sum and norm, rotary positions, query and key norms,
GELU, SwiGLU. Each is one pass over memory on CPUs (csrc/block_rows), with fp32 arithmetic on fp32 or bf16 activations.
The bias of a linear layer is added by the pass that reads the product (:func:`product`), which also sums its gradient.

The plain PyTorch formulas below are the specification. They run on GPUs (where torch.compile fuses them), under
torch.compile and function transforms, in other dtypes, and where the extension is not built.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bestrq2.ops.common.compiler import constant_when_compiled

from .positions import turn
from .row_functions import (
    Bf16Product,
    Bias,
    Gated,
    Gelu,
    NormSettings,
    ResidualNorm,
    ResidualSum,
    SplitHeads,
    have_addresses,
    is_fused,
)

Rotation = tuple[Tensor, Tensor]


class Kept(NamedTuple):
    """The clips of a batch of B whose residual branch is computed at all; see :func:`kept_clips`.

    Attributes:
        clips: ``(K,)`` int64, ascending.
        place: ``(B,)`` int64, number of a clip within ``clips``, or -1.
    """

    clips: Tensor
    place: Tensor


class Branch(NamedTuple):
    """A residual branch that the next pass over the residual adds: ``x + factor * scale * (values + bias)``.

    Attributes:
        values: ``(B, N, D)``, or ``(K, N, D)`` of the clips ``kept``.
        bias: ``(D,)`` float32 or None.
        scale: ``(B,)`` float32 of stochastic depth, or None: 1.
        factor: constant (Conformer: 0.5).
        kept: None: all clips. The branch of the others counts as 0.
    """

    values: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    factor: float = 1.0
    kept: Kept | None = None

    def summand(self) -> Tensor:
        """``(B, N, D)`` what is added, in PyTorch's own operators."""
        values = self.values if self.bias is None else self.values + self.bias.to(self.values.dtype)
        if self.kept is not None:
            full = values.new_zeros(len(self.kept.place), *values.shape[1:])
            values = full.index_copy(0, self.kept.clips, values)
        return scaled(values, self.scale, self.factor)


def residual_norm(
    x: Tensor,
    branch: Tensor | Branch | None,
    norm: nn.LayerNorm | nn.RMSNorm,
    scale: Tensor | None = None,
    factor: float = 1.0,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """``total = x + factor * scale * branch`` and ``norm(total)``.

    Args:
        x: ``(B, N, D)``.
        branch: like x, or None: total is x. A :class:`Branch` has its own scale and factor.
        norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` over D.
        scale: ``(B,)`` float32 of stochastic depth, or None: 1.
        factor: constant of the branch (Conformer: 0.5).
        kept: normalise these clips alone.

    Returns:
        total like x, and norm(total) of all clips or of ``kept``. Use the returned total, not x, for the residual path:
        the gradients of both are then joined in one pass.
    """
    pending = Branch(branch, None, scale, factor) if isinstance(branch, Tensor) else branch
    if not (type(norm) in _NORMS and untouched(norm, type(norm)) and x.shape[-1:] == tuple(norm.normalized_shape)):
        total = x if pending is None else residual_sum(x, pending)
        return total, norm(total if kept is None else total[kept.clips])
    return _residual_norm(x, pending, norm, kept)


def _residual_norm(
    x: Tensor, pending: Branch | None, norm: nn.LayerNorm | nn.RMSNorm, kept: Kept | None
) -> tuple[Tensor, Tensor]:
    """:func:`residual_norm` by the parameters of the norm, whatever it does when it is called."""
    if (
        norm.weight is not None
        and is_fused(x, norm.weight, getattr(norm, "bias", None), None if pending is None else pending.bias)
        and (pending is None or _is_like(pending.values, x))
    ):
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        values, branch_bias, scale, factor, of_branch = pending or Branch(x)
        places = (None if of_branch is None else of_branch.place, None if kept is None else kept.place)
        num_out = len(x) if kept is None else len(kept.clips)
        settings = NormSettings(isinstance(norm, nn.LayerNorm), factor, eps, *places, num_out)
        branch = None if pending is None else values
        return ResidualNorm.apply(x, branch, scale, norm.weight, bias, branch_bias, settings)
    total = x if pending is None else x + pending.summand()
    return total, plain_norm(total if kept is None else total[kept.clips], norm)


def residual_sum(x: Tensor, branch: Branch) -> Tensor:
    """``x + branch``, as :func:`residual_norm` without a norm."""
    if is_fused(x, branch.bias) and _is_like(branch.values, x):
        place = None if branch.kept is None else branch.kept.place
        return ResidualSum.apply(x, branch.values, branch.bias, branch.scale, branch.factor, place)
    return x + branch.summand()


def _is_like(values: Tensor, x: Tensor) -> bool:
    return values.dtype == x.dtype and have_addresses(values)


def kept_clips(scale: Tensor | None, x: Tensor) -> Kept | None:
    """The clips whose branch ``scale (B,)`` does not drop; None: all, or no use is made of it.

    What is dropped is multiplied by 0, so leaving it out changes no result. On GPUs, the count would have to be waited
    for. At least one clip is kept, so that nothing gets empty tensors.
    """
    if scale is None or not is_fused(x):
        return None
    clips = scale.nonzero()[:, 0]
    if len(clips) == len(scale):
        return None
    if len(clips) == 0:
        clips = torch.zeros(1, dtype=torch.int64, device="cpu")
    place = torch.full(scale.shape, -1, device="cpu")
    place[clips] = torch.arange(len(clips), device="cpu")
    return Kept(clips, place)


def plain_norm(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    """Result of ``norm`` for x, in PyTorch's own operators."""
    shape = [*norm.normalized_shape]
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(x, shape, norm.weight, norm.eps)


def _normalised(x: Tensor, norm: nn.LayerNorm | nn.RMSNorm) -> Tensor:
    rows = x.shape[-1:] == tuple(norm.normalized_shape)
    return _residual_norm(x, None, norm, None)[1] if rows else plain_norm(x, norm)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, in one pass on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension, in one pass on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalised(x, self)


_NORMS = (LayerNorm, RMSNorm, nn.LayerNorm, nn.RMSNorm)


def scaled(branch: Tensor, scale: Tensor | None, factor: float = 1.0) -> Tensor:
    """``factor * scale[b] * branch[b]`` in the dtype of ``branch (B, N, D)``."""
    if scale is None:
        return branch if factor == 1.0 else branch * factor
    return branch * (scale * factor)[:, None, None].to(branch.dtype)


def drop_rates(most: float, depth: int) -> list[float]:
    """Rates of stochastic depth: from 0 at the first block linearly to ``most`` at the last."""
    return [most * block / max(1, depth - 1) for block in range(depth)]


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


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True for a module that is not replaced, compiled or hooked: its parts may be used without calling it.
    A hook of all modules (``torch.nn.modules.module.register_module_forward_hook``) hooks this one, too, and so does
    another ``forward`` of its class."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks),
        *(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks),
        *(torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks),
    )
    changed = module._compiled_call_impl is not None or "forward" in module.__dict__ or any(hooks)
    return type(module) is kind and not changed and not _was_given_another_forward(kind)


@constant_when_compiled
def _was_given_another_forward(kind: type[nn.Module]) -> bool:
    return kind.forward.__module__ != kind.__module__ or hasattr(kind.forward, "__wrapped__")


def product(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``x W^T`` and the bias that is still to be added (None: it is in there, or the layer has none).

    Left to the next pass, the bias costs no memory traffic of its own: PyTorch copies it to every row before a product
    on a CPU and reads the whole gradient once more for its sum.
    """
    if not untouched(layer, nn.Linear):  # a module in its place may have no weight
        return layer(x), None
    weight, bias = layer.weight, layer.bias
    if type(weight) is not nn.Parameter or not is_fused(x, weight, bias):
        return layer(x), None
    rows = x.flatten(0, -2)
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return layer(x), None
        values = Bf16Product.apply(rows.to(torch.bfloat16), weight)
    else:
        values = F.linear(rows, weight)
    return values.view(*x.shape[:-1], -1), bias


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, with a faster sum for the gradient of its bias."""
    values, bias = product(layer, x)
    return values if bias is None else add_bias(values, bias)


def add_bias(values: Tensor, bias: Tensor) -> Tensor:
    """``values (..., D) + bias (D,)``, in place on CPUs: of a product that has no other reader."""
    if not is_fused(values, bias):
        return values + bias.to(values.dtype)
    if torch._C._len_torch_dispatch_stack():  # a reader: selective activation checkpointing saves products
        return (values.float() + bias).to(values.dtype)
    return Bias.apply(values, bias)


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact GELU of ``x (..., D)`` plus ``bias (D,)``."""
    if is_fused(x, bias):
        return Gelu.apply(x, bias)
    return F.gelu(x if bias is None else x + bias.to(x.dtype))


def gated(x: Tensor) -> Tensor:
    """SwiGLU: ``(..., 2 h)`` as gate | value -> ``silu(gate) * value``, ``(..., h)``."""
    if is_fused(x):
        return Gated.apply(x)
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
    if not plain and _are_own_head_norms(q_norm, k_norm, qkv.shape[-1]) and is_fused(qkv, *weights):
        cos, sin = (None, None) if rotation is None else rotation
        return SplitHeads.apply(qkv, *weights, cos, sin, getattr(q_norm, "eps", 0.0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = q_norm(q).to(v.dtype), k_norm(k).to(v.dtype)
    if rotation is not None:
        q, k = turn(q, *rotation), turn(k, *rotation)
    return q, k, v


def _are_own_head_norms(q_norm: nn.Module, k_norm: nn.Module, width: int) -> bool:
    if all(untouched(norm, nn.Identity) for norm in (q_norm, k_norm)):
        return True
    return all(
        untouched(norm, nn.RMSNorm)
        and norm.weight is not None
        and norm.weight.shape == (width,)
        and norm.eps is not None
        and norm.eps == q_norm.eps
        for norm in (q_norm, k_norm)
    )
