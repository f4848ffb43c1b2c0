"""Columns of a manifest: the path of a clip, its place in a longer file, duration, rate, labels.

Names are those of NeMo, SpeechBrain, WeNet, Lhotse, Common Voice and Hugging Face's audio folders. A column that would
change which audio a row stands for is used or refused; all others are labels.
"""

import os
import re
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from bestrq2.data.cells import as_cell
from bestrq2.data.channels import CHANNELS, REFUSED, check_channels
from bestrq2.data.files import AudioFile, from_text
from bestrq2.data.places import check_places, is_a_length, length_of_part, may_hold_a_place
from bestrq2.data.splits import SPLIT_COLUMNS
from bestrq2.errors import ManifestError

# The first name of each is ours.
PATH_NAMES = ("path", "audio_filepath", "file", "file_name", "filename", "wav", "audio_path", "filepath", "wav_path")
_RATE = ("sampling_rate", "sample_rate", "sr")
_START = ("start", "offset", "start_time", "begin", "begin_time", "start_seconds", "start_sec")
_END = ("end", "stop", "end_time", "stop_time", "end_seconds", "end_sec")
_DURATION = ("duration", "seconds", "duration_seconds", "duration_sec", "dur")
_DURATION_MS = ("ms", "duration_ms", "dur_ms", "duration[ms]")
_START_MS, _END_MS = ("start_ms", "offset_ms"), ("end_ms", "stop_ms")
_MILLISECONDS = (*_DURATION_MS, *_START_MS, *_END_MS)
_PLACED = (*_START, *_END, "onset", *_START_MS, *_END_MS)
_KNOWN = frozenset([*PATH_NAMES, *_RATE, *_START, *_END, *_DURATION, *_MILLISECONDS, *REFUSED, *CHANNELS]).union(
    ("onset", "domain", "label", "audio", *SPLIT_COLUMNS)
)

# What an AudioFile holds, and what says nothing beside it (in fairseq's lists).
_HELD = _KNOWN.difference((*REFUSED, *CHANNELS, *SPLIT_COLUMNS)).union(("num_samples",))
CUTS = ("MonoCut", "MixedCut", "PaddingCut", "MultiCut")  # types of Lhotse


def is_read(column: str) -> bool:
    """Return True for a column beside the path that :func:`audio_file` or the choice of a split looks at."""
    known = column.strip().lower()
    return (known in _KNOWN and known not in (*PATH_NAMES, "audio")) or may_hold_a_place(column)


def is_known(column: str) -> bool:
    """Return True for a name that :func:`audio_file` knows, of a path, a place, a number or a label, whatever its
    value."""
    known = column.strip().lower()
    return known in _KNOWN and known not in (*REFUSED, *CHANNELS)


def is_held(column: str, row: dict[str, Any]) -> bool:
    """Return True for a column of a row whose content is in its :class:`AudioFile`, or says nothing beside it."""
    known = column.strip().lower()
    if known != column and known in row and row[known] != row[column]:  # a label, beside the column that is read
        return False
    if known in ("recording", "sources"):
        return isinstance(row[column], dict | list)
    if (known == "type" and row[column] in CUTS) or (known == "channel" and row.get("type") in CUTS):
        return True
    if known not in _HELD:
        copy = known == column and known in _KNOWN and any(known == n.strip().lower() for n in row if n != known)
        of_wav = known == "length" and "wav" in row
        of_part = is_a_length(column) and _first(row, _PLACED) is not None
        return copy or of_wav or of_part
    return True


