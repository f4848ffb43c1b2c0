"""Decoded audio as memory-mapped int16: what a GPU waits for otherwise is the decoding of Ogg and FLAC.

    cache/16000/samples-00000.i16   mono samples at 16 kHz, one file after the other, at most about 1 GiB
    cache/16000/index.jsonl         one line for each file: where its samples are, and their checksums

A sample is ``x * 32768`` of :func:`load_audio`, rounded to the nearest integer and clipped to 16 bits. For mono files
of at most 16 bits at the sampling rate asked for, that is exact, and training from the cache is bit for bit training
from the files. Lossy and resampled audio and sums of channels have more than 16 bits; ``SampleCache.exact`` is then
False, and the dataset has another fingerprint.
"""

import hashlib
import logging
import os
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data.audio import load_audio
from bestrq2.data.files import AudioFile, split_address
from bestrq2.data.parts import load_clip
from bestrq2.errors import AudioError, printable

__all__ = ["BLOCK", "SampleCache", "cache_key", "checksums", "cut_share", "decode_clip", "to_int16"]

logger = logging.getLogger(__name__)

BLOCK = 1 << 16  # samples with a checksum of their own
_FULL_SCALE = np.float32(32768)


def to_int16(waveform: np.ndarray) -> tuple[np.ndarray, bool]:
    """Samples ``(S,)`` of :func:`load_audio` as int16, and whether nothing was rounded or clipped."""
    scaled = waveform * _FULL_SCALE
    rounded = np.clip(np.rint(scaled), -32768, 32767)
    return rounded.astype("<i2"), bool(np.array_equal(rounded, scaled))


def cut_share(waveform: np.ndarray) -> float:
    """Share of the samples that 16 bits cannot hold: louder than full scale, by more than rounding."""
    return float(np.mean((waveform > 1) | (waveform < -32768.5 / 32768)))


def decode_clip(item: AudioFile, sampling_rate: int) -> np.ndarray:
    """Samples of a clip to cache: all of it, and two samples behind the end of a part.

    Where a part does not begin at a sample, crops of it may reach one sample beyond its rounded end.
    """
    if item.is_part:
        load_clip(item, sampling_rate)  # raises where the file ends before the part does
    duration = None if item.end is None else item.end - item.start + 2 / sampling_rate
    return load_audio(item.path, sampling_rate, start=item.start, duration=duration)


def checksums(samples: np.ndarray) -> list[int]:
    """CRC-32 of every block of :data:`BLOCK` samples."""
    return [zlib.crc32(samples[start : start + BLOCK].tobytes()) for start in range(0, len(samples), BLOCK)]


def cache_key(item: AudioFile) -> str:
    """Name of a clip in the index: its absolute path, or address in an archive, and which part of the file it is."""
    inside = split_address(item.path)
    path = os.path.abspath(item.path) if inside is None else f"{os.path.abspath(inside[0])}::{inside[1]}"
    return f"{path}\0{item.start!r}\0{item.end!r}" if item.is_part else path


