"""Listed files and parts of files: their samples, their length, their hash."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from bestrq2.data.audio import TRUNCATED_ABOVE, AudioDigest, AudioInfo, audio_digest, audio_info, load_audio
from bestrq2.data.files import AudioFile
from bestrq2.errors import AudioError

__all__ = ["clip_duration", "is_whole", "load_clip", "part_digest", "shown_places"]

_TOLERANCE_SECONDS = 0.05  # lists round their times


def load_clip(
    item: AudioFile,
    sampling_rate: int = 16000,
    *,
    start: float = 0.0,
    duration: float | None = None,
    load: Callable[..., np.ndarray] = load_audio,
) -> np.ndarray:
    """As :func:`load_audio`, of a listed file or part of a file; ``start`` counts from the beginning of the part.

    ``load`` gives the samples of a file, with the arguments of :func:`load_audio`.

    Raises:
        AudioError: as :func:`load_audio`; "truncated" also if the file ends over 1 % before the part does.
    """
    if not item.is_part:
        return load(item.path, sampling_rate, start=start, duration=duration)
    if item.end is not None:
        left = item.end - item.start - start
        if left <= 0:
            raise AudioError(item.path, "no samples", f"nothing from {start:.3f} s of the part on")
        duration = left if duration is None else min(left, duration)
    waveform = load(item.path, sampling_rate, start=item.start + start, duration=duration)
    if duration is not None:
        missing = duration - len(waveform) / sampling_rate
        if missing > max(_TOLERANCE_SECONDS, TRUNCATED_ABOVE * duration):
            raise AudioError(item.path, "truncated", f"the file ends {missing:.3f} s before {item.place} does")
    return waveform


def clip_duration(item: AudioFile, info: AudioInfo) -> float:
    """Seconds of a listed file or part, from the header of the file.

    Raises:
        AudioError: the part begins after the end of the file, or ends over 1 % after it.
    """
    if not item.is_part:
        return info.duration
    end = info.duration if item.end is None else min(item.end, info.duration)
    if item.start >= info.duration:
        raise AudioError(item.path, "no samples", f"{item.place}: the file has {info.duration:.3f} s")
    missing = 0.0 if item.end is None else item.end - end
    if missing > max(_TOLERANCE_SECONDS, TRUNCATED_ABOVE * (end - item.start)):
        raise AudioError(item.path, "truncated", f"{item.place}: the file has {info.duration:.3f} s")
    return end - item.start


def part_digest(item: AudioFile) -> AudioDigest:
    """As :func:`audio_digest`, of a listed file or part of a file (which is held in memory as a whole)."""
    if not item.is_part:
        return audio_digest(item.path)
    info = audio_info(item.path)
    clip_duration(item, info)
    samples = load_clip(item, info.sampling_rate)
    digest = hashlib.sha256(str(info.sampling_rate).encode())
    digest.update(samples.tobytes())
    found = AudioInfo(info.sampling_rate, len(samples), info.channels)
    return AudioDigest(found, float(np.abs(samples).max()), digest.hexdigest())


def is_whole(item: AudioFile) -> bool:
    """Return True if the clip is all of its file, by the header of the file or because that cannot be read."""
    if item.start > 0 or item.end is None:
        return item.start == 0
    try:
        return audio_info(item.path).duration - item.end <= _TOLERANCE_SECONDS
    except AudioError:
        return True


def shown_places(files: Sequence[AudioFile]) -> list[str]:
    """The place of each, or its path alone if the file is listed once, as a whole (some lists state 0 and the end)."""
    spans: defaultdict[str, set[tuple[float, float | None]]] = defaultdict(set)
    for item in files:
        spans[item.path].add((item.start, item.end))
    return [item.path if len(spans[item.path]) == 1 and _is_all(item) else item.place for item in files]


def _is_all(item: AudioFile) -> bool:
    """As :func:`is_whole`; a header is read only where the list leaves it open."""
    return item.start == 0 and item.end in (None, item.duration) and is_whole(item)
