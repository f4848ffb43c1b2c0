"""Records of tensors and strides that are arguments of the kernels, one each instead of one for every member.

Triton takes named tuples apart: every pointer and stride is specialised as if it were an argument of its own. Sizes
that change from call to call are not in records, because ``do_not_specialize`` does not reach into them.
"""

from typing import Any, NamedTuple


class Frames(NamedTuple):
    """Inputs and output (B, H, T, D) or, as ``strides``, the :class:`Strides` of each."""

    q: Any
    k: Any
    v: Any
    out: Any
    do: Any = None  # of strides alone: those of the output's gradient


class Strides(NamedTuple):
    """Distances between items, heads and frames, in UNIT elements (window.py)."""

    item: Any
    head: Any
    frame: Any


class Given(NamedTuple):
    """Optional inputs, None where absent."""

    bias: Any  # (H, D), added to the query: that of the content, or of the position where the kernel needs that
    lengths: Any  # (B,)
    starts: Any  # (B,)
    key_mask: Any = None  # (B, Tk) bytes


class Rows(NamedTuple):
    """Numbers of each row for the backward (B, H, Tq), in fp32."""

    lse: Any  # log-sum-exp of the scaled scores
    delta: Any  # <output, its gradient>


class QueryGradients(NamedTuple):
    """Tensors that the kernel over query tiles reads and writes; ``q`` is laid out like the output."""

    out: Any  # gradient of the output (B, H, Tq, D), with strides of its own
    q: Any  # (B, H, Tq, D)
    content_bias: Any  # (B * H, tiles, D) fp32 sums of tiles, None where there is no such bias
    position_bias: Any


class KeyGradients(NamedTuple):
    """Tensors that the kernel over key tiles reads and writes."""

    out: Any  # gradient of the output (B, H, Tq, D), with strides of its own
    k: Any  # (B, H, Tk, D); fp32 when ACCUMULATE
    v: Any  # laid out like k


class Positions(NamedTuple):
    """Position scores, score gradients and table (position.py); all None without positions."""

    band: Any
    dscores: Any
    table: Any
    table_head: Any  # distance between the tables of two heads