def _number(key: str) -> int:
    """64 bits of a hash: of 10 million clips two are alike with a probability of 3e-6."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class SampleCache:
    """Reads clips from a cache; made by :func:`bestrq2.data.cache_build.open_cache`. Picklable.

    Args:
        folder: with the shards.
        sampling_rate: of the samples, in Hz.
        rows: of the index: ``(path, shard, at, count, exact, checksums)``.
        failed: number of files that could not be decoded completely; they are read as if there were no cache.

    Attributes:
        exact: every sample is that of the files.
    """

    def __init__(self, folder: Path, sampling_rate: int, rows: Sequence[dict[str, Any]], failed: int = 0) -> None:
        self.folder, self.sampling_rate = folder, sampling_rate
        self.exact = failed == 0 and all(row["exact"] for row in rows)
        keys = np.array([_number(row["path"]) for row in rows], np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._shards = np.array([row["shard"] for row in rows], np.int64)[order]
        self._starts = np.array([row["at"] for row in rows], np.int64)[order]
        self._counts = np.array([row["count"] for row in rows], np.int64)[order]
        sums = [rows[place]["checksums"] for place in order]
        self._sums = np.array([number for one in sums for number in one], np.uint32)
        self._first_sums = np.cumsum([0, *(len(one) for one in sums)])
        self._begin()

    def _begin(self) -> None:
        self._maps: dict[int, np.ndarray] = {}
        self._checked = np.zeros(len(self._sums), bool)  # blocks whose checksum this process has compared
        self._warned: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_maps", "_checked", "_warned")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def load(
        self, item: AudioFile, sampling_rate: int, *, start: float = 0.0, duration: float | None = None
    ) -> np.ndarray:
        """Result of :func:`load_clip` as int16 ``(S,)``; do not write into it.

        A clip that is not in the cache, or whose samples there are damaged, is decoded; damage is logged as a warning,
        once for each clip and process.

        Raises:
            AudioError: as :func:`load_clip`.
            ValueError: another sampling rate.
        """
        if sampling_rate != self.sampling_rate:
            raise ValueError(f"the cache in {self.folder} has {self.sampling_rate} Hz, asked for {sampling_rate}")
        row = self._row(item)
        if row is None:
            return to_int16(load_clip(item, sampling_rate, start=start, duration=duration))[0]
        return load_clip(item, sampling_rate, start=start, duration=duration, load=partial(self._part, item, row))

    def _part(
        self, item: AudioFile, row: int, path: str, sampling_rate: int, *, start: float, duration: float | None
    ) -> np.ndarray:
        """As :func:`load_audio`: ``start`` counts from the beginning of the file, cached samples from the part's."""
        count, before = int(self._counts[row]), round(item.start * sampling_rate)
        first = round(start * sampling_rate) - before
        last = count if duration is None else min(count, first + max(1, round(duration * sampling_rate)))
        if first >= last:
            raise AudioError(path, "no samples", f"nothing from {start:.3f} s on" if start else "")
        samples = self._samples(row)
        if samples is None or not self._intact(row, samples, first, last):
            if row not in self._warned:
                self._warned.add(row)
                logger.warning(f"{self.folder}: damaged samples of {printable(path)}; decoding it")
            samples = to_int16(decode_clip(item, sampling_rate))[0]
        return samples[first:last]

    def damaged(self, item: AudioFile) -> bool:
        """Return True if the cached samples of a clip differ from those written."""
        row = self._row(item)
        if row is None:
            return False
        samples = self._samples(row)
        return samples is None or not self._intact(row, samples, 0, int(self._counts[row]))

    def _row(self, item: AudioFile) -> int | None:
        key = np.uint64(_number(cache_key(item)))
        row = int(np.searchsorted(self._keys, key))
        return row if row < len(self._keys) and self._keys[row] == key else None

    def _samples(self, row: int) -> np.ndarray | None:
        """All samples of a clip, mapped; None where the shard is missing or too short."""
        shard, start, count = int(self._shards[row]), int(self._starts[row]), int(self._counts[row])
        if shard not in self._maps:
            try:
                self._maps[shard] = np.asarray(np.memmap(shard_path(self.folder, shard), "<i2", "r"))
            except (OSError, ValueError):
                return None
        samples = self._maps[shard][start : start + count]
        return samples if len(samples) == count else None

    def _intact(self, row: int, samples: np.ndarray, first: int, last: int) -> bool:
        offset = int(self._first_sums[row])
        for block in range(first // BLOCK, -(-last // BLOCK)):
            if not self._checked[offset + block]:
                found = zlib.crc32(samples[block * BLOCK : (block + 1) * BLOCK].tobytes())
                if found != self._sums[offset + block]:
                    return False
                self._checked[offset + block] = True
        return True


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard."""
    return folder / f"samples-{shard:05d}.i16"
