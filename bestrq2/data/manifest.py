"""Lists of audio files: found in a folder, read from a CSV or JSONL manifest, written to one.

bestrq2 manifest recordings/ --out manifest.csv --check
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

from bestrq2.data.files import AudioFile, Listing, is_archive, is_audio
from bestrq2.errors import ManifestError

__all__ = [
    "discover_folder",
    "read_manifest",
    "read_rows",
    "write_manifest",
]

# The first name is ours; the others are what common manifests call the same thing (NeMo, Kaldi-derived tools).
_COLUMNS = {
    "path": ("path", "audio_filepath", "file"),
    "duration": ("duration", "seconds"),
    "sampling_rate": ("sampling_rate", "sample_rate", "sr"),
    "domain": ("domain",),
    "label": ("label",),
}
_JSON_LINES = {".jsonl", ".json", ".ndjson"}
_TABLES = {".csv": ",", ".tsv": "\t"}


def is_manifest(path: str | os.PathLike[str]) -> bool:
    """Whether the extension is one that :func:`read_manifest` reads."""
    return Path(path).suffix.lower() in _JSON_LINES | set(_TABLES)


def discover_folder(folder: str | os.PathLike[str]) -> Listing:
    """List the audio files below ``folder`` in sorted order, following links, each real folder visited once.

    Hidden files and folders (a leading dot) are left out. The first folder level becomes the ``domain`` of a file, so
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

    def unreadable(_: OSError) -> None:
        ignored["(unreadable folder)"] += 1

    for where, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        try:
            status = os.stat(where)
        except OSError as error:
            unreadable(error)
            continue
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()  # reached by a link before: a loop, or the same files twice
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(where, root)
        domain = "" if below == "." else below.split(os.sep)[0]
        for name in sorted(names):
            if name.startswith("."):
                continue
            if is_audio(name):
                files.append(AudioFile(os.path.join(where, name), domain=domain))
            elif not name.endswith(".tar.index.json"):  # written by this library beside a shard
                ignored[Path(name).suffix.lower() or "(no extension)"] += 1
                if is_archive(name):
                    archives.append((os.path.join(where, name), domain))
    return Listing(files, ignored, archives=archives)


def read_rows(path: str | os.PathLike[str]) -> list[tuple[AudioFile, dict[str, Any]]]:
    """As :func:`read_manifest`, each file with all columns of its row."""
    source = Path(path)
    suffix = source.suffix.lower()
    if not is_manifest(source):
        raise ManifestError(f"{source}: a manifest must end in .csv, .tsv or .jsonl, got {suffix!r}")
    rows = _json_rows(source) if suffix in _JSON_LINES else _table_rows(source, _TABLES[suffix])
    files = [(_audio_file(source, line, row), row) for line, row in rows]
    if not files:
        raise ManifestError(f"{source}: no rows")
    return files


def read_manifest(path: str | os.PathLike[str]) -> list[AudioFile]:
    """Read a manifest: CSV or TSV with a header line, or one JSON object a line (.jsonl, .ndjson, .json).

    Column ``path`` (or audio_filepath, file) is required, relative to the manifest's folder or absolute. Optional:
    ``duration`` (or seconds), ``sampling_rate`` (or sample_rate, sr), ``domain``, ``label``. Others are ignored.

    Raises:
        ManifestError: no such column, a bad row (with its line number), or no rows.
        OSError: the file cannot be read.
    """
    return [file for file, _ in read_rows(path)]


def _table_rows(source: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # surrogateescape keeps file names that are not UTF-8; utf-8-sig drops the mark that spreadsheets write
    with open(source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            header = next(reader, None)
            if header is None:
                raise ManifestError(f"{source}: the file is empty; expected a header line with a column 'path'")
            header = [name.strip() for name in header]
            if not set(_COLUMNS["path"]) & set(header):
                raise ManifestError(f"{source}: no column 'path' in the header line; its columns are {header}")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ManifestError(f"{source}:{reader.line_num}: expected {len(header)} fields, got {len(row)}")
                yield reader.line_num, dict(zip(header, row))
        except csv.Error as error:
            raise ManifestError(f"{source}:{reader.line_num}: {error}") from error


def _json_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ManifestError(f"{source}:{line}: not JSON ({error}); expected one object a line") from error
            if not isinstance(row, dict):
                raise ManifestError(f"{source}:{line}: expected a JSON object, got {type(row).__name__}")
            yield line, row


def _audio_file(source: Path, line: int, row: dict[str, Any]) -> AudioFile:
    def value(column: str) -> Any:
        return next((row[name] for name in _COLUMNS[column] if row.get(name) not in (None, "")), None)

    def number(column: str, low: float) -> float | None:
        text = value(column)
        if text is None:
            return None
        try:
            result = float(text)
        except (TypeError, ValueError):
            result = float("nan")
        if isinstance(text, bool) or not (isfinite(result) and result >= low):
            raise ManifestError(f"{source}:{line}: {column} must be a number >= {low:g}, got {text!r}")
        return result

    path = value("path")
    if path is None:
        what = "the path is empty" if any(name in row for name in _COLUMNS["path"]) else f"no 'path' in {sorted(row)}"
        raise ManifestError(f"{source}:{line}: {what}")
    if not isinstance(path, str) or "\0" in path:
        raise ManifestError(f"{source}:{line}: path must be text, got {path!r}")
    rate = number("sampling_rate", 1)
    return AudioFile(
        path=os.path.normpath(os.path.join(source.parent, path)),
        duration=number("duration", 0),
        sampling_rate=None if rate is None else int(rate),
        domain=str(value("domain") or ""),
        label=str(value("label") or ""),
    )


def write_manifest(path: str | os.PathLike[str], files: Iterable[AudioFile]) -> None:
    """Write a CSV manifest that :func:`read_manifest` gives back, all at once or not at all.

    Paths inside the manifest's folder are written relative to it, so that the folder can move; others are absolute.

    Raises:
        OSError: the file cannot be written; an existing one is left as it was.
    """
    target = Path(path)
    base = os.path.abspath(target.parent)
    # read_manifest joins to the folder as it is named, so the comparison is by name too, without resolving links
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for item in files:
                name = os.path.abspath(item.path)
                if os.path.commonpath([base, name]) == base:
                    name = os.path.relpath(name, base)
                duration = "" if item.duration is None else repr(float(item.duration))  # to the last bit
                writer.writerow([name, duration, item.sampling_rate or "", item.domain, item.label])
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    # The former name of the command `bestrq2 manifest`; the entry points are above this package, so no plain import.
    import_module("bestrq2.command").leave(import_module("bestrq2.manifest").main())
