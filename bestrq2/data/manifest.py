"""Lists of audio files: found in a folder, read from a CSV or JSONL manifest, written to one.

bestrq2 manifest recordings/ --out manifest.csv --check
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from bestrq2.data.audio import audio_info
from bestrq2.data.cells import as_cell
from bestrq2.data.channels import asks_for_first_channel
from bestrq2.data.columns import WRITTEN
from bestrq2.data.fields import audio_file, known_columns
from bestrq2.data.files import AudioFile, Listing, is_archive, is_audio, to_text
from bestrq2.data.kaldi import kaldi_rows
from bestrq2.data.tables import is_manifest, rows_of
from bestrq2.durability import flush_file, named_in_errors
from bestrq2.errors import AudioError, ManifestError, check_open_files

__all__ = [
    "check_first_channel",
    "discover_folder",
    "is_manifest",
    "read_manifest",
    "read_rows",
    "write_manifest",
]


def discover_folder(folder: str | os.PathLike[str]) -> Listing:
    """List the audio files below ``folder`` in sorted order, following links, each real folder visited once.

    Hidden files and folders (a leading dot), folders that a link reaches again and empty ones named like audio are left
    out, and counted in ``ignored``. The first folder level becomes the ``domain`` of a file, so
    ``folder/speech/a/b.wav`` has the domain "speech" and ``folder/b.wav`` none.

    Raises:
        NotADirectoryError: ``folder`` is not a folder.
        OSError: it cannot be listed. Unreadable folders inside it are counted in ``ignored``.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise NotADirectoryError(f"{root} is not a folder" if os.path.exists(root) else f"folder {root} does not exist")
    os.listdir(root)  # an unreadable top folder is an error, not an empty one
    files: list[AudioFile] = []
    ignored: Counter[str] = Counter()
    archives: list[tuple[str, str]] = []
    visited: set[tuple[int, int]] = set()
    above = _folders_above(root)
    links: set[str] = set()

    def unreadable(error: OSError) -> None:
        check_open_files(error)
        ignored["(unreadable folder)"] += 1

    for where, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            status = os.stat(where)
        except OSError as error:
            unreadable(error)
            continue
        if where != root and (status.st_dev, status.st_ino) in above:
            folders.clear()  # it would bring in everything beside the source
            ignored["(link to a folder above)"] += 1
            continue
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()  # reached by a link before: a loop, or the same files twice
            ignored["(link to a folder listed already)"] += 1
            continue
        visited.add((status.st_dev, status.st_ino))
        hidden = sum(name.startswith(".") for name in folders)
        if hidden:
            ignored["(hidden folder)"] += hidden
        if not folders and not names and is_audio(where):
            ignored["(empty folder named like audio)"] += 1
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        with suppress(OSError), os.scandir(where) as entries:  # tells links without a look at every file
            links.update(entry.path for entry in entries if entry.is_symlink())
        below = os.path.relpath(where, root)
        domain = "" if below == "." else to_text(below.split(os.sep)[0])  # as a manifest has it, in every locale
        for name in sorted(names):
            if name.startswith("."):
                ignored["(hidden file)"] += 1
                continue
            if is_audio(name):
                files.append(AudioFile(os.path.join(where, name), domain=domain))
            elif not name.endswith(".tar.index.json"):  # written by this library beside a shard
                ignored[Path(name).suffix.lower() or "(no extension)"] += 1
                if is_archive(name):
                    archives.append((os.path.join(where, name), domain))
    return Listing(files, ignored, archives=archives, notes=_linked_twice(files, links, root))


def _folders_above(root: str) -> set[tuple[int, int]]:
    above = set()
    for folder in Path(os.path.realpath(root)).parents:
        with suppress(OSError):
            status = os.stat(folder)
            above.add((status.st_dev, status.st_ino))
    return above


def _linked_twice(files: list[AudioFile], links: set[str], root: str) -> list[str]:
    """A note if links make one file several: it is drawn as often, and may be on both sides of a split."""
    if not links:
        return []
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(item.path) for item in files}}
    real = {
        os.path.realpath(item.path)
        if item.path in links
        else os.path.join(folders[os.path.dirname(item.path)], os.path.basename(item.path))
        for item in files
    }
    repeats = len(files) - len(real)
    return [f"{root}: {repeats} of the files are links to others; each is used as often as it is listed"] * bool(
        repeats
    )


