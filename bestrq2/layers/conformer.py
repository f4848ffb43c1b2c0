"""Conformer blocks (Gulati et al., 2020) for full context, chunks and streaming.

Shape letters: B clips, T frames, N tokens (all frames, or the seen ones), D width, H heads, d = D / H.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bestrq2.ops import ChunkLayout

from .block_rows import (
    Branch,
    LayerNorm,
    drop_rates,
    residual_norm,
    residual_sum,
    stochastic_depth,
    untouched,
)
from .conformer_attention import AttentionCache, RelativeAttention, relative_sinusoids
from .conformer_convolution import (
    ConvMode,
    ConvNorm,
    MaskedBatchNorm,
    check_convolution,
    depthwise_convolution,
    past_frames,
    repeated_forward,
)
from .frame_grid import FrameGrid
from .transformer import init_linear_layers

Activation = Literal["silu", "gelu"]


@dataclass(frozen=True)
class ConformerSettings:
    """Shape and variants of a Conformer; the default sizes are SpeechBrain's BEST-RQ recipe.

    Attributes:
        width, depth, heads: D, number of blocks, H.
        hidden: width of the feed-forward layers; None: 4 D.
        kernel_size: of the depthwise convolution, odd.
        conv_mode: what the convolution may read, see :func:`depthwise_convolution`. "full" cannot stream.
        conv_norm: "layer_norm", or "batch_norm" over the valid frames of the batch.
        activation: of feed-forward and convolution.
        bias: biases of attention and pointwise convolutions.
        dropout: on the output of every module and inside the feed-forward layers.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        symmetric_positions, scale_by_width: SpeechBrain's variants of attention, for its weights.
    """

    width: int = 576
    depth: int = 12
    heads: int = 8
    hidden: int | None = 2048
    kernel_size: int = 31
    conv_mode: ConvMode = "full"
    conv_norm: ConvNorm = "layer_norm"
    activation: Activation = "silu"
    bias: bool = True
    dropout: float = 0.1
    drop_path: float = 0.0
    symmetric_positions: bool = False
    scale_by_width: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads or self.width % 2:
            raise ValueError(
                f"width must be even and a multiple of heads, and depth positive, got width={self.width}, "
                f"heads={self.heads}, depth={self.depth}"
            )
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be positive or None, got {self.hidden}")
        check_convolution(self.kernel_size, self.conv_mode, self.conv_norm)
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {self.activation!r}")
        if not (0 <= self.dropout < 1 and 0 <= self.drop_path < 1):
            raise ValueError(f"dropout and drop_path must lie in [0, 1), got {self.dropout} and {self.drop_path}")

    @property
    def hidden_width(self) -> int:
        return 4 * self.width if self.hidden is None else self.hidden

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class BlockCache:
    """State of a block between chunks: keys and values, and the last inputs ``(B, past, D)`` of its convolution."""

    attention: AttentionCache
    convolution: Tensor


def _activation(kind: Activation) -> nn.Module:
    return nn.SiLU() if kind == "silu" else nn.GELU()


class FeedForward(nn.Module):
    def __init__(self, s: ConformerSettings) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(s.width)
        self.fc1 = nn.Linear(s.width, s.hidden_width)
        self.act = _activation(s.activation)
        self.inner_dropout = nn.Dropout(s.dropout)
        self.fc2 = nn.Linear(s.hidden_width, s.width)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x))

    def layers(self, normed: Tensor) -> Tensor:
        """The module after the norm, which a block joins with the residual sum before it."""
        return self.dropout(self.fc2(self.inner_dropout(self.act(self.fc1(normed)))))


class ConvolutionModule(nn.Module):
    """Norm, pointwise layer, GLU, depthwise convolution over frames, norm, activation, pointwise layer."""

    def __init__(self, s: ConformerSettings) -> None:
        super().__init__()
        self.mode = s.conv_mode
        self.norm = nn.LayerNorm(s.width)
        self.pointwise1 = nn.Linear(s.width, 2 * s.width, bias=s.bias)
        self.kernel_size = s.kernel_size
        self.depthwise = nn.Conv1d(s.width, s.width, s.kernel_size, groups=s.width, bias=s.bias)
        batch_norm = s.conv_norm == "batch_norm"
        self.conv_norm = MaskedBatchNorm(s.width) if batch_norm else nn.LayerNorm(s.width)
        self.act = _activation(s.activation)
        self.pointwise2 = nn.Linear(s.width, s.width, bias=s.bias)
        self.dropout = nn.Dropout(s.dropout)

    def forward(self, x: Tensor, grid: FrameGrid, layout: ChunkLayout, cache: BlockCache | None) -> Tensor:
        return self.layers(self.norm(x), grid, layout, cache)

    def layers(self, normed: Tensor, grid: FrameGrid, layout: ChunkLayout, cache: BlockCache | None) -> Tensor:
        """The module after the first norm, which a block joins with the residual sum before it."""
        frames = grid.to_frames(nn.functional.glu(self.pointwise1(normed), dim=-1))
        past = None if cache is None else cache.convolution
        mixed = depthwise_convolution(frames, self.depthwise, self.kernel_size, self.mode, layout.chunk_size, past)
        if cache is not None:
            joined = torch.cat((cache.convolution.to(frames.dtype), frames), dim=1)
            cache.convolution = joined[:, joined.shape[1] - cache.convolution.shape[1] :].detach().clone()
        tokens = grid.to_tokens(mixed)
        if isinstance(self.conv_norm, MaskedBatchNorm):
            tokens = self.conv_norm(tokens, grid.token_valid)
        else:
            tokens = self.conv_norm(tokens)
        return self.dropout(self.pointwise2(self.act(tokens)))


class ConformerBlock(nn.Module):
    """Half a feed-forward layer, attention, convolution, the other half, norm; ``scales (4, B)``: stochastic depth."""

    def __init__(self, s: ConformerSettings) -> None:
        super().__init__()
        self.ff1 = FeedForward(s)
        self.attn_norm = nn.LayerNorm(s.width)
        self.attn = RelativeAttention(s.width, s.heads, s.bias, s.scale_by_width)
        self.attn_dropout = nn.Dropout(s.dropout)
        self.conv = ConvolutionModule(s)
        self.ff2 = FeedForward(s)
        self.norm = nn.LayerNorm(s.width)

    def forward(
        self,
        x: Tensor,
        grid: FrameGrid,
        table: Tensor,
        layout: ChunkLayout,
        cache: BlockCache | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        first, second, third, last = (None,) * 4 if scales is None else scales.unbind()
        x, normed, ff1 = _enter(x, None, self.ff1, FeedForward)
        x, normed = residual_norm(x, ff1(normed), self.attn_norm, first, 0.5)
        attended = self.attn(normed, grid, table, layout, None if cache is None else cache.attention)
        x, normed, conv = _enter(x, Branch(self.attn_dropout(attended), None, second), self.conv, ConvolutionModule)
        x, normed, ff2 = _enter(x, Branch(conv(normed, grid, layout, cache), None, third), self.ff2, FeedForward)
        return residual_norm(x, ff2(normed), self.norm, last, 0.5)[1]


def _enter(
    x: Tensor, branch: Branch | None, module: nn.Module, kind: type[FeedForward] | type[ConvolutionModule]
) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
    """Residual sum, what a module of the block is given, and its function. The norm that it begins with is joined with
    the sum, unless the module was hooked, compiled or replaced: then it is called as a whole."""
    if untouched(module, kind):
        own = cast(FeedForward | ConvolutionModule, module)
        return *residual_norm(x, branch, own.norm), own.layers
    x = x if branch is None else residual_sum(x, branch)
    return x, x, module


class Conformer(nn.Module):
    """Blocks and a final norm. Linear weights start truncated-normal with deviation 0.02, biases at zero.

    A valid frame's output depends on no padded or absent frame, nor on a frame outside of the layout's reach.
    """

    def __init__(self, settings: ConformerSettings, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.settings = settings
        self.activation_checkpointing = activation_checkpointing
        self.compiled = False  # whether the blocks are, see training/compilation.py
        self.blocks = nn.ModuleList(ConformerBlock(settings) for _ in range(settings.depth))
        self.norm = LayerNorm(settings.width)
        init_linear_layers(self)

    def start_caches(self, num_clips: int, like: Tensor) -> list[BlockCache]:
        """Empty caches for streaming: nothing to attend to, silence before the convolution."""
        s = self.settings
        keys = like.new_zeros(num_clips, s.heads, 0, s.head_dim)
        past = like.new_zeros(num_clips, past_frames(s.kernel_size, s.conv_mode), s.width)
        return [BlockCache(AttentionCache(keys, keys), past) for _ in self.blocks]

    def forward(
        self,
        x: Tensor,
        grid: FrameGrid,
        layout: ChunkLayout,
        caches: list[BlockCache] | None = None,
        layer_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Tokens ``(B, N, D)`` -> ``(B, N, D)``.

        Args:
            x: tokens.
            grid: where they stand; with caches, lengths are counted from the first new frame.
            layout: window of attention; its chunks also bound the convolution in mode "chunk".
            caches: from :meth:`start_caches`, updated in place. All earlier calls must have had whole chunks.
            layer_outputs: receives the output of every block.
        """
        cached = 0 if caches is None else caches[0].attention.key.shape[2]
        offsets = layout.offsets(grid.num_frames, cached + grid.num_frames, query_offset=cached)
        table = relative_sinusoids(*offsets, self.settings.width, self.settings.symmetric_positions, x.device)
        table = table.to(x.dtype)
        rates = drop_rates(self.settings.drop_path, len(self.blocks))  # of blocks added or taken away, too
        scales = stochastic_depth(rates, 4, len(x), x.device) if self.training else None
        if self.compiled:
            for tensor, tokens in ((x, 1), (table, 0)):
                torch._dynamo.maybe_mark_dynamic(tensor, tokens)
        contexts: dict[str, Any] = {}  # whole-model compilation knows no such contexts
        if self.settings.conv_norm == "batch_norm" and not torch.compiler.is_compiling():
            contexts["context_fn"] = lambda: (nullcontext(), repeated_forward())
        for number, block in enumerate(self.blocks):
            of_block = None if scales is None else scales[number]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, grid, table, layout, None, of_block, use_reentrant=False, **contexts)
            else:
                x = block(x, grid, table, layout, None if caches is None else caches[number], of_block)
            if layer_outputs is not None:
                layer_outputs.append(x)
        return self.norm(x)

    def flops(self, tokens: int, frames: int, keys: float) -> float:
        """Operations of one forward pass over one clip (matrix products and depthwise convolutions).

        Args:
            tokens: N, frames that are not absent.
            frames: T.
            keys: mean number of keys that a frame sees; content, position and value products are counted over them.
        """
        s = self.settings
        linear = 2.0 * tokens * s.width * (4 * s.hidden_width + 4 * s.width + 3 * s.width)
        return len(self.blocks) * (linear + 6.0 * frames * keys * s.width + 2.0 * frames * s.width * s.kernel_size)
