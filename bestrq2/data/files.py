"""Names of audio: an :class:`AudioFile`, the extensions that are audio, and addresses of clips in archives.

A clip inside of a larger file is named ``shard.tar::speech/a.flac``, ``clips.h5::12`` or ``data.parquet::12``. Such an
address is accepted wherever the path of an audio file is: in :class:`AudioFile`, manifests, reports and ``load_audio``.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bestrq2.errors import Skip

__all__ = [
    "ARCHIVES",
    "EXTENSIONS",
    "AudioFile",
    "Listing",
    "address",
    "from_text",
    "group_of",
    "is_archive",
    "is_audio",
    "split_address",
    "to_text",
]

_TAR, _HDF5, _ARROW = {".tar"}, {".h5", ".hdf5"}, {".arrow", ".parquet"}
ARCHIVES = frozenset(_TAR | _HDF5 | _ARROW)


_ADDRESS = re.compile(rf"(.+?(?:{'|'.join(re.escape(suffix) for suffix in sorted(ARCHIVES))}))::(.+)", re.I | re.S)


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Return True for the extension of an archive of clips: tar, HDF5, Arrow or Parquet."""
    return Path(path).suffix.lower() in ARCHIVES


def from_text(name: str) -> str:
    """The name of a file as this process sees it, of a name in a text in UTF-8: the same but for other locales."""
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeError:  # half of a surrogate pair, out of JSON: the name of no file
        return name


def to_text(name: str) -> str:
    """The inverse of :func:`from_text`."""
    try:
        return os.fsencode(name).decode("utf-8", "surrogateescape")
    except UnicodeError:
        return name


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


@dataclass(frozen=True)
class AudioFile:
    """One audio file, a clip in an archive by its address, or a part of either.

    ``duration`` in seconds and ``sampling_rate`` in Hz are None until a header was read. A part begins ``start``
    seconds after the beginning of the file and ends at ``end`` (None: where the file ends); ``duration`` is its own.
    ``columns`` are further ones of the source, where they were asked for; they do not make two files different.
    """

    path: str
    duration: float | None = None
    sampling_rate: int | None = None
    domain: str = ""
    label: str = ""
    start: float = 0.0
    end: float | None = None
    columns: dict[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def is_part(self) -> bool:
        return self.start > 0 or self.end is not None

    @property
    def place(self) -> str:
        """The path and, of a part, the seconds, to thousandths. See :func:`bestrq2.data.parts.shown_places`."""
        if not self.is_part:
            return self.path
        return f"{self.path}@{self.start:.3f}-" + ("" if self.end is None else f"{self.end:.3f}")

    @property
    def group(self) -> str:
        """Files of one group may follow each other in one training sample: same domain, else same folder."""
        return self.domain or group_of(self.path)


@dataclass(frozen=True)
class Listing:
    """Contents of a folder or an archive: audio ``files``, counts of other extensions, and unreadable entries.

    ``archives`` are tar, HDF5, Arrow and Parquet files of a folder, with their domains; ``ignored`` counts them too.
    ``notes`` are sentences about what was found. ``repeated`` are archives in which clips have the name of an earlier
    one: the address of the first, and their number; ``shared`` those in which clips share several labels. ``splits``
    are those of the files by a column, or empty. ``lost`` are names of columns that were asked for and cannot be kept,
    ``unrated`` HDF5 files without a sampling rate. ``asking`` is the first row that asks for channel 0, for messages.
    """

    files: list[AudioFile]
    ignored: Counter[str] = field(default_factory=Counter)
    skips: list[Skip] = field(default_factory=list)
    archives: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unrated: list[str] = field(default_factory=list)
    shared: list[tuple[str, int]] = field(default_factory=list)
    asking: tuple[str, AudioFile] | None = None


EXTENSIONS = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif"})


def is_audio(path: str | os.PathLike[str]) -> bool:
    """Return True for an extension that :func:`load_audio` reads."""
    return Path(path).suffix.lower() in EXTENSIONS