def known_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with columns such as ``Path`` and ``Start`` also under the names that are known."""
    renamed = _renamed(tuple(row))
    return row | {known: row[name] for known, name in renamed} if renamed else row


@lru_cache(256)
def _renamed(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    folded = ((name.strip().lower(), name) for name in names)
    return tuple((known, name) for known, name in folded if known in _KNOWN and known not in names)


def columns_in_seconds(row: dict[str, Any]) -> dict[str, str]:
    """The columns of a row that state a place or a duration in seconds, as they are written there, each with the name
    under which it would be in milliseconds."""
    ends = (*_END, "offset") if "onset" in row else _END
    starts = ("onset", *(name for name in _START if name not in ends))
    families = ((starts, "start_ms"), (ends, "end_ms"), (_DURATION, "duration_ms"))
    found: dict[str, tuple[str, str]] = {}
    for name, value in row.items():
        known = name.strip().lower()
        for names, there in families:
            if known in names and value not in (None, ""):
                found.setdefault(known, (name, there))  # it may be there also under the name that is known
    return dict(found.values())


def audio_file(source: Path, line: int, row: dict[str, Any]) -> AudioFile:
    """The clip of a row.

    ``start`` or ``offset``, and ``end`` or ``stop``, in seconds make it a part of its file, as does ``audio_filepath``
    with a duration (NeMo). A start takes ``length_sec`` for a duration, too; a length without a unit is refused there.
    Beside ``onset``, ``offset`` is the end (DCASE). ``start`` with ``stop`` may count samples (SpeechBrain), which a
    duration must tell.

    Raises:
        ManifestError: for a row that is none, or whose meaning is open; it names the line.
    """
    where = f"{source}:{line}"
    row = _flattened(where, row)
    check_places(where, row, _KNOWN, _first(row, _PLACED) is not None)
    check_channels(where, row)
    path = _first(row, PATH_NAMES)
    if path is None:
        what = "the path is empty" if any(name in row for name in PATH_NAMES) else f"no 'path' in {sorted(row)}"
        raise ManifestError(f"{where}: {what}")
    named = _among(PATH_NAMES, tuple(row))
    rivals = [name for name in named[1:] and named if isinstance(row[name], str) and _is_another(row[name], path)]
    if rivals:  # the one that is left out may be the audio that was meant
        raise ManifestError(
            f"{where}: columns that name different files: {path!r} and {rivals[0]} = {row[rivals[0]]!r}; keep one"
        )
    if not isinstance(path, str) or "\0" in path:
        raise ManifestError(f"{where}: path must be text, got {path!r}")
    if path.startswith("file://"):
        raise ManifestError(f"{where}: {path} is an address: write the path alone, without file://")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path):
        raise ManifestError(f"{where}: {path} is an address, and nothing is downloaded: name a file on this machine")
    located = _located(source, row, path)
    if any(name in path for name in ("{data_root}", "$data_root", "{root}")) and not os.path.lexists(located):
        raise ManifestError(f"{where}: put the folder in place of the placeholder in {path!r}")
    start, end, duration, segment = _span(where, row)
    rate = _number(where, row, _RATE, 1)
    return AudioFile(
        path=located,
        duration=duration,
        sampling_rate=None if rate is None else int(rate),
        domain=_text(row, "domain"),
        label=_text(row, "label"),
        start=start if segment else 0.0,
        end=end if segment else None,
    )


def _is_another(name: str, path: Any) -> bool:
    """Return True if ``name`` cannot stand for the file at ``path``. Beside a path, tables often have the bare name,
    with another ending or without one."""

    def forms(text: str) -> set[str]:
        bare = re.split(r"[/\\]", text.strip())[-1]
        return {bare, bare.rpartition(".")[0] or bare}

    return name.strip() != "" and not forms(name) & forms(str(path))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in _among(names, tuple(row)):
        if row[name] not in (None, ""):
            return row[name]
    return None


@lru_cache(4096)
def _among(names: tuple[str, ...], columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names that are columns; kept, as the rows of a table have the same."""
    return tuple(name for name in names if name in columns)


def _text(row: dict[str, Any], name: str) -> str:
    return as_cell(row.get(name)).strip()  # 0 is a label


def _located(source: Path, row: dict[str, Any], path: str) -> str:
    path = from_text(path)
    folder: str | Path = source.parent
    if "client_id" in row and "sentence" in row and "/" not in path and (source.parent / "clips").is_dir():
        folder = source.parent / "clips"  # of Common Voice, and not in a list that bestrq2 made of one
    located = os.path.normpath(os.path.join(folder, path))
    if path != path.strip() and not os.path.lexists(located):  # spaces around a delimiter
        there = os.path.normpath(os.path.join(folder, path.strip()))
        located, path = (there, path.strip()) if os.path.lexists(there) else (located, path)
    if "\\" in path and os.sep == "/" and not os.path.lexists(located):  # written on Windows
        there = os.path.normpath(os.path.join(folder, path.replace("\\", "/")))
        return there if os.path.lexists(there) else located
    return located


def _number(where: str, row: dict[str, Any], names: tuple[str, ...], low: float) -> float | None:
    text = _first(row, names)
    if text is None:
        return None
    try:
        result = float(text)
    except (TypeError, ValueError, OverflowError):
        result = float("nan")
    if isinstance(text, bool) or not (isfinite(result) and result >= low):
        name = next(name for name in names if row.get(name) not in (None, ""))
        hint = ""
        if name in _PLACED and ":" in str(text):
            hint = f" (a place in the file, in seconds): rename the column, as to clock_{name}, if it is a time of day"
        elif isinstance(text, str) and re.fullmatch(r"\s*\d+,\d+\s*", text):
            hint = f": write it with a decimal point, {text.strip().replace(',', '.')}"
        raise ManifestError(f"{where}: {name} must be a number >= {low:g}, got {text!r}{hint}")
    return result


