"""Data folders of Kaldi, ESPnet and WeNet: ``wav.scp`` with, beside it, ``segments``, ``utt2spk`` and ``text``."""

import os
from pathlib import Path
from typing import Any

from bestrq2.data.tables import read_lines
from bestrq2.encodings import foreign_letter
from bestrq2.errors import ManifestError

__all__ = ["kaldi_rows"]


def kaldi_rows(scp: str | os.PathLike[str]) -> tuple[Path, list[tuple[int, dict[str, Any]]]]:
    """The file that lists the utterances, ``segments`` where there is one, else ``wav.scp``; (line, columns) of each.

    Columns are ID, path, start, end and, from utt2spk and text, speaker and text.

    Raises:
        ManifestError: a line of another form, a command in place of a file, a segment of an unknown recording.
        OSError: a file cannot be read.
    """
    source = Path(scp)
    places: dict[str, tuple[int, str]] = {}
    for number, name, rest in _entries(source):
        if rest.rstrip().endswith("|"):
            raise ManifestError(f"{source}:{number}: a command is not run; write its output to a file: {rest!r}")
        if ".ark:" in rest:
            raise ManifestError(f"{source}:{number}: Kaldi archives are not read; name audio files: {rest!r}")
        places[name] = number, rest
    extra = {column: _table(source.with_name(file)) for column, file in (("speaker", "utt2spk"), ("text", "text"))}
    segments = source.with_name("segments")
    rows: list[tuple[int, dict[str, Any]]] = []
    if segments.is_file():
        for number, name, rest in _entries(segments):
            parts = rest.split()
            if len(parts) not in (3, 4):
                raise ManifestError(f"{segments}:{number}: expected utterance, recording, start and end")
            if len(parts) == 4 and parts[3] not in ("0", "A"):
                raise ManifestError(f"{segments}:{number}: channel {parts[3]} cannot be chosen, channels are averaged")
            if parts[0] not in places:
                raise ManifestError(f"{segments}:{number}: {source.name} has no recording {parts[0]!r}")
            row = {"ID": name, "path": places[parts[0]][1], "start": parts[1], "end": parts[2]}
            rows.append((number, row | {"channel": "0"} if len(parts) == 4 else row))
    else:
        rows = [(number, {"ID": name, "path": path}) for name, (number, path) in places.items()]
    for _, row in rows:
        row |= {column: table[row["ID"]] for column, table in extra.items() if row["ID"] in table}
    return segments if segments.is_file() else source, rows


def _entries(path: Path, may_be_empty: bool = False) -> list[tuple[int, str, str]]:
    found = []
    names: set[str] = set()
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            name, *rest = line.strip().split(None, 1)
            if name in names:
                raise ManifestError(f"{path}:{number}: {name} is there twice")
            names.add(name)
            if not rest and not may_be_empty:
                raise ManifestError(f"{path}:{number}: expected a name and what it stands for, got {line.strip()!r}")
            # A path may be any bytes.
            if what := foreign_letter(line if may_be_empty else name):
                raise ManifestError(f"{path}:{number}: {what}")
            found.append((number, name, rest[0] if rest else ""))
    return found


def _table(path: Path) -> dict[str, str]:
    return {name: rest for _, name, rest in _entries(path, True)} if path.is_file() else {}
