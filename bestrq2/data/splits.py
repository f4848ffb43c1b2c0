"""Split of a data set that a file belongs to, by the names of Hugging Face's hub and most corpora."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any, TypeVar

from bestrq2.data.files import AudioFile
from bestrq2.errors import printable

__all__ = [
    "SPLIT_COLUMNS",
    "choose_split",
    "deeper_splits",
    "shared_clips",
    "split_inside",
    "split_of",
    "split_of_row",
    "unknown_splits",
]

T = TypeVar("T")

_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
_MOST_SPLITS = 10  # with more values, a column says something else
SPLIT_COLUMNS = ("split", "subset", "partition", "set")
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_WORD = re.compile(rf"(?:^|[-._ \d])({'|'.join(_SPLITS)})(?=$|[-._ \d])", re.I)


def split_of(path: str, folder: str, names_too: bool) -> str | None:
    """ "train", "validation", "test", or None.

    The first two folders below ``folder`` decide; with ``names_too`` also the name of the file, for files that hold
    many clips. The name of a single clip says nothing of it.
    """
    parts = os.path.relpath(path, folder).split(os.sep)
    return _of_names([*parts[:-1][:2], *(parts[-1:] if names_too else [])])


def split_inside(member: str) -> str | None:
    """The same of a clip in an archive, by the first two folders in its name there."""
    return _of_names(member.split("/")[:-1][:2])


def _of_names(names: Iterable[str]) -> str | None:
    found = next(filter(None, map(_WORD.search, names)), None)
    return None if found is None else _SPLITS[found[1].lower()]


def deeper_splits(
    paths: Iterable[str], folder: str, called: str | None = None, cure: str = "name its folders"
) -> str | None:
    """A note on folders that name several splits below the two levels that decide: all of them are used.

    Without ``folder``, ``paths`` are names in the archive that is ``called`` so.
    """
    found: dict[str, str] = {}
    for where in sorted({os.path.dirname(path) for path in paths}):
        parts = (os.path.relpath(where, folder) if folder else where).split(os.sep)
        for level in range(2, len(parts)):
            if word := _WORD.search(parts[level]):
                found.setdefault(_SPLITS[word[1].lower()], os.path.join(*parts[: level + 1]))
                break
    if len(found) < 2:
        return None
    return (
        f"{called or folder}: {', '.join(map(printable, found.values()))} are all used, though they name splits: only "
        f"the first two levels of folders decide. To use one split, {cure}."
    )


def split_of_row(row: Mapping[str, Any]) -> str | None:
    """The split that a column of a manifest says, if one does: by a word of it, as in ``train-clean-100``."""
    for column in SPLIT_COLUMNS:
        if isinstance(value := row.get(column), str) and (found := _WORD.search(value.strip())):
            return _SPLITS[found[1].lower()]
    return None


def unknown_splits(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Values of a column with splits that are no split by their words, as a clause: such rows are used for training."""
    for column in SPLIT_COLUMNS:
        values = {value.strip() for row in rows if isinstance(value := row.get(column), str) and value.strip()}
        unknown = sorted(value for value in values if not _WORD.search(value))
        if unknown and 1 < len(values) <= _MOST_SPLITS and (column == "split" or len(unknown) < len(values)):
            return f"rows with {column} {', '.join(map(repr, unknown))} are used, as such values name no split"
    return None


def choose_split(
    items: Sequence[T], splits: Sequence[str | None], wanted: str | None, folder: str
) -> tuple[list[T], str | None]:
    """Those of the wanted split, where there are several; and what to say about it.

    Items of no split stay. Without the wanted split, all stay; but for a validation, clips of the test and never those
    of the training.
    """
    counts = Counter(split for split in splits if split is not None)
    if len(counts) < 2:
        return list(items), None
    if wanted == "validation" and wanted not in counts:
        wanted = "test"
    listed = ", ".join(f"{count} {split}" for split, count in counts.items())
    if wanted is None or wanted not in counts:
        return list(items), f"{folder}: files of several splits are used: {listed}"
    kept = [item for item, split in zip(items, splits) if split in (None, wanted)]
    return kept, f"{folder}: of files of several splits ({listed}) only {wanted} is used"


def shared_clips(
    held_out: Sequence[AudioFile], trained_on: Sequence[AudioFile], copies: Mapping[str, str] | None = None
) -> list[AudioFile]:
    """Clips held out that overlap with one that is trained on: the same file, or parts that meet in it.

    ``copies`` are paths of files with the same content, and one path for all of them
    (:func:`bestrq2.data.copies.copied_files`).
    """

    def place(item: AudioFile) -> str:
        path = os.path.abspath(item.path)
        return (copies or {}).get(path, path)

    places: dict[str, list[tuple[float, float]]] = {place(item): [] for item in held_out}
    for item in trained_on:
        if (parts := places.get(place(item))) is not None:
            parts.append((item.start, inf if item.end is None else item.end))
    return [
        item
        for item in held_out
        if any(
            begin < (inf if item.end is None else item.end) and item.start < end for begin, end in places[place(item)]
        )
    ]