def read_rows(path: str | os.PathLike[str]) -> list[tuple[AudioFile, dict[str, Any]]]:
    """As :func:`read_manifest`, each file with all columns of its row."""
    source = Path(path)
    source, rows = kaldi_rows(source) if source.name == "wav.scp" else (source, rows_of(source))
    named = [(line, known_columns(row)) for line, row in rows]
    files = [(audio_file(source, line, row), row) for line, row in named]
    if not files:
        raise ManifestError(f"{source}: no rows")
    places = ((f"{source}:{line}", file) for (line, row), (file, _) in zip(named, files) if asks_for_first_channel(row))
    check_first_channel(next(places, None))
    return files


def check_first_channel(asking: tuple[str, AudioFile] | None) -> None:
    """Refuse channel 0 of several, which cannot be chosen.

    Args:
        asking: place and clip of the first row that asks for it. Its header tells for all, for rows are alike.

    Raises:
        ManifestError: it names the row.
    """
    if asking is None:
        return
    where, file = asking
    with suppress(AudioError):  # a missing or damaged file is told when it is read
        if (channels := audio_info(file.path).channels) > 1:
            raise ManifestError(
                f"{where}: channel 0 of {channels} cannot be applied, channels are averaged: write such clips to files "
                "of their own, or remove the column if all channels are meant"
            )


def read_manifest(path: str | os.PathLike[str]) -> list[AudioFile]:
    """Read a manifest, plain or gzipped (``.gz``).

    Forms: a table with a header line (.csv, .tsv; the delimiter is looked for); one JSON object a line (.jsonl,
    .ndjson, .json, .list); SpeechBrain's JSON; Lhotse's cuts of one recording each; fairseq's .tsv; ``wav.scp`` of
    Kaldi, ESPnet and WeNet, with ``segments`` beside it.

    Column ``path`` (or audio_filepath, file, file_name, wav, ...) is required, relative to the manifest's folder or
    absolute. Optional: ``duration`` in seconds (or seconds, duration_ms), ``start`` and ``end`` of a part (or offset,
    stop), ``sampling_rate`` (or sample_rate, sr), ``domain``, ``label``. Other columns are labels for a probe, but for
    those that ask for other audio (a channel, a speed), which are refused. See :mod:`bestrq2.data.fields`.

    Raises:
        ManifestError: no such column, a bad row (with its line number), or no rows.
        OSError: the file cannot be read.
    """
    return [file for file, _ in read_rows(path)]


def write_manifest(path: str | os.PathLike[str], files: Iterable[AudioFile]) -> None:
    """Write a CSV manifest that :func:`read_manifest` gives back, all at once or not at all.

    Paths inside the manifest's folder are written relative to it, so that the folder can move; others are absolute.
    The columns of the files come last: lists and objects as JSON, null as nothing.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
    """
    target = Path(path)
    base = os.path.abspath(target.parent)
    listed = list(files)
    # read_manifest joins to the folder as it is named, so the comparison is by name too, without resolving links
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with (
            named_in_errors(target),
            open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            parts = any(item.is_part for item in listed)
            others = dict.fromkeys(name for item in listed for name in item.columns or () if name not in WRITTEN)
            rows = [_row(item, base, parts, others) for item in listed]
            # Without quotes a space before a field may be taken for a part of the delimiter, and a line of a text for
            # a row.
            quoted = any(isinstance(cell, str) and re.search(r"^ |[\r\n]", cell) for row in rows for cell in row)
            writer = csv.writer(file, quoting=csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL)
            writer.writerow((*WRITTEN, *(("start", "end") if parts else ()), *others))
            writer.writerows(rows)
            file.flush()
            flush_file(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _row(item: AudioFile, base: str, parts: bool, others: Iterable[str]) -> list[Any]:
    name = os.path.abspath(item.path)
    if os.path.commonpath([base, name]) == base:
        name = os.path.relpath(name, base)
    duration = "" if item.duration is None else repr(float(item.duration))  # to the last bit
    row = [to_text(name), duration, item.sampling_rate or "", item.domain, item.label]
    if parts:
        row += [repr(item.start), "" if item.end is None else repr(item.end)] if item.is_part else ["", ""]
    return row + [as_cell((item.columns or {}).get(name)) for name in others]


if __name__ == "__main__":
    # The former name of the command `bestrq2 manifest`; the entry points are above this package, so no plain import.
    import_module("bestrq2.command").leave(import_module("bestrq2.manifest").main())
