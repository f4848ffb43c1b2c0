"""Columns of a source beside what an AudioFile holds: labels, which `bestrq2 manifest` and `bestrq2 shards` keep.

Names and values stay as they are, with one exception: a column that a reader of what is written would take for the
place or the path of the clip says where it was cut out, and is called ``source_NAME``.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from bestrq2.data.cells import as_json
from bestrq2.data.channels import is_a_channel, is_neutral, is_other_audio
from bestrq2.data.fields import CUTS, is_held, is_known
from bestrq2.data.files import AudioFile, to_text
from bestrq2.data.places import check_places, may_hold_a_place
from bestrq2.data.splits import SPLIT_COLUMNS
from bestrq2.errors import ManifestError

__all__ = ["LARGEST", "WRITTEN", "of_archive", "of_manifest", "together", "with_place"]

WRITTEN = ("path", "duration", "sampling_rate", "domain", "label")  # in every manifest of ours
LARGEST = 60_000  # bytes of a clip's columns as JSON: a .json of over 64 KB is not read in a shard


def of_manifest(row: dict[str, Any], lost: list[str]) -> dict[str, Any]:
    """Columns to keep of a row of a manifest; names of what cannot be kept are added to ``lost``."""
    return _kept({name: row[name] for name in row if not is_held(name, row)}, row, lost)


def of_archive(row: dict[str, Any], used: Collection[str], lost: list[str]) -> dict[str, Any]:
    """The same of a clip in an archive, of which the columns ``used`` are in its AudioFile."""
    return _kept({name: row[name] for name in row if name not in used}, row, lost)


def together(files: list[AudioFile]) -> list[AudioFile]:
    """The files, where some clips have a gain or such as ``source_NAME``, with the neutral ones of the others under
    this name, too: numbers of one column stay one column."""
    prefix = "source_"
    renamed = {name for item in files for name in item.columns or () if name.startswith(prefix)}
    found = []
    for item in files:
        columns = item.columns or {}
        moved = {
            name: prefix + name
            for name, value in columns.items()
            if prefix + name in renamed and prefix + name not in columns and is_neutral(name, value)
        }
        new = {moved.get(name, name): value for name, value in columns.items()}
        found.append(replace(item, columns=new) if moved else item)
    return found


def with_place(columns: dict[str, Any] | None, path: str, start: float, end: float | None) -> dict[str, Any]:
    """The columns of a part that becomes a file of its own, with its place in seconds."""
    columns = columns or {}
    path = to_text(path).encode("utf-8", "backslashreplace").decode()  # a label, where a path may be any bytes
    place = {"path": path, "start": start, "end": end}
    prefix = "source_"
    while any(prefix + name in columns for name in place):  # cut out of what was cut out
        prefix += "source_"
    return columns | {prefix + name: value for name, value in place.items()}


def _kept(columns: dict[str, Any], row: dict[str, Any], lost: list[str]) -> dict[str, Any]:
    alone = {name for name in columns if may_hold_a_place(name) and _is_a_place({name: columns[name]})}
    pairs = _is_a_place({name: value for name, value in columns.items() if name not in alone})
    found: dict[str, Any] = {}
    for name, value in columns.items():
        taken = name in alone or (pairs and may_hold_a_place(name)) or _is_read(name.strip(), value)
        name = name.strip()  # as the header of a table is read
        while taken or name in found:
            name, taken = f"source_{name}", False
        found[name] = value
    # As text they are in the AudioFile.
    found |= {name: row[name] for name in ("domain", "label") if not isinstance(as_json(row.get(name)), str | None)}
    for name in _too_much(found):
        del found[name]
        lost += [name] if name not in lost else []
    return found


def _is_a_place(columns: dict[str, Any]) -> bool:
    try:
        check_places("", columns, (), False)
    except ManifestError:
        return True
    return False


def _is_read(name: str, value: Any) -> bool:
    """Return True if the reader of our manifests would look at this column of a clip."""
    known = name.lower()
    # A label, or beside a column that is read.
    if known in SPLIT_COLUMNS or (known in WRITTEN and known != name):
        return False
    other_audio = is_a_channel(name, value) or is_other_audio(name, value)
    return is_known(name) or other_audio or (known == "type" and value in CUTS)


def _too_much(columns: dict[str, Any]) -> Iterable[str]:
    """Names of columns that are no text, and of the largest until the others fit."""
    whole = json.dumps(columns)
    if len(whole) <= LARGEST and "\\u0000" not in whole and "\\ud" not in whole:
        return
    texts = {name: json.dumps({name: value}) for name, value in columns.items()}
    for name, text in list(texts.items()):
        try:
            json.dumps({name: columns[name]}, ensure_ascii=False).encode("utf-8")
            if "\\u0000" not in text:
                continue
        except UnicodeEncodeError:  # half of a surrogate pair
            pass
        del texts[name]
        yield name
    size = sum(map(len, texts.values()))
    for name in sorted(texts, key=lambda name: len(texts[name]), reverse=True):
        if size <= LARGEST:
            return
        size -= len(texts[name])
        yield name
