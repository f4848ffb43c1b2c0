"""Whole clips in order, for embedding: decoded a few ahead in threads, faults as values."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from bestrq2.data.files import AudioFile
from bestrq2.data.parts import load_clip
from bestrq2.errors import AudioError, Skip

__all__ = ["iterate_clips"]

_SECONDS_AHEAD = 600.0
_UNKNOWN_SECONDS = 30.0
Clip = tuple[AudioFile, np.ndarray]


def iterate_clips(
    files: Iterable[AudioFile], sampling_rate: int = 16000, *, min_seconds: float = 0.0, threads: int = 2
) -> Iterator[Clip | Skip]:
    """Decode every file completely, in order: (file, waveform (S,) float32), or a :class:`Skip` for one that fails.

    At most ``2 * threads`` clips are decoded ahead, and of long ones no more than ten minutes together.
    """

    def decode(item: AudioFile) -> Clip | Skip:
        try:
            waveform = load_clip(item, sampling_rate)
            if len(waveform) / sampling_rate < min_seconds:  # 0.07 * 44100 is more than 3087
                seconds = f"{len(waveform) / sampling_rate:.3f} s, at least {min_seconds:g} s are needed"
                raise AudioError(item.path, "too short", seconds)
            return item, waveform
        except AudioError as error:
            return error.skip

    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[tuple[Future[Clip | Skip], float]] = deque()
        for item in files:
            seconds = _UNKNOWN_SECONDS if item.duration is None else item.duration
            while waiting and (
                len(waiting) == 2 * threads or seconds + sum(ahead for _, ahead in waiting) > _SECONDS_AHEAD
            ):
                yield waiting.popleft()[0].result()
            waiting.append((pool.submit(decode, item), seconds))
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
