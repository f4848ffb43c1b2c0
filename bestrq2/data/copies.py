"""Copies of files under other names: audio that is held out, and trained on as another file."""

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from bestrq2.data.content import content_digest
from bestrq2.data.files import AudioFile, split_address

__all__ = ["copied_files"]

HELD_OUT, TRAINED_ON = 1_000, 20_000  # files that are looked at; of more, as many in even steps
_BEGINNING = 1 << 20  # bytes
_THREADS = 16  # on a network file system this is waiting


def copied_files(held_out: Sequence[AudioFile], trained_on: Sequence[AudioFile]) -> dict[str, str]:
    """Absolute paths of files held out that have a copy among those trained on, and of these: with one path for all of
    the same content.

    Clips in archives are not looked at, nor files whose listed length is another by a tenth of a second. Of the others
    the sizes are read; of those of one size three pieces; of those with the same pieces the first megabyte; and
    where this is the same, too, the whole files.
    """
    tenths: set[int] | None = set()
    held: dict[str, None] = {}
    for item in filter(_is_plain, held_out):
        held[os.path.abspath(item.path)] = None
        tenths = None if tenths is None or _tenths(item) is None else tenths | {_tenths(item) or 0}
    near: dict[str, None] = {}
    for item in filter(_is_plain, trained_on):
        found = _tenths(item)
        if found is None or tenths is None or not tenths.isdisjoint((found - 1, found, found + 1)):
            near[os.path.abspath(item.path)] = None
    ours = _some(list(held), HELD_OUT)
    theirs = _some([path for path in near if path not in held], TRAINED_ON)
    keys: dict[str, str | None] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        steps: tuple[Callable[[str], str | None], ...] = (_size, _pieces, _beginning, _whole)
        for look in steps:
            keys = dict(zip((*ours, *theirs), pool.map(look, (*ours, *theirs))))
            alike = {keys[path] for path in ours} & {keys[path] for path in theirs} - {None}
            ours, theirs = ([path for path in paths if keys[path] in alike] for paths in (ours, theirs))
    first: dict[str | None, str] = {}
    return {path: first.setdefault(keys[path], path) for path in (*ours, *theirs)}


def _is_plain(item: AudioFile) -> bool:
    return split_address(item.path) is None


def _tenths(item: AudioFile) -> int | None:
    """Length of the file in tenths of a second, None if it is not known."""
    return None if item.is_part or item.duration is None else int(10 * item.duration)


def _some(paths: list[str], count: int) -> list[str]:
    return paths[:: -(-len(paths) // count)] if len(paths) > count else paths


def _size(path: str) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return str(status.st_size) if stat.S_ISREG(status.st_mode) else None


def _pieces(path: str) -> str | None:
    found = content_digest(AudioFile(path))
    return None if found == "-" else found


def _beginning(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return f"{_pieces(path)} {hashlib.sha256(file.read(_BEGINNING)).hexdigest()}"
    except OSError:
        return None


def _whole(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(_BEGINNING):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return None
