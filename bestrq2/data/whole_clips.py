"""Whole clips in order, for embedding: decoded a few ahead in threads, faults as values."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from bestrq2.data.audio import load_clip
from bestrq2.data.files import AudioFile
from bestrq2.errors import AudioError, Skip

__all__ = ["iterate_clips"]

Clip = tuple[AudioFile, np.ndarray]


def iterate_clips(
    files: Iterable[AudioFile], sampling_rate: int = 16000, *, min_seconds: float = 0.0, threads: int = 2
) -> Iterator[Clip | Skip]:
    """Decode every file completely, in order: (file, waveform (S,) float32), or a :class:`Skip` for one that fails.

    At most ``2 * threads`` clips are held at once.
    """

    def decode(item: AudioFile) -> Clip | Skip:
        try:
            waveform = load_clip(item, sampling_rate)
            if len(waveform) < min_seconds * sampling_rate:
                seconds = f"{len(waveform) / sampling_rate:.3f} s, at least {min_seconds:g} s are needed"
                raise AudioError(item.path, "too short", seconds)
            return item, waveform
        except AudioError as error:
            return error.skip

    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[Future[Clip | Skip]] = deque()
        for item in files:
            waiting.append(pool.submit(decode, item))
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
