"""Clips inside of larger files: ``shard.tar::speech/a.flac``, ``clips.h5::12``, ``data.parquet::12``.

Such an address stands wherever the path of an audio file may: in :class:`AudioFile`, manifests, reports and
:func:`load_audio`.
"""

import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bestrq2.data.errors import AudioError

__all__ = ["ARCHIVES", "SampleReader", "address", "group_of", "is_archive", "open_member", "split_address"]

_TAR, _HDF5, _ARROW = {".tar"}, {".h5", ".hdf5"}, {".arrow", ".parquet"}
ARCHIVES = frozenset(_TAR | _HDF5 | _ARROW)
_ADDRESS = re.compile(rf"(.+?(?:{'|'.join(re.escape(suffix) for suffix in sorted(ARCHIVES))}))::(.+)", re.I | re.S)


class SampleReader:
    """Stored samples (N,) of one channel, read as ``soundfile.SoundFile`` is read: int16 is divided by 32768."""

    channels = 1
    subtype = "PCM"

    def __init__(self, samples: Any, samplerate: int) -> None:
        # An array, or what gives one for a slice.
        self._samples, self.samplerate, self.frames, self._position = samples, samplerate, len(samples), 0

    @property
    def stored(self) -> np.ndarray:
        """(N,) as stored."""
        return self._samples[:]

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


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether the extension is one of a file that holds clips: tar, HDF5, Arrow or Parquet."""
    return Path(path).suffix.lower() in ARCHIVES


def address(archive: str, member: str | int) -> str:
    """The path of a clip in an archive."""
    return f"{archive}::{member}"


def split_address(path: str) -> tuple[str, str] | None:
    """(archive, member) of the address of a clip in an archive, None for the path of a file."""
    found = _ADDRESS.fullmatch(path) if "::" in path else None
    return None if found is None else (found[1], found[2])


def group_of(path: str) -> str:
    """The folder of a file; of a clip in an archive, the archive's folder and the clip's folder in it.

    So clips of one folder stay together when they are packed into several shards.
    """
    parts = split_address(path)
    if parts is None:
        return os.path.dirname(path)
    return address(os.path.dirname(parts[0]), os.path.dirname(parts[1]))


def open_member(path: str) -> BinaryIO | SampleReader | None:
    """Open a clip in an archive: the bytes of an audio file, or decoded samples; None if ``path`` is a file itself.

    Raises:
        AudioError: no such archive or clip, or it is damaged.
        OSError: the archive cannot be read.
    """
    parts = split_address(path)
    if parts is None:
        return None
    archive, member = parts
    if not os.path.isfile(archive):
        if os.path.lexists(path):  # a file may have such a name
            return None
        there = os.path.lexists(archive)
        what = f"{archive} {'is not a regular file' if there else 'does not exist'}"
        raise AudioError(path, "not readable" if there else "missing", what)
    suffix = Path(archive).suffix.lower()
    # Imported where they are needed, for each may ask for a package that is not installed.
    if suffix in _TAR:
        from bestrq2.data.tar_index import open_tar_member

        return open_tar_member(archive, member)
    if suffix in _HDF5:
        from bestrq2.data.hdf5 import open_hdf5_clip

        return open_hdf5_clip(archive, member)
    from bestrq2.data.arrow import open_arrow_clip

    return open_arrow_clip(archive, member)


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
