"""Short hashes of what is inside audio files, to notice one that was replaced by another of the same name and length.

A copy of the data on another machine or disk has the same hashes: no times and no folders are in them.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bestrq2.data.archives.opening import open_member
from bestrq2.data.archives.readers import SampleReader
from bestrq2.data.files import AudioFile, split_address
from bestrq2.errors import BestRQError, counted, printable
from bestrq2.hashing import mix

__all__ = [
    "changed_files",
    "content_digest",
    "file_stamp",
    "replaced_files",
    "same_content",
    "sample_contents",
    "whole_digest",
]

SAMPLED_FILES = 256
_PIECE = 4096  # bytes, or samples, at the beginning, in the middle and at the end
_THREADS = 16  # on a network file system this is waiting
_UNKNOWN = "-"


def content_digest(item: AudioFile) -> str:
    """Eight hexadecimal digits of the size and three pieces of a file or clip; "-" if it cannot be read.

    Rows of Parquet are not looked at ("-"): one row costs the reading of its whole group.
    """
    return _digest_of(item, lambda size: sorted({0, max(0, size // 2 - _PIECE // 2), max(0, size - _PIECE)}))[:8]


def whole_digest(item: AudioFile) -> str:
    """SHA-256 of all of a file or clip; "-" as for :func:`content_digest`."""
    return _digest_of(item, lambda size: range(0, size, _PIECE))


def file_stamp(item: AudioFile) -> str:
    """Size and time of the last change of a file, or of the archive with a clip; "-" if it is not there."""
    parts = None if os.path.lexists(item.path) else split_address(item.path)
    try:
        status = os.stat(item.path if parts is None else parts[0])
        return f"{status.st_size} {status.st_mtime_ns}" if stat.S_ISREG(status.st_mode) else _UNKNOWN
    except (OSError, ValueError):
        return _UNKNOWN


def _digest_of(item: AudioFile, places: Callable[[int], Iterable[int]]) -> str:
    """Of the size, and of the pieces that begin at ``places(size)``."""
    parts = split_address(item.path)
    if parts is not None and parts[0].lower().endswith(".parquet"):
        return _UNKNOWN
    try:
        if parts is None and not stat.S_ISREG(os.stat(item.path).st_mode):
            return _UNKNOWN
        file = open_member(item.path) or open(item.path, "rb")  # noqa: SIM115 (closed below)
        if isinstance(file, SampleReader):
            return _digest(file, file.frames, places)
        with file:
            return _digest(file, file.seek(0, os.SEEK_END), places)
    except (BestRQError, OSError, ValueError):
        return _UNKNOWN


def _digest(file: object, size: int, places: Callable[[int], Iterable[int]]) -> str:
    digest = hashlib.sha256(str(size).encode())
    for start in places(size):
        file.seek(start)  # type: ignore[attr-defined]
        piece = file.read(_PIECE)  # type: ignore[attr-defined]
        digest.update(piece if isinstance(piece, bytes) else piece.tobytes())
    return digest.hexdigest()


def same_content(before: str, after: str) -> bool:
    """Return False if a file that can be read now has another digest than before, or could not be read then."""
    return after in (before, _UNKNOWN)


def sample_contents(files: Sequence[AudioFile]) -> str:
    """Digests of up to 256 of the files, separated by spaces: of all of them if there are no more."""
    return " ".join(_digests(files, _sampled(len(files))))


def replaced_files(files: Sequence[AudioFile], before: str | None) -> tuple[list[AudioFile], int]:
    """Compare files with what :func:`sample_contents` gave for a list of the same names and lengths.

    Returns:
        the sampled files whose content is another, and how many files were compared.
    """
    places = _sampled(len(files))
    known = (before or "").split()
    if len(known) != len(places):
        return [], 0  # a checkpoint of an earlier version
    pairs = list(zip(places, known, _digests(files, places)))
    compared = [(place, old, new) for place, old, new in pairs if _UNKNOWN not in (old, new)]
    return [files[place] for place, old, new in compared if not same_content(old, new)], len(compared)


def changed_files(files: Sequence[AudioFile], before: str | None, count: int | None) -> str:
    """Differences between files and the ``count`` ones of which :func:`sample_contents` gave ``before``, in words.

    Only the numbers of files where there are over 256, or some whose content is not known. Empty if nothing can be
    told, as of a checkpoint of an earlier version, which has no ``count``.
    """
    if count is None:
        return ""
    parts = [f"{counted(len(files), 'file')} instead of {count}"] if len(files) != count else []
    if max(count, len(files)) > SAMPLED_FILES:
        return "".join(parts)
    known, found = (before or "").split(), _digests(files, range(len(files)))
    if len(known) != count or _UNKNOWN in (*known, *found):
        return "".join(parts)
    left = Counter(known)
    new = []
    for item, digest in zip(files, found):
        if left[digest]:
            left[digest] -= 1
        else:
            new.append(printable(item.path))
    if new:
        parts.append(f"new or changed: {', '.join(new[:3])}" + (f" and {len(new) - 3} more" if len(new) > 3 else ""))
    if gone := sum(left.values()):
        parts.append(f"the content of {gone} is gone")
    return "; ".join(parts or ["the same content under other names, durations or domains, or in another order"])


def _sampled(count: int) -> list[int]:
    if count <= SAMPLED_FILES:
        return list(range(count))
    return sorted({mix(count, number) % count for number in range(SAMPLED_FILES)})


def _digests(files: Sequence[AudioFile], places: Sequence[int]) -> list[str]:
    with ThreadPoolExecutor(min(_THREADS, max(1, len(places)))) as pool:
        return list(pool.map(lambda place: content_digest(files[place]), places))
