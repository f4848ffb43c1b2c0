"""One window rule for every streaming encoder, and the settings of other toolkits in its terms."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..common.arguments import integer

__all__ = ["ChunkLayout"]


@dataclass(frozen=True)
class ChunkLayout:
    """The keys a query sees: its own chunk, some frames to the left of the chunk, some frames to its right.

    Query i lies in chunk ``c = i // chunk_size`` and sees key j iff

        c * chunk_size - left_context  <=  j  <  (c + 1) * chunk_size + right_context

    chunk_size 4, left_context 3, right_context 2 (x: own chunk, <: left, >: right context, one row per query):

        key    0 1 2 3 4 5 6 7 8 9 ...
        i=0    x x x x > >
        ...
        i=3    x x x x > >
        i=4      < < < x x x x > >
        ...
        i=7      < < < x x x x > >

    All contexts are in frames and are counted from the chunk's borders, not from the query. ``chunk_size=1`` gives the
    sliding band ``i - left_context <= j <= i + right_context``. ``chunk_size=None`` is one chunk that holds the whole
    sequence; a context of None is unlimited.

    Pass it as ``chunked_attention(q, k, v, **layout.window)``.
    """

    chunk_size: int | None = None
    left_context: int | None = None
    right_context: int | None = 0

    def __post_init__(self) -> None:
        sizes = {"chunk_size": (1, " or None (whole sequence)")}
        sizes |= dict.fromkeys(("left_context", "right_context"), (0, " or None (unlimited)"))
        for name, (least, also) in sizes.items():
            given = getattr(self, name)
            if given is not None and (checked := integer(name, given, least, also)) is not given:
                object.__setattr__(self, name, checked)  # of another type that counts

    @classmethod
    def from_speechbrain(cls, chunk_size: int, left_context_size: int | None = None) -> "ChunkLayout":
        """SpeechBrain's DynChunkTrainConfig, whose left context counts chunks (None: unlimited)."""
        chunk_size = integer("from_speechbrain: chunk_size", chunk_size, 1)
        if left_context_size is None:
            return cls(chunk_size)
        return cls(
            chunk_size,
            chunk_size
            * integer("from_speechbrain: left_context_size", left_context_size, 0, " chunks or None (unlimited)"),
        )

    @classmethod
    def from_wenet(cls, chunk_size: int, num_left_chunks: int = -1) -> "ChunkLayout":
        """WeNet's decoding or static chunk: sizes below 1 mean full context, ``num_left_chunks < 0`` unlimited."""
        chunk_size = integer("from_wenet: chunk_size", chunk_size)
        num_left_chunks = integer("from_wenet: num_left_chunks", num_left_chunks)
        if chunk_size < 1:
            return cls()
        return cls(chunk_size, None if num_left_chunks < 0 else num_left_chunks * chunk_size)

    @classmethod
    def from_nemo(cls, att_context_size: Sequence[int], style: str = "regular") -> "ChunkLayout":
        """NeMo's ``att_context_size`` = [left, right] frames (-1: unlimited), style "regular" or "chunked_limited".

        ``regular`` is a band around every query. In ``chunked_limited`` the right context is what is left of a chunk of
        right + 1 frames, and left must be a multiple of it, as NeMo requires; with right = -1 NeMo keeps only the left
        limit, counted from the query.
        """
        if not isinstance(att_context_size, Sequence) or len(att_context_size) != 2:
            raise ValueError(f"from_nemo: att_context_size must be one pair [left, right], got {att_context_size!r}")
        left, right = (
            integer(f"from_nemo: att_context_size[{i}]", size, -1) for i, size in enumerate(att_context_size)
        )
        left_context = None if left < 0 else left
        if style == "regular" or (style == "chunked_limited" and right < 0):
            return cls(1, left_context, None if right < 0 else right)
        if style != "chunked_limited":
            raise ValueError(f"from_nemo: style must be 'regular' or 'chunked_limited', got {style!r}")
        if left > 0 and left % (right + 1):
            raise ValueError(
                f"from_nemo: in chunked_limited, left context {left} must be a multiple of right + 1 = {right + 1}"
            )
        return cls(right + 1, left_context)

    @classmethod
    def from_icefall(cls, chunk_size: int, left_context_frames: int = -1, downsampling: int = 1) -> "ChunkLayout":
        """icefall's Zipformer: both sizes at the input rate of the stacks, at least one left chunk, -1 is unlimited.

        ``downsampling`` is the stack's own factor and must divide ``chunk_size``. ``chunk_size=-1`` is full context.
        """
        chunk_size = integer("from_icefall: chunk_size", chunk_size)
        left_context_frames = integer("from_icefall: left_context_frames", left_context_frames)
        downsampling = integer("from_icefall: downsampling", downsampling, 1)
        if chunk_size < 0:
            return cls()
        if chunk_size == 0 or chunk_size % downsampling:
            raise ValueError(
                f"from_icefall: chunk_size must be -1 (full context) or a multiple of downsampling = {downsampling}, "
                f"got {chunk_size}"
            )
        size = chunk_size // downsampling
        if left_context_frames < 0:
            return cls(size)
        return cls(size, max(left_context_frames // chunk_size, 1) * size)

    @property
    def window(self) -> dict[str, int | None]:
        """The three keyword arguments of :func:`bestrq2.ops.chunked_attention`."""
        return asdict(self)

    def mask(
        self,
        query_length: int,
        key_length: int | None = None,
        *,
        query_offset: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(Tq, Tk) bool, True where the query at ``query_offset + row`` sees the key ``column``."""
        key_length = query_length if key_length is None else key_length
        queries, keys, first = _lengths(query_length, key_length, query_offset)
        query = torch.arange(queries, device=device)[:, None] + first
        key = torch.arange(keys, device=device)
        visible = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=device)
        if self.chunk_size is not None:
            chunk_start = query // self.chunk_size * self.chunk_size
            if self.left_context is not None:
                visible &= key >= chunk_start - self.left_context
            if self.right_context is not None:
                visible &= key < chunk_start + min(self.chunk_size + self.right_context, 2**62)  # not past an int64
        return visible

    def offsets(self, query_length: int, key_length: int, *, query_offset: int = 0) -> tuple[int, int]:
        """Bounds (lowest, highest) on query position minus key position over all visible pairs.

        A position table for the layout needs the rows of these offsets: ``highest - lowest + 1`` of them, with
        ``position_zero = -lowest``.
        """
        queries, keys, first = _lengths(query_length, key_length, query_offset)
        lowest, highest = first - keys + 1, first + queries - 1
        if self.chunk_size is not None and self.right_context is not None:
            lowest = max(lowest, 1 - self.chunk_size - self.right_context)
        if self.chunk_size is not None and self.left_context is not None:
            highest = min(highest, self.chunk_size - 1 + self.left_context)
        return lowest, highest


def _lengths(query_length: int, key_length: int, query_offset: int) -> tuple[int, ...]:
    lengths = {"query_length": query_length, "key_length": key_length, "query_offset": query_offset}
    return tuple(integer(name, length, 0) for name, length in lengths.items())
