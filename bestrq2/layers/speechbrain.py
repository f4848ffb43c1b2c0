"""SpeechBrain's quantizer and relative attention on the operations of this package, with its constructors and names.

Nothing here imports SpeechBrain. The formulas are those of SpeechBrain 1.0.3 and later.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestrq2 import ops
from bestrq2.ops import ChunkLayout

from .precision import default_device, restore_float32


class SpeechBrainRandomProjectionQuantizer(nn.Module):
    """``speechbrain.nnet.quantisers.RandomProjectionQuantizer`` through :func:`bestrq2.ops.quantize`.

    The same seed gives the same buffers, and the codes are those of its formula in exact arithmetic. They differ from
    SpeechBrain's only where two codes are nearly as close. No ``(B, V, T)`` distances are stored. SpeechBrain up to
    1.0.2 normalised over time instead of over the values of a frame, which gives other codes.

    Args:
        input_dim: D, values per frame.
        cb_dim: d, width of a code.
        cb_vocab: V, number of codes.

    Shapes:
        ``(..., D)`` floating -> ``(...)`` int64. Buffers: P ``(D, d)``, CB ``(V, d)`` with unit rows.
    """

    P: Tensor
    CB: Tensor

    def __init__(self, input_dim: int, cb_dim: int, cb_vocab: int) -> None:
        super().__init__()
        self.input_dim, self.cb_dim, self.cb_vocab = input_dim, cb_dim, cb_vocab
        projection = nn.init.xavier_uniform_(torch.empty(input_dim, cb_dim, dtype=torch.float32, device="cpu"))
        codes = torch.randn(cb_vocab, cb_dim, dtype=torch.float32, device="cpu")
        self.register_buffer("P", projection.to(default_device()))
        self.register_buffer("CB", F.normalize(codes).to(default_device()))

    def _apply(self, fn, recurse=True):
        # Targets stay what they are in a model of half precision.
        before = {"P": self.P, "CB": self.CB}
        super()._apply(fn, recurse)
        restore_float32(self, before)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantize(x, self.P, self.CB)


class SpeechBrainRelPosMHAXL(nn.Module):
    """``speechbrain.nnet.attention.RelPosMHAXL`` through :func:`bestrq2.ops.chunked_attention`.

    Parameters have the same names, shapes and, for the same seed, the same initial values. What differs:

    * Attention weights are never stored: where SpeechBrain returns them, this returns None.
    * The window is a :class:`bestrq2.ops.ChunkLayout` instead of an ``attn_mask``; see
      :meth:`bestrq2.ops.ChunkLayout.from_speechbrain`. A mask is an error.
    * There is no dropout of attention weights: ``dropout`` must be 0.

    Args:
        embed_dim: E, a multiple of ``num_heads``.
        num_heads: H.
        dropout: must be 0.
        vbias: whether values get a bias.
        vdim: None or E; SpeechBrain computes nothing else.
        mask_pos_future: no effect, as in SpeechBrain, whose mask keeps every position that is read.

    Raises:
        ValueError: for an ``embed_dim`` that is no multiple of ``num_heads``, and for what is not supported.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        vbias: bool = False,
        vdim: int | None = None,
        mask_pos_future: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}")
        if dropout != 0.0:
            raise ValueError(f"dropout of attention weights is not supported: dropout must be 0, got {dropout}")
        if vdim not in (None, embed_dim):
            raise ValueError(f"vdim must be None or embed_dim = {embed_dim}, got {vdim}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.scale = embed_dim**-0.5
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.value_bias_weight = nn.Parameter(torch.empty(embed_dim)) if vbias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.linear_pos = nn.Linear(embed_dim, embed_dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(self.head_dim, num_heads))
        self.pos_bias_v = nn.Parameter(torch.empty(self.head_dim, num_heads))
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.value_bias_weight is not None:
            nn.init.constant_(self.value_bias_weight, 0.0)
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pos_embs: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        return_attn_weights: bool = True,
        *,
        layout: ChunkLayout | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """Attend within the window of ``layout`` (None: everything).

        Args:
            query, key, value: (B, T, E). As in SpeechBrain, the same tensor three times splits ``in_proj_weight`` head
                by head, and different tensors split it in three blocks.
            pos_embs: (1, 2T - 1, E), from the most distant past to the most distant future (``RelPosEncXL``).
            key_padding_mask: (B, T) bool, True hides a key.
            attn_mask: must be None.
            return_attn_weights: return the pair (output, None), where SpeechBrain returns (output, weights).
            layout: the window.

        Returns:
            (B, T, E), alone or in a pair. Queries that see no key give the bias of the output layer, as in SpeechBrain.

        Raises:
            ValueError: for an ``attn_mask``, a query of another length than the keys, or ``pos_embs`` of another shape.
        """
        if attn_mask is not None:
            raise ValueError("attn_mask is not supported: pass layout=ChunkLayout(...), for example from_speechbrain")
        layout = ChunkLayout() if layout is None else layout
        frames = key.shape[1]
        if query.shape[1] != frames or pos_embs.shape != (1, 2 * frames - 1, self.embed_dim):
            raise ValueError(
                f"expected query and key (B, T, {self.embed_dim}) and pos_embs (1, 2T - 1, {self.embed_dim}), got "
                f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(pos_embs.shape)}"
            )
        heads = (self.num_heads, self.head_dim)
        if query is key and key is value:
            by_head = F.linear(query, self.in_proj_weight).unflatten(-1, (self.num_heads, 3 * self.head_dim))
            query, key, value = by_head.chunk(3, dim=-1)  # (B, T, H, d)
        else:
            blocks = zip((query, key, value), self.in_proj_weight.chunk(3))
            query, key, value = (F.linear(x, weight).unflatten(-1, heads) for x, weight in blocks)
        if self.value_bias_weight is not None:
            value = value + self.value_bias_weight.view(heads)
        position = self.linear_pos(pos_embs[0]).unflatten(-1, heads).transpose(0, 1)  # (H, 2T - 1, d)
        mixed = ops.chunked_attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            chunk_size=layout.chunk_size,
            left_context=layout.left_context,
            right_context=layout.right_context,
            key_mask=None if key_padding_mask is None else ~key_padding_mask,
            position=position.flip(1),  # rows in the order of query minus key
            position_zero=frames - 1,
            content_bias=self.pos_bias_u.view(heads),
            position_bias=self.pos_bias_v.view(heads),
            scale=self.scale,
        )
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (out, None) if return_attn_weights else out
