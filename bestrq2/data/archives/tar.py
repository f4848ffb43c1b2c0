"""Tar shards in webdataset's naming, with random access through an index.

Members of one sample share their name up to the first dot: ``000017.flac`` with ``000017.json`` (duration,
sampling_rate, domain, label, split) or ``000017.txt`` / ``.cls`` (the label). The index of a shard is built once, from
its headers alone, and kept as ``shard.tar.index.json`` beside it, else in the user's cache folder; a shard of another
size or modification time is indexed again. Damage is noted in the index, and the members behind it are found again.
"""

import contextlib
import hashlib
import io
import json
import os
import posixpath
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bestrq2.data.archives.readers import Section
from bestrq2.data.archives.tar_walk import Entry, walk
from bestrq2.data.cells import TwiceError, as_cell, as_json, read_json
from bestrq2.data.columns import of_archive
from bestrq2.data.fields import known_columns
from bestrq2.data.files import AudioFile, Listing, address, from_text, is_audio, to_text
from bestrq2.data.splits import split_of_row
from bestrq2.encodings import TextEncodingError, decode_text
from bestrq2.errors import AudioError, Skip, printable

__all__ = ["INDEX_SUFFIX", "TarIndex", "TarMember", "list_tar", "open_tar_member", "tar_index"]

INDEX_SUFFIX = ".tar.index.json"
_FORMAT = "bestrq2 tar index 11"  # 1 replaced letters, 2 to 5 mixed labels up, 6 had no splits, 7 lost lone sidecars
# 8 had lists as Python's text, 9 took the last of a name that is there twice, 10 did not tell of an infinite duration
_SIDECARS = {"json": 1 << 16, "txt": 1 << 12, "cls": 1 << 12}  # largest size that is read, in bytes
_USED = ("duration", "seconds", "sampling_rate", "sample_rate", "sr", "domain", "label")


@dataclass(frozen=True)
class TarMember:
    """An audio file in a shard: its ``size`` bytes begin at ``offset``. What its sidecars do not state is None."""

    name: str
    offset: int
    size: int
    duration: float | None = None
    sampling_rate: int | None = None
    domain: str | None = None
    label: str = ""
    split: str | None = None


@dataclass
class TarIndex:
    """The audio ``members`` of a shard in their order, other members by extension, and ``damage`` as messages.

    ``size`` in bytes and ``mtime_ns`` are those of the shard that was indexed. ``repeated`` counts the audio members
    that came under the name of an earlier one, and ``repeated_name`` is the first such name. ``shared`` counts those
    with several labels that are also another's, ``shared_first`` is the first with its labels.
    """

    size: int
    mtime_ns: int
    members: list[TarMember] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)
    repeated: int = 0
    repeated_name: str = ""
    shared: int = 0
    shared_first: str = ""


def tar_index(shard: str, *, keep: bool = True, rows: list[dict[str, Any]] | None = None) -> TarIndex:
    """The index of a shard: the kept one if it fits, else built now and, with ``keep``, kept if any place is writable.

    With ``rows`` it is built in any case, and what the sidecars of each member say is added to them.

    Raises:
        OSError: the shard cannot be read.
    """
    with open(shard, "rb") as file:
        status = os.fstat(file.fileno())
        for place in _places(shard) if rows is None else ():
            kept = _read(place)
            if kept is not None and (kept.size, kept.mtime_ns) == (status.st_size, status.st_mtime_ns):
                return kept
        index = _build(file, TarIndex(status.st_size, status.st_mtime_ns), rows)
    if keep:
        for place in _places(shard):
            if _write(place, index):
                break
    return index


def _places(shard: str) -> list[Path]:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(os.fsencode(os.path.abspath(shard))).hexdigest()[:32]
    return [Path(shard).with_suffix(INDEX_SUFFIX), Path(root, "bestrq2", "tar", f"{digest}.json")]


