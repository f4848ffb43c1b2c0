"""What a user names as data: folders, manifests, single files, and archives by name or pattern."""

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bestrq2.data.archives.opening import list_archives as read_archives
from bestrq2.data.files import AudioFile, Listing, is_archive, is_audio, split_address
from bestrq2.data.manifest import discover_folder, is_manifest, read_manifest
from bestrq2.errors import DataError, Skip

__all__ = ["Found", "Source", "expand_pattern", "find_audio"]

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_BRACES = re.compile(r"\{([^{}]*)\}")
_LARGEST_PATTERN = 1_000_000
_COMPRESSED = {".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst"}
_EXPECTED = (
    "a folder, a .csv or .jsonl manifest, .tar shards (also as a pattern such as shards-{000000..000009}.tar), an .h5 "
    "file, a saved dataset, a .parquet file, or an audio file"
)


@dataclass
class Found:
    """All ``files`` of a source that was called ``name``, what was damaged, and other files by extension."""

    name: str
    files: list[AudioFile] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, listing: Listing) -> None:
        self.files += listing.files
        self.skips += listing.skips
        self.ignored += listing.ignored


def find_audio(source: Source, *, progress: bool = False) -> Found:
    """List the clips of a source in a stated order, without opening audio.

    A source is a folder, a manifest, an archive (a ``.tar`` shard in webdataset's naming, ``.h5`` in the published
    layout, ``.arrow`` or ``.parquet`` with an audio column), a dataset folder of Hugging Face's ``save_to_disk``, an
    audio file, or several of these. Names may be patterns: ``{000000..000009}`` and ``{a,b}`` in the order written,
    ``*`` and ``?`` sorted. A folder with audio files stands for these; one without, for the archives in it, sorted.

    Args:
        source: one name or several.
        progress: show a progress bar while archives are listed.

    Raises:
        DataError: a name that does not exist or cannot be listed, or a package that is needed and not installed.
        ManifestError: a manifest that cannot be understood.
    """
    sources = [os.fspath(part) for part in ([source] if isinstance(source, str | os.PathLike) else source)]
    found = Found(", ".join(sources) or "an empty list of sources")
    archives: list[tuple[str, str]] = []

    def list_archives() -> None:
        for listing in read_archives(archives, progress):
            found.add(listing)
        archives.clear()

    for part in (name for pattern in sources for name in expand_pattern(pattern)):
        if os.path.isfile(part) and is_archive(part):
            archives.append((part, ""))  # together, so that many shards are listed at once
            continue
        list_archives()
        if os.path.isdir(part):
            archives += _add_folder(part, found)
        elif not os.path.exists(part):
            inside = split_address(part)
            if inside is None or not os.path.isfile(inside[0]):
                raise DataError(f"{part} does not exist; expected {_EXPECTED}")
            found.files.append(AudioFile(part))
        elif is_manifest(part):
            try:
                found.files += read_manifest(part)
            except OSError as error:
                raise DataError(f"manifest {part} cannot be read: {error.strerror or error}") from error
        elif is_audio(part):
            found.files.append(AudioFile(part))
        elif Path(part).suffix.lower() in _COMPRESSED:
            raise DataError(f"{part} is compressed, so its members cannot be read at random: unpack it to a .tar first")
        else:
            raise DataError(f"{part} is of no kind that is known; expected {_EXPECTED}")
    list_archives()
    return found


def _add_folder(folder: str, found: Found) -> list[tuple[str, str]]:
    """Add the audio of a folder; returns its archives, if these are to be listed instead."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")):
        from bestrq2.data.archives.arrow import saved_dataset_files

        return [(path, "") for path in saved_dataset_files(folder)]
    try:
        listing = discover_folder(folder)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be listed: {error.strerror or error}") from error
    if listing.files:  # archives beside them are most often the same audio, packed: they are reported as ignored
        found.add(listing)
        return []
    used = Counter(Path(path).suffix.lower() for path, _ in listing.archives)
    found.ignored += listing.ignored - used
    return listing.archives


def expand_pattern(pattern: str) -> list[str]:
    """The names that a pattern stands for; a name that exists stands for itself.

    >>> expand_pattern("shards-{008..010}.tar")
    ['shards-008.tar', 'shards-009.tar', 'shards-010.tar']

    Raises:
        DataError: nothing fits a pattern with ``*``, ``?`` or ``[``, or it stands for over a million names.
    """
    if os.path.lexists(pattern) or split_address(pattern):
        return [pattern]
    names = _expand_braces(pattern)
    result: list[str] = []
    for name in names:
        if not os.path.lexists(name) and glob.has_magic(name):
            fitting = sorted(path for path in glob.glob(name, recursive=True) if not path.endswith(".index.json"))
            if not fitting:
                raise DataError(f"no file fits {name}")
            result += fitting
        else:
            result.append(name)
    return result


def _expand_braces(pattern: str) -> list[str]:
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices: list[list[str]] = []
    total = 1
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            choices.append([piece])
            continue
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            total *= max(1, abs(last - first) + 1)
        elif "," in piece:
            total *= piece.count(",") + 1
        if total > _LARGEST_PATTERN:
            raise DataError(f"{pattern} stands for over {_LARGEST_PATTERN:,} names")
        if numbers:
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
            step = 1 if last >= first else -1
            choices.append([f"{value:0{width}d}" for value in range(first, last + step, step)])
        else:
            choices.append(piece.split(",") if "," in piece else ["{" + piece + "}"])
    return ["".join(parts) for parts in itertools.product(*choices)]
