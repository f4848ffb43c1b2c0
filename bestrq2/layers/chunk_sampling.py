"""Dynamic chunk training: a window per training step, so that one model serves several latencies and full context."""

from dataclasses import dataclass
from typing import Protocol

from bestrq2.hashing import mix, uniform
from bestrq2.ops import ChunkLayout


def _integer(low: int, high: int, *counters: int) -> int:
    """Uniform in low..high, both included."""
    return low + int(uniform(*counters) * (high - low + 1))


class ChunkSampler(Protocol):
    """Draws the attention window of a step: a pure function of (seed, step, frames), so ranks and resumes agree."""

    def layout(self, step: int, num_frames: int) -> ChunkLayout:
        """The window of training step ``step`` for a batch of ``num_frames`` frames."""

    def covers(self, layout: ChunkLayout) -> bool:
        """Return True if training can draw a window like ``layout``."""


@dataclass(frozen=True)
class SpeechBrainChunks:
    """SpeechBrain's sampler with the constants of its recipes.

    With ``probability`` a step is chunked: a chunk size uniform in ``chunk_size``; of the chunked steps a share
    ``limited_probability`` sees only a number of left chunks uniform in ``left_chunks``, the others all of the past.

    Raises:
        ValueError: for a probability outside [0, 1] or an empty range.
    """

    probability: float = 0.6
    chunk_size: tuple[int, int] = (8, 32)
    limited_probability: float = 0.75
    left_chunks: tuple[int, int] = (2, 32)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in (("probability", self.probability), ("limited_probability", self.limited_probability)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        if not 1 <= self.chunk_size[0] <= self.chunk_size[1]:
            raise ValueError(f"chunk_size must be a range low..high with low >= 1, got {self.chunk_size}")
        if not 0 <= self.left_chunks[0] <= self.left_chunks[1]:
            raise ValueError(f"left_chunks must be a range low..high with low >= 0, got {self.left_chunks}")

    def layout(self, step: int, num_frames: int) -> ChunkLayout:
        key = mix(self.seed, step)
        if uniform(key, 0) >= self.probability:
            return ChunkLayout()
        size = _integer(*self.chunk_size, key, 1)
        limited = uniform(key, 2) < self.limited_probability
        return ChunkLayout.from_speechbrain(size, _integer(*self.left_chunks, key, 3) if limited else None)

    def covers(self, layout: ChunkLayout) -> bool:
        size, left = layout.chunk_size, layout.left_context
        if layout.right_context != 0:
            return False
        if size is None:
            return left is None and self.probability < 1
        if self.probability == 0 or not self.chunk_size[0] <= size <= self.chunk_size[1]:
            return False
        if left is None:
            return self.limited_probability < 1
        low, high = self.left_chunks
        return self.limited_probability > 0 and low * size <= left <= high * size


@dataclass(frozen=True)
class WeNetChunks:
    """WeNet's sampler: one draw r in 1..T-1 gives full context if r > T / 2, else chunks of r mod ``longest`` + 1.

    ``dynamic_left`` draws the number of left chunks too, uniform in 0..(T - 1) // chunk; otherwise all of the past is
    seen. (At T < 3, where WeNet's own code fails, the context is full.)
    """

    longest: int = 25
    dynamic_left: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest chunk must be at least 1, got {self.longest}")

    def layout(self, step: int, num_frames: int) -> ChunkLayout:
        if num_frames < 3:
            return ChunkLayout()
        key = mix(self.seed, step)
        draw = _integer(1, num_frames - 1, key, 0)
        if draw > num_frames // 2:
            return ChunkLayout()
        size = draw % self.longest + 1
        left = _integer(0, (num_frames - 1) // size, key, 1) if self.dynamic_left else -1
        return ChunkLayout.from_wenet(size, left)

    def covers(self, layout: ChunkLayout) -> bool:
        if layout.right_context != 0:
            return False
        if layout.chunk_size is None:
            return layout.left_context is None
        return layout.chunk_size <= self.longest and (self.dynamic_left or layout.left_context is None)
