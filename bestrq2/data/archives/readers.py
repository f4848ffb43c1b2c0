"""A clip in an archive as a file of its own: stored samples, or a range of bytes."""

import io
import os
from typing import Any, BinaryIO

import numpy as np

__all__ = ["SAMPLING_RATES", "SampleReader", "Section"]

SAMPLING_RATES = (1000, 1_000_000)  # Hz; outside, a header is damaged and resampling could ask for terabytes


class SampleReader:
    """Stored samples (N,) of one channel, read as ``soundfile.SoundFile`` is read: int16 is divided by 32768."""

    channels = 1

    def __init__(self, samples: Any, samplerate: int) -> None:
        # An array, or what gives one for a slice.
        self._samples, self.samplerate, self.frames, self._position = samples, samplerate, len(samples), 0
        self.subtype = "PCM_32" if samples.dtype == np.int32 else "PCM"  # soundfile's name for it

    @property
    def stored(self) -> np.ndarray:
        """(N,) as stored."""
        return self._samples[:]

    def seekable(self) -> bool:
        return True

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, frames: int = -1, dtype: str = "float32", *, out: np.ndarray | None = None) -> np.ndarray:
        """Up to ``frames`` samples (all for -1), or as many as ``out`` (n, 1) has room for: (n, 1) float32."""
        count = self.frames if frames < 0 else frames
        part = self._samples[self._position : self._position + (count if out is None else len(out))]
        self._position += len(part)
        values = part.astype(np.float32)[:, None]
        if np.issubdtype(part.dtype, np.integer):
            values /= np.float32(-float(np.iinfo(part.dtype).min))
        if out is None:
            return values
        out[: len(values)] = values
        return out[: len(values)]


class Section(io.RawIOBase):
    """Bytes ``offset`` ... ``offset + size - 1`` of a file, as a file of its own.

    Libraries that call back into Python must not meet an exception there: an I/O error ends the section early and is
    kept in ``failure``.
    """

    def __init__(self, file: io.RawIOBase | BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._position))
        try:
            self._file.seek(self._offset + self._position)
            data = self._file.read(count) or b""
        except OSError as error:
            self.failure = error
            return 0
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