def _span(where: str, row: dict[str, Any]) -> tuple[float, float | None, float | None, bool]:
    """(start, end, duration, whether the row is a part of its file), in seconds."""

    def seconds(names: tuple[str, ...], in_ms: tuple[str, ...]) -> float | None:
        found, thousandths = _number(where, row, names, 0), _number(where, row, in_ms, 0)
        if found is not None and thousandths is not None and abs(found - thousandths / 1000) > 0.002:
            raise ManifestError(f"{where}: two different values of {names[0]}: {found:g} s and {thousandths:g} ms")
        return found if thousandths is None else thousandths / 1000

    if row.get("onset") not in (None, ""):  # as in tables of sound events, where offset is the end
        given = [name for name in (*_START, *_END) if name != "offset" and row.get(name) not in (None, "")]
        if given:
            raise ManifestError(f"{where}: onset and {given[0]}: expected onset with offset, or start with end")
        for name in ("onset", "offset"):
            _number(where, row, (name,), 0)
        row = {**row, "start": row["onset"], "end": row.get("offset"), "offset": None}
    duration = seconds(_DURATION, _DURATION_MS)
    start = seconds(_START, _START_MS)
    last = row.get("end", row.get("end_time", row.get("stop")))
    if last in (-1, "-1", -1.0, "-1.0"):  # "to the end", in Kaldi's segments
        row = {**row, "end": None, "stop": None, "end_time": None}
    end = seconds(_END, _END_MS)
    if start is None and end is None:
        part = "audio_filepath" in row and duration is not None
        return 0.0, duration if part else None, duration, part
    begin = start or 0.0
    if end is None:
        if duration is None:
            duration = length_of_part(where, row, _KNOWN)
        return begin, None if duration is None else begin + duration, duration, True
    if end <= begin:
        raise ManifestError(f"{where}: the clip ends at {end:g} s, not after its start at {begin:g} s")
    if duration is None:
        if row.get("stop") not in (None, "") and end > 1000 and begin == int(begin) and end == int(end):
            raise ManifestError(
                f"{where}: start and stop, {begin:g} and {end:g}: seconds or samples? Add a column duration (seconds)"
            )
        return begin, end, end - begin, True
    ratio = (end - begin) / duration if duration > 0 else float("inf")
    if abs(end - begin - duration) <= max(0.02, 0.02 * duration):
        return begin, end, end - begin, True
    if 0.98 * 4000 <= ratio <= 400_000 and begin == int(begin) and end == int(end):
        rate = _number(where, row, _RATE, 1) or _common_rate(ratio)
        if abs(ratio / rate - 1) < 0.02:
            return begin / rate, end / rate, (end - begin) / rate, True  # samples
    if begin + duration >= end * 0.98 and row.get("audio_filepath") is None:  # of the whole file
        return begin, end, end - begin, True
    raise ManifestError(f"{where}: start {begin:g}, end {end:g} and duration {duration:g} do not fit together")


def _common_rate(ratio: float) -> float:
    rates = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
    return min(rates, key=lambda rate: abs(ratio / rate - 1))


def _flattened(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row whose values are plain: Lhotse's cut with its recording, SpeechBrain's file with start and stop."""
    nested = any(isinstance(row.get(name), dict | list) for name in ("recording", "sources"))  # text is a label
    if nested or row.get("type") in CUTS:
        return _lhotse(where, row)
    for name in ("wav", "audio", "audio_filepath"):
        inner = row.get(name)
        if isinstance(inner, dict) and ("file" in inner or "path" in inner):
            row = {**row, name: None, "path": inner.get("file", inner.get("path"))}
            row |= {key: inner[key] for key in ("start", "stop", "sampling_rate") if inner.get(key) is not None}
    if isinstance(row.get("audio"), str) and not any(name in row for name in PATH_NAMES):
        row = {**row, "path": row["audio"]}
    if "wav" in row and "length" in row and "duration" not in row:  # SpeechBrain's JSON
        row = {**row, "duration": row["length"]}
    return row


def _lhotse(where: str, row: dict[str, Any]) -> dict[str, Any]:
    kind = row.get("type", "MonoCut")
    recording = row.get("recording", row if "sources" in row else None)
    if kind not in ("MonoCut", "Recording") or not isinstance(recording, dict):
        raise ManifestError(
            f"{where}: a {kind} of Lhotse without one recording: save the audio first (CutSet.save_audios)"
        )
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or sources[0].get("type") != "file":
        raise ManifestError(f"{where}: expected a Lhotse recording in one file, got {sources!r}")
    if recording.get("transforms") or row.get("transforms"):
        raise ManifestError(f"{where}: Lhotse's transforms are not applied: save the audio first (CutSet.save_audios)")
    channels = recording.get("channel_ids") or sources[0].get("channels") or [0]
    if recording is not row and len(channels) > 1:
        raise ManifestError(f"{where}: one channel of {len(channels)} is asked for: save the audio first")
    flat: dict[str, Any] = {"path": sources[0].get("source"), "sampling_rate": recording.get("sampling_rate")}
    total = _number(where, recording, ("duration",), 0)
    if recording is row:
        return {**flat, "duration": total, "id": row.get("id")}
    start, duration = _number(where, row, ("start",), 0) or 0.0, _number(where, row, ("duration",), 0)
    if start or (duration is not None and total is not None and abs(duration - total) > 1e-6):
        flat |= {"start": start, "end": None if duration is None else start + duration}
    else:
        flat["duration"] = total
    supervisions = row.get("supervisions") or []
    if len(supervisions) == 1 and isinstance(supervisions[0], dict):
        flat |= {key: value for key, value in supervisions[0].items() if key in ("text", "speaker", "language")}
    return {**flat, "id": row.get("id")}
