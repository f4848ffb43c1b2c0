"""One window rule for every streaming encoder, and the settings of other toolkits in its terms."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

__all__ = ["ChunkLayout"]


@dataclass(frozen=True)
class ChunkLayout:
    """Which keys a query sees: its own chunk, some frames to the left of the chunk, some frames to its right.

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
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None (whole sequence), got {self.chunk_size}")
        for name in ("left_context", "right_context"):
            frames = getattr(self, name)
            if frames is not None and frames < 0:
                raise ValueError(f"{name} must be at least 0 frames or None (unlimited), got {frames}")

    @classmethod
    def from_speechbrain(cls, chunk_size: int, left_context_size: int | None = None) -> "ChunkLayout":
        """SpeechBrain's DynChunkTrainConfig, whose left context counts chunks (None: unlimited)."""
        return cls(chunk_size, None if left_context_size is None else left_context_size * chunk_size)

    @classmethod
    def from_wenet(cls, chunk_size: int, num_left_chunks: int = -1) -> "ChunkLayout":
        """WeNet's decoding or static chunk: sizes below 1 mean full context, ``num_left_chunks < 0`` unlimited."""
        if chunk_size < 1:
            return cls()
        return cls(chunk_size, None if num_left_chunks < 0 else num_left_chunks * chunk_size)

    @classmethod
    def from_nemo(cls, att_context_size: tuple[int, int], style: str = "regular") -> "ChunkLayout":
        """NeMo's ``att_context_size`` = [left, right] frames (-1: unlimited), style "regular" or "chunked_limited".

        ``regular`` is a band around every query. In ``chunked_limited`` the right context is what is left of a chunk of
        right + 1 frames, and left must be a multiple of it, as NeMo requires; with right = -1 NeMo keeps only the left
        limit, counted from the query.
        """
        left, right = att_context_size
        left_context = None if left < 0 else left
        if style == "regular" or (style == "chunked_limited" and right < 0):
            return cls(1, left_context, None if right < 0 else right)
        if style != "chunked_limited":
            raise ValueError(f"style must be 'regular' or 'chunked_limited', got {style!r}")
        if left > 0 and left % (right + 1):
            raise ValueError(f"chunked_limited: left context {left} must be a multiple of right + 1 = {right + 1}")
        return cls(right + 1, left_context)

    @classmethod
    def from_icefall(cls, chunk_size: int, left_context_frames: int = -1, downsampling: int = 1) -> "ChunkLayout":
        """icefall's Zipformer: both sizes at the input rate of the stacks, at least one left chunk, -1 is unlimited.

        ``downsampling`` is the stack's own factor and must divide ``chunk_size``. ``chunk_size=-1`` is full context.
        """
        if chunk_size < 0:
            return cls()
        if chunk_size % downsampling:
            raise ValueError(f"chunk_size {chunk_size} is not a multiple of the stack's downsampling {downsampling}")
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
        query = torch.arange(query_length, device=device)[:, None] + query_offset
        key = torch.arange(query_length if key_length is None else key_length, device=device)
        visible = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool, device=device)
        if self.chunk_size is not None:
            chunk_start = query // self.chunk_size * self.chunk_size
            if self.left_context is not None:
                visible &= key >= chunk_start - self.left_context
            if self.right_context is not None:
                visible &= key < chunk_start + self.chunk_size + self.right_context
        return visible

    def offsets(self, query_length: int, key_length: int, *, query_offset: int = 0) -> tuple[int, int]:
        """Bounds (lowest, highest) on query position minus key position over all visible pairs.

        A position table for the layout needs the rows of these offsets: ``highest - lowest + 1`` of them, with
        ``position_zero = -lowest``.
        """
        lowest, highest = query_offset - key_length + 1, query_offset + query_length - 1
        if self.chunk_size is not None and self.right_context is not None:
            lowest = max(lowest, 1 - self.chunk_size - self.right_context)
        if self.chunk_size is not None and self.left_context is not None:
            highest = min(highest, self.chunk_size - 1 + self.left_context)
        return lowest, highest