def _read(place: Path) -> TarIndex | None:
    """A kept index, or None: not there, not readable, damaged, or of another version."""
    try:
        values = json.loads(place.read_text(encoding="ascii"))
        if values.pop("format") != _FORMAT:
            return None
        members = [TarMember(*row) for row in values.pop("members")]
        return TarIndex(members=members, others=Counter(values.pop("others")), **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(place: Path, index: TarIndex) -> bool:
    values = {"format": _FORMAT, **vars(index), "members": [list(vars(member).values()) for member in index.members]}
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(values, separators=(",", ":")), encoding="ascii")
        os.replace(partial, place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return False


def _build(file: BinaryIO, index: TarIndex, rows: list[dict[str, Any]] | None) -> TarIndex:
    audio: list[tuple[Entry, str, int, int]] = []  # with the name, how often it came before, the place
    clips: dict[str, list[int]] = {}  # name that sidecars may have -> places of its clips among all members
    sidecars: dict[str, dict[str, list[_Text]]] = {}  # name without extension -> extension -> texts
    names, times = set[str](), Counter[str]()
    for place, entry in enumerate(walk(file, index.size, index.damage)):
        name = posixpath.normpath(entry.name).lstrip("/")
        if any(part.startswith(".") and part != ".." for part in name.split("/")):
            index.others["(hidden)"] += 1
            continue
        stem, _, extension = posixpath.basename(name).rpartition(".")
        extension = extension.lower()
        stem = posixpath.join(posixpath.dirname(name), stem)
        size = entry.stop - entry.offset
        if is_audio(name):
            unique, number = name, 2
            while unique in names:  # appended again under the same name: neither is lost
                unique, number = f"{stem}~{number}.{extension}", number + 1
            if times[name]:
                index.repeated += 1
                index.repeated_name = index.repeated_name or name
            names.add(unique)
            audio.append((Entry(unique, entry.offset, entry.stop), name, times[name], place))
            for key in _keys(name):
                clips.setdefault(key, []).append(place)
            times[name] += 1
        elif extension in _SIDECARS:
            text = None  # keeps the place of one that is not read among several
            if size <= _SIDECARS[extension] and entry.stop <= index.size:
                file.seek(entry.offset)
                try:
                    text = decode_text(file.read(size))
                except TextEncodingError as error:
                    index.damage.append(f"{name}, line {error.line}: {error}; it is not used")
            else:
                index.others[f".{extension}"] += 1
            sidecars.setdefault(stem, {}).setdefault(extension, []).append(_Text(place, text))
        else:
            index.others[f".{extension}" if extension else "(no extension)"] += 1
    for stem in (stem for stem in sidecars if stem not in clips):  # of no clip, by webdataset's names: utt.meta.json
        key, _, middle = posixpath.basename(stem).partition(".")
        known = middle.isalpha() and posixpath.join(posixpath.dirname(stem), key) in clips
        for kind, found in sidecars[stem].items():
            if count := sum(one.text is not None for one in found):  # the others are told above
                index.others[f".{middle}.{kind}" if known else f".{kind}"] += count
    for entry, name, before, place in audio:
        texts, shared = {}, False
        for key in _keys(name):
            for kind, found in sidecars.get(key, {}).items():
                places = [text.place for text in found]
                at = _number_of(clips[key], place, places, before, times[name])
                if at is not None and (text := found[at].text) is not None:
                    texts[kind] = text
                    shared = shared or (len(clips[key]) > times[name] and not _in_pairs(clips[key], places))
        row = _row(entry.name, texts, index)
        stated = _stated(entry.name, row, texts, index)
        if rows is not None:
            others = {kind: text for kind, text in texts.items() if text.strip() != stated["label"] and kind != "json"}
            rows.append(others | row)
        given = {stated["label"], *(text.strip() for kind, text in texts.items() if kind != "json")}
        if len(given) > 1 and shared:
            index.shared_first = index.shared_first or f"{printable(name)} ({', '.join(map(repr, sorted(given)))})"
            index.shared += 1
        index.members.append(TarMember(entry.name, entry.offset, entry.stop - entry.offset, **stated))
    return index


class _Text(NamedTuple):
    """The text of a sidecar, None if it is not read, and its place among all members."""

    place: int
    text: str | None


def _keys(name: str) -> list[str]:
    """Names that a clip's sidecars may have: webdataset's, up to the first dot, and that without the extension."""
    folder, base = posixpath.split(name)
    return list(dict.fromkeys([posixpath.join(folder, base.split(".")[0]), name.rpartition(".")[0]]))


def _number_of(clips: list[int], place: int, texts: list[int], before: int, times: int) -> int | None:
    """Number of the sidecar at ``texts`` that belongs to the clip at ``place``, None if that is not known.

    Clips and texts that came in pairs belong together. Else, as many texts as clips of the clip's name (there are
    ``times``, ``before`` of them earlier) belong to them in their order. Of several texts for one clip the last counts,
    as when the shard is unpacked; of clips of one name whose texts are fewer or more, the first has the first one.

    Args:
        clips: places of all clips that may have these texts.
    """
    if _in_pairs(clips, texts):
        return clips.index(place)
    if len(texts) == times:
        return before
    if before == 0:
        return len(texts) - 1 if times == 1 else 0
    return None


def _in_pairs(clips: list[int], texts: list[int]) -> bool:
    """Return True for as many texts as clips, each beside its clip."""
    return len(clips) == len(texts) and all(max(one) < min(two) for one, two in pairwise(zip(clips, texts)))


def _row(name: str, texts: dict[str, str], index: TarIndex) -> dict[str, Any]:
    """The .json beside a clip, empty if there is none or it is no object."""
    try:
        row = read_json(texts.get("json", "{}"))
    except (ValueError, TwiceError) as error:
        what = f"is not JSON ({error})" if isinstance(error, ValueError) else f"is ambiguous: {error}"
        index.damage.append(f"the .json beside {name} {what}; it is not used")
        row = {}
    if not isinstance(row, dict):
        index.others[".json (no object)"] += 1
        row = {}
    return row


def _stated(name: str, row: dict[str, Any], texts: dict[str, str], index: TarIndex) -> dict[str, Any]:
    """Fields of a clip from its sidecar files; values of a wrong kind are ignored, NaN and infinity are told."""

    def number(*columns: str) -> float | None:
        column = next((column for column in columns if row.get(column) is not None), columns[0])
        value = row.get(column)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not abs(value) <= sys.float_info.max:
            shown = value if isinstance(value, float) else "a larger one than a float holds"
            what = f"{column} must be a finite number, got {shown}"
            index.damage.append(f"the .json beside {name}: {what}; it is not used")
            return None
        return value if value > 0 else None

    rate = number("sampling_rate", "sample_rate", "sr")
    domain, label = as_json(row.get("domain")), as_json(row.get("label"))
    if label is None:
        label = texts.get("cls", texts.get("txt", "")).strip()
    return {
        "duration": number("duration", "seconds"),
        "sampling_rate": None if rate is None else int(rate),
        "domain": None if domain is None else as_cell(domain),
        "label": as_cell(label),
        "split": split_of_row(known_columns(row)),
    }


def list_tar(shard: str, domain: str = "", *, columns: bool = False) -> Listing:
    """The clips of a shard in their order, and what is damaged or lost.

    The domain of a clip is what its sidecar states, else ``domain``, else the first folder level inside of the shard.
    With ``columns`` its sidecars are read anew, and what else they say is kept with it.

    Raises:
        OSError: the shard cannot be read.
    """
    rows: list[dict[str, Any]] = []
    index = tar_index(shard, rows=rows if columns else None)
    listing = Listing([], Counter(index.others), [Skip(shard, "damaged archive", what) for what in index.damage])
    if index.repeated:
        listing.repeated.append((address(shard, from_text(index.repeated_name)), index.repeated))
    if index.shared:
        listing.shared.append((f"{printable(shard)}::{index.shared_first}", index.shared))
    if index.size == 0:
        listing.skips[:] = [Skip(shard, "empty file")]
    for number, member in enumerate(index.members):
        path, end = address(shard, from_text(member.name)), member.offset + member.size
        if end > index.size:
            there = max(0, index.size - member.offset)
            listing.skips.append(Skip(path, "truncated", f"the shard ends after {there} of {member.size} bytes"))
            continue
        found = member.domain
        if found is None:
            found = domain or (from_text(member.name).split("/")[0] if "/" in member.name else "")
        item = AudioFile(path, member.duration, member.sampling_rate, found, member.label)
        listing.files.append(replace(item, columns=of_archive(rows[number], _USED, listing.lost)) if columns else item)
        listing.splits.append(member.split)
    return listing


class _Lookup:
    """Name to place for the members of one shard, in 24 bytes each: every data worker holds all shards of a run."""

    def __init__(self, index: TarIndex) -> None:
        self.stamp = (index.size, index.mtime_ns)
        hashes = np.array([_hash(member.name) for member in index.members], np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._places = np.array([(member.offset, member.size) for member in index.members], np.int64).reshape(-1, 2)
        self._places = self._places[order]

    def find(self, name: str) -> tuple[int, int] | None:
        """(offset, size) of a member, by its name as this process sees it."""
        key = np.uint64(_hash(to_text(name)))
        place = int(np.searchsorted(self._hashes, key))
        if place == len(self._hashes) or self._hashes[place] != key:
            return None
        offset, size = self._places[place].tolist()
        return offset, size


def _hash(name: str) -> int:
    encoded = name.encode("utf-8", "surrogateescape")  # not the locale's encoding, which may not have its letters
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


_lookups: dict[str, _Lookup] = {}
_lock = threading.Lock()


def open_tar_member(shard: str, name: str) -> BinaryIO:
    """The bytes of one member as a file.

    Raises:
        AudioError: no such member, or the shard ends before it does.
        OSError: the shard cannot be read.
    """
    file = open(shard, "rb", buffering=0)  # noqa: SIM115 (closed by the section)
    try:
        status = os.fstat(file.fileno())
        with _lock:
            lookup = _lookups.get(shard)
            if lookup is None or lookup.stamp != (status.st_size, status.st_mtime_ns):
                lookup = _lookups[shard] = _Lookup(tar_index(shard))
        found = lookup.find(name)
        if found is None:
            raise AudioError(address(shard, name), "missing", "no such member in the shard")
        offset, size = found
        if size == 0:
            raise AudioError(address(shard, name), "empty file")
        if offset + size > status.st_size:
            there = max(0, status.st_size - offset)
            raise AudioError(address(shard, name), "truncated", f"the shard ends after {there} of {size} bytes")
        return io.BufferedReader(Section(file, offset, size), 1 << 16)
    except BaseException:
        file.close()
        raise
