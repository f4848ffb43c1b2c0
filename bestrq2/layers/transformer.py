"""Pre-norm Transformer blocks on padded token sequences.

Shape letters: B clips, N tokens, D width, H heads, d = D / H. Parameter names follow timm's ViT
(``blocks.0.attn.qkv``).
"""

from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, self_attend
from .block_rows import (
    Branch,
    Kept,
    LayerNorm,
    RMSNorm,
    Rotation,
    drop_rates,
    gated,
    gelu,
    kept_clips,
    linear,
    product,
    residual_norm,
    residual_sum,
    split_heads,
    stochastic_depth,
    untouched,
)

Norm = Literal["layer_norm", "rms_norm"]
FeedForward = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class TransformerSettings:
    """Shape and variants of a Transformer; the defaults are those of the published BEST-RQ-2 encoder.

    Attributes:
        width: D, numbers per token.
        depth: number of blocks.
        heads: H, attention heads.
        hidden: width of the feed-forward layer. None: 4 D for "gelu", 8/3 D for "swiglu" (the same parameter count).
        norm: "layer_norm" or "rms_norm", eps 1e-5.
        feed_forward: "gelu" (exact) or "swiglu".
        bias: biases in all linear layers of the blocks.
        qk_norm: RMS-normalise queries and keys per head.
        dropout: on attention output and feed-forward output.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    norm: Norm = "layer_norm"
    feed_forward: FeedForward = "gelu"
    bias: bool = True
    qk_norm: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise a :class:`ValueError` for settings that do not fit together."""
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads and depth positive, got width={self.width}, heads={self.heads}, "
                f"depth={self.depth}"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be positive or None, got {self.hidden}")
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if self.feed_forward not in get_args(FeedForward):
            raise ValueError(f"feed_forward must be one of {get_args(FeedForward)}, got {self.feed_forward!r}")
        if not (0 <= self.dropout < 1 and 0 <= self.drop_path < 1):
            raise ValueError(f"dropout and drop_path must lie in [0, 1), got {self.dropout} and {self.drop_path}")

    @property
    def hidden_width(self) -> int:
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.feed_forward == "gelu" else 8 * self.width // 3

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def init_linear_layers(module: nn.Module) -> None:
    """Weights of all linear layers inside truncated-normal with deviation 0.02, biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def make_norm(kind: Norm, width: int) -> nn.LayerNorm | nn.RMSNorm:
    return LayerNorm(width, eps=1e-5) if kind == "layer_norm" else RMSNorm(width, eps=1e-5)


class Attention(nn.Module):
    """Multi-head self-attention; ``lengths (B,)`` are valid tokens on the device, None: all."""

    def __init__(self, s: TransformerSettings) -> None:
        super().__init__()
        self.heads = s.heads
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=s.bias)
        self.q_norm = nn.RMSNorm(s.head_dim, eps=1e-5) if s.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(s.head_dim, eps=1e-5) if s.qk_norm else nn.Identity()
        self.proj = nn.Linear(s.width, s.width, bias=s.bias)

    def forward(self, x_BND: Tensor, lengths: Tensor | None, rotation: Rotation | None) -> Tensor:
        return with_bias(*self.product(x_BND, lengths, rotation))

    def product(
        self, x_BND: Tensor, lengths: Tensor | None, rotation: Rotation | None, first: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Results for the tokens from ``first`` on, ``(B, N - first, D)``, and the bias that is still to be added or
        None."""
        B, N, D = x_BND.shape
        shape = (B, N, 3, self.heads, D // self.heads)
        if rotation is None and all(untouched(norm, nn.Identity) for norm in (self.q_norm, self.k_norm)):
            qkv, bias = product(self.qkv, x_BND)
            mixed = self_attend(qkv.view(shape), lengths, first, bias)
        else:
            q, k, v = split_heads(linear(self.qkv, x_BND).view(shape), self.q_norm, self.k_norm, rotation)
            mixed = attend(q[:, :, first:], k, v, lengths)
        return product(self.proj, mixed.transpose(1, 2).reshape(B, N - first, D))


def with_bias(values: Tensor, bias: Tensor | None) -> Tensor:
    return values if bias is None else values + bias.to(values.dtype)


class Mlp(nn.Module):
    """``fc2(gelu(fc1 x))`` or SwiGLU ``fc2(silu(a) * b)`` with ``a, b = fc1 x``."""

    def __init__(self, s: TransformerSettings) -> None:
        super().__init__()
        self.gated = s.feed_forward == "swiglu"
        self.fc1 = nn.Linear(s.width, s.hidden_width * (2 if self.gated else 1), bias=s.bias)
        self.fc2 = nn.Linear(s.hidden_width, s.width, bias=s.bias)

    def forward(self, x: Tensor) -> Tensor:
        return with_bias(*self.product(x))

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The result and the bias that is still to be added to it, or None."""
        hidden = gated(linear(self.fc1, x)) if self.gated else gelu(*product(self.fc1, x))
        return product(self.fc2, hidden)


class Block(nn.Module):
    """Attention and feed-forward, each ``x + scale * dropout(branch(norm(x)))``.

    Shapes:
        x ``(B, N, D)``, lengths ``(B,)`` valid tokens on the device or None, rotation: cos and sin
        ``(B or 1, N, d / 2)`` or None, scales ``(2, B)`` of stochastic depth or None -> ``(B, N, D)``.
    """

    def __init__(self, s: TransformerSettings) -> None:
        super().__init__()
        self.norm1 = make_norm(s.norm, s.width)
        self.attn = Attention(s)
        self.norm2 = make_norm(s.norm, s.width)
        self.mlp = Mlp(s)
        self.dropout = s.dropout

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, rotation: Rotation | None = None, scales: Tensor | None = None
    ) -> Tensor:
        return residual_sum(*self.advance(x, None, lengths, rotation, scales))

    def advance(
        self,
        x: Tensor,
        pending: Branch | None,
        lengths: Tensor | None = None,
        rotation: Rotation | None = None,
        scales: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Branch]:
        """The same in parts: add the ``pending`` branch of the block before to x, and return the residual of this block
        and its last branch, which the next pass over them adds.

        Only the tokens from ``first`` on are carried through: ``(B, N - first, D)``.
        """
        scale, second = (None, None) if scales is None else scales.unbind()
        kept = kept_clips(scale, x)
        x, normed = residual_norm(x, pending, self.norm1, kept=kept)
        if kept is not None:
            lengths_kept, rotation_kept = _of_clips(kept, lengths, rotation)
            attended = self._attended(normed, lengths_kept, rotation_kept, first)
        else:
            attended = self._attended(normed, lengths, rotation, first)
        branch = self._branch(*attended, scale, kept)
        kept = kept_clips(second, x)
        x, normed = residual_norm(x[:, first:] if first else x, branch, self.norm2, kept=kept)
        values, bias = self.mlp.product(normed) if untouched(self.mlp, Mlp) else (self.mlp(normed), None)
        return x, self._branch(values, bias, second, kept)

    def _attended(
        self, x: Tensor, lengths: Tensor | None, rotation: Rotation | None, first: int
    ) -> tuple[Tensor, Tensor | None]:
        if untouched(self.attn, Attention):
            return self.attn.product(x, lengths, rotation, first)
        return self.attn(x, lengths, rotation)[:, first:], None

    def _branch(self, values: Tensor, bias: Tensor | None, scale: Tensor | None, kept: Kept | None) -> Branch:
        if self.dropout and self.training:
            values, bias = F.dropout(with_bias(values, bias), self.dropout), None
        return Branch(values, bias, scale, kept=kept)


def _of_clips(kept: Kept, lengths: Tensor | None, rotation: Rotation | None) -> tuple[Tensor | None, Rotation | None]:
    if rotation is not None and len(rotation[0]) > 1:
        rotation = (rotation[0][kept.clips], rotation[1][kept.clips])
    return None if lengths is None else lengths[kept.clips], rotation


class Transformer(nn.Module):
    """Blocks and a final norm. Linear weights start truncated-normal with deviation 0.02, biases at zero.

    Shapes:
        x ``(B, N, D)``, lengths ``(B,)`` valid leading tokens on the CPU (None: all), angles ``(B or 1, N, d / 2)`` for
        rotary positions -> ``(B, N - first, D)`` of the tokens from ``first`` on. Padded tokens reach no valid one.
    """

    def __init__(self, settings: TransformerSettings, activation_checkpointing: bool = False) -> None:
        super().__init__()
        settings.check()
        self.settings = settings
        self.activation_checkpointing = activation_checkpointing
        self.compiled = False  # whether the blocks are, see training/compilation.py
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = make_norm(settings.norm, settings.width)
        init_linear_layers(self)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        angles: Tensor | None = None,
        layer_outputs: list[Tensor] | None = None,
        first: int = 0,
    ) -> Tensor:
        padded = lengths is not None and bool((lengths < x.shape[1]).any())
        lengths = lengths.to(x.device, non_blocking=True) if lengths is not None and padded else None
        rotation = None if angles is None else (angles.cos(), angles.sin())
        if self.compiled:
            for tensor in (x, *(rotation or ())):
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        # Drawn here, not in the blocks: their constants would make torch.compile compile each of them again.
        rates = drop_rates(self.settings.drop_path, len(self.blocks))  # of blocks added or taken away, too
        scales = stochastic_depth(rates, 2, len(x), x.device) if self.training else None
        of_block = (None,) * len(self.blocks) if scales is None else scales.unbind()
        if layer_outputs is None and self._advances():
            branch: Branch | None = None
            start = first if lengths is None else 0  # padding is that of keys and queries alike
            for number, (block, scale) in enumerate(zip(self.blocks, of_block), 1):
                # What the last block would make of the tokens before `first` is not read.
                x, branch = cast(Block, block).advance(
                    x, branch, lengths, rotation, scale, start if number == len(of_block) else 0
                )
            return residual_norm(x, branch, self.norm)[1][:, first - start :]
        for block, scale in zip(self.blocks, of_block):
            arguments = (x, lengths, rotation, scale)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
            if layer_outputs is not None:
                layer_outputs.append(x)
        return self.norm(x)[:, first:]

    def _advances(self) -> bool:
        """Return True if blocks may hand on their last branch: they are not compiled, hooked or recomputed."""
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        if self.compiled or checkpointing or not untouched(self.norm, type(self.norm)):
            return False
        return all(untouched(block, Block) for block in self.blocks)

    def flops(self, tokens: int, wanted: int | None = None) -> float:
        """Floating-point operations of one forward pass over one clip of ``tokens`` tokens (matrix products only), of
        which ``wanted`` are read from the last block (None: all)."""
        s = self.settings
        wanted = tokens if wanted is None else wanted
        of_token = 2.0 * s.width * (s.width + (3 if s.feed_forward == "swiglu" else 2) * s.hidden_width)

        def block(queries: int) -> float:
            return tokens * 6.0 * s.width * s.width + queries * of_token + 4.0 * queries * tokens * s.width

        return (len(self.blocks) - 1) * block(tokens) + block(wanted)
