"""Blocks whose queries attend to a context and not to each other (the decoder of CrossMAE, Fu et al. 2024).

Shape letters: B clips, M queries, N context tokens, D width, H heads, d = D / H.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend
from .block_rows import (
    Branch,
    Rotation,
    drop_rates,
    linear,
    product,
    residual_norm,
    residual_sum,
    stochastic_depth,
    untouched,
)
from .positions import turn
from .transformer import Mlp, TransformerSettings, init_linear_layers, make_norm, with_bias

PredictorAttention = Literal["full", "cross"]


@dataclass(frozen=True)
class PredictorSettings(TransformerSettings):
    """Shape of the predictor.

    Attributes:
        depth: blocks. Published: 4; with "cross" one or two suffice.
        attention: "full" (published): context and mask tokens together. "cross": mask tokens attend to the context
            alone, so that the cost of a masked token does not grow with their number.
        share: share of the masked tokens that are predicted, in (0, 1], another choice for every clip and step. The
            others are neither seen nor predicted.
    """

    depth: int = 4
    attention: PredictorAttention = "full"
    share: float = 1.0

    def check(self) -> None:
        super().check()
        if self.attention not in get_args(PredictorAttention):
            raise ValueError(f"attention must be one of {get_args(PredictorAttention)}, got {self.attention!r}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a context, ``lengths (B,)`` valid context tokens on the device or None."""

    def __init__(self, s: TransformerSettings) -> None:
        super().__init__()
        self.heads = s.heads
        self.q = nn.Linear(s.width, s.width, bias=s.bias)
        self.kv = nn.Linear(s.width, 2 * s.width, bias=s.bias)
        self.q_norm = nn.RMSNorm(s.head_dim, eps=1e-5) if s.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(s.head_dim, eps=1e-5) if s.qk_norm else nn.Identity()
        self.proj = nn.Linear(s.width, s.width, bias=s.bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        lengths: Tensor | None,
        rotation: Rotation | None,
        context_rotation: Rotation | None,
    ) -> Tensor:
        return with_bias(*self.product(x, context, lengths, rotation, context_rotation))

    def product(
        self,
        x: Tensor,
        context: Tensor,
        lengths: Tensor | None,
        rotation: Rotation | None,
        context_rotation: Rotation | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Results for the queries, and the bias that is still to be added or None."""
        q = linear(self.q, x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = linear(self.kv, context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if rotation is not None and context_rotation is not None:
            q, k = turn(q, *rotation), turn(k, *context_rotation)
        return product(self.proj, attend(q, k, v, lengths, cross=True).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Attention to the context and feed-forward, each ``x + scale * dropout(branch(norm(x)))``."""

    def __init__(self, s: TransformerSettings) -> None:
        super().__init__()
        self.norm1 = make_norm(s.norm, s.width)
        self.attn = CrossAttention(s)
        self.norm2 = make_norm(s.norm, s.width)
        self.mlp = Mlp(s)
        self.dropout = s.dropout

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        rotation: Rotation | None = None,
        context_rotation: Rotation | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        first, second = (None, None) if scales is None else scales.unbind()
        x, normed = residual_norm(x, None, self.norm1)
        arguments = (normed, context, lengths, rotation, context_rotation)
        own = untouched(self.attn, CrossAttention)
        values, bias = self.attn.product(*arguments) if own else (self.attn(*arguments), None)
        x, normed = residual_norm(x, self._branch(values, bias, first), self.norm2)
        values, bias = self.mlp.product(normed) if untouched(self.mlp, Mlp) else (self.mlp(normed), None)
        return residual_sum(x, self._branch(values, bias, second))

    def _branch(self, values: Tensor, bias: Tensor | None, scale: Tensor | None) -> Branch:
        if self.dropout and self.training:
            values, bias = F.dropout(with_bias(values, bias), self.dropout), None
        return Branch(values, bias, scale)


class CrossTransformer(nn.Module):
    """Blocks and a final norm; the context is normalised once for all of them.

    Shapes:
        x ``(B, M, D)``, context ``(B, N, D)``, lengths ``(B,)`` valid context tokens on the CPU (None: all), angles
        ``(B or 1, M, d / 2)`` and context_angles ``(B or 1, N, d / 2)`` of rotary positions or None -> ``(B, M, D)``.
    """

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        settings.check()
        self.settings = settings
        self.context_norm = make_norm(settings.norm, settings.width)
        self.blocks = nn.ModuleList(CrossBlock(settings) for _ in range(settings.depth))
        self.norm = make_norm(settings.norm, settings.width)
        init_linear_layers(self)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        angles: Tensor | None = None,
        context_angles: Tensor | None = None,
    ) -> Tensor:
        context = residual_norm(context, None, self.context_norm)[1]
        if lengths is not None:
            padded = bool((lengths < context.shape[1]).any())
            lengths = lengths.to(x.device, non_blocking=True) if padded else None
        rotation = None if angles is None else (angles.cos(), angles.sin())
        of_context = None if context_angles is None else (context_angles.cos(), context_angles.sin())
        rates = drop_rates(self.settings.drop_path, len(self.blocks))  # of blocks added or taken away, too
        scales = stochastic_depth(rates, 2, len(x), x.device) if self.training else None
        for number, block in enumerate(self.blocks):
            x = block(x, context, lengths, rotation, of_context, None if scales is None else scales[number])
        return residual_norm(x, None, self.norm)[1]

    def flops(self, queries: int, context: int) -> float:
        """Floating-point operations of one forward pass over one clip (matrix products only)."""
        s = self.settings
        gated = 3 if s.feed_forward == "swiglu" else 2
        linear = 2.0 * s.width * (queries * (2 * s.width + gated * s.hidden_width) + context * 2 * s.width)
        return len(self.blocks) * (linear + 4.0 * queries * context * s.width)
