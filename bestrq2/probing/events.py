"""Labels with onset and offset: their table, and the grids of frames and segments they are scored on.

A frame i of hop h covers the seconds ``i h .. (i + 1) h``. It has a label if its centre lies in an event; an event that
covers no centre marks the frame its own middle lies in, so that none disappears on a coarse grid.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.data import AudioFile, ManifestError
from bestrq2.data.tables import rows_of
from bestrq2.errors import counted, printable

_DECIMALS = 6  # of a frame or segment: below, a quotient is rounding
_COLUMNS = {
    "path": ("path", "audio_filepath", "file", "filename"),
    "onset": ("onset", "start"),
    "offset": ("offset", "end"),
    "label": ("label", "event_label"),
}


@dataclass
class EventTable:
    """``of_clip``: of every clip ``(E, 3)`` rows of onset, offset (seconds) and class."""

    classes: list[str]
    of_clip: list[np.ndarray]
    warnings: list[str]


def read_events(table: str | os.PathLike[str], files: Sequence[AudioFile], manifest: Path) -> EventTable:
    """Events of the clips, from a table (CSV, TSV or JSON lines) with columns path (or file, filename), onset (or
    start), offset (or end) and label (or event_label).

    Paths are relative to the table's folder, or to the manifest's, or absolute. A row without onset, offset and label
    says that a clip has no event, as does the absence of rows. A file that the manifest lists twice has them twice.

    Raises:
        ManifestError: for a missing column, a row that is no event, a table none of whose paths is in the manifest, or
            a clip that begins inside of its file: whether its onsets are those of the file is not known.
        OSError: if it cannot be read.
    """
    source = Path(table)
    number: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        if file.start > 0:
            raise ManifestError(
                f"{manifest}: {printable(file.path)} from {file.start:g} s on: onsets count from the beginning of a "
                "file; write such a clip to a file of its own"
            )
        number.setdefault(os.path.abspath(file.path), []).append(i)
    found: list[list[tuple[float, float, str]]] = [[] for _ in files]
    foreign = rows = 0
    table_rows = rows_of(source)
    header = list(dict.fromkeys(name for _, row in table_rows for name in row))  # in JSON lines a row may lack some
    names = {}
    for column, choices in _COLUMNS.items():
        names[column] = next((name for name in choices if name in header), "")
        if not names[column]:
            raise ManifestError(f"{source}: no column {column!r} (or {', '.join(choices[1:])}), only {header}")
    for line, row in table_rows:
        rows += 1
        path = str(row.get(names["path"]) or "")
        places = (os.path.abspath(os.path.join(folder, path)) for folder in (source.parent, manifest.parent))
        clips = next((number[place] for place in places if place in number), None)
        event = _event(f"{source}:{line}", *(row.get(names[name]) for name in ("onset", "offset", "label")))
        if clips is None:
            foreign += 1
        elif event is not None:
            for clip in clips:
                found[clip].append(event)
    classes = sorted({label for events in found for _, _, label in events})
    if not classes:
        raise ManifestError(f"{source}: none of its {rows} rows is an event of a clip in {manifest}")
    of_clip = [
        np.array([(on, off, classes.index(label)) for on, off, label in events], dtype=np.float64).reshape(-1, 3)
        for events in found
    ]
    return EventTable(
        classes, of_clip, [f"{counted(foreign, 'event')} of files that the manifest lacks"] if foreign else []
    )


def _event(where: str, *values: Any) -> tuple[float, float, str] | None:
    """Onset, offset and label of a row, as text or, in JSON, as numbers."""
    cells = ["" if value is None else str(value).strip() for value in values]
    if not any(cells):
        return None
    try:
        begin, end = float(cells[0]), float(cells[1])
    except ValueError as error:
        hint = "; write decimals with a point" if any("," in cell for cell in cells[:2]) else ""
        raise ManifestError(
            f"{where}: onset and offset must be seconds, got {cells[0]!r} and {cells[1]!r}{hint}"
        ) from error
    if not (isfinite(begin) and isfinite(end) and 0 <= begin < end and cells[2]):
        raise ManifestError(f"{where}: expected 0 <= onset < offset and a label, got {cells}")
    return begin, end, cells[2]


def behind_the_end(events: Sequence[np.ndarray], seconds: Sequence[float], paths: Sequence[str]) -> list[str]:
    """A warning of events that begin at or after the end of their clip, which no frame can have."""
    lost = [int((rows[:, 0] >= length).sum()) for rows, length in zip(events, seconds)]
    if not any(lost):
        return []
    first = next(number for number, count in enumerate(lost) if count)
    onset = events[first][:, 0].max()
    return [
        f"{counted(sum(lost), 'event')} of {sum(map(len, events))} left out: they begin behind the end of their clip, "
        f"as at {onset:g} in {printable(paths[first])} of {seconds[first]:.3g} s; onset and offset are in seconds"
    ]


def frame_labels(events: np.ndarray, num_frames: int, hop: float, num_classes: int) -> np.ndarray:
    """``(E, 3)`` events -> ``(T, C)`` bool for frames of ``hop`` seconds. What lies behind the last frame is lost."""
    labels = np.zeros((num_frames, num_classes), dtype=bool)
    for onset, offset, number in events:
        first, last = (ceil(_exact(time / hop) - 0.5) for time in (onset, offset))  # centres in onset <= t < offset
        if first >= last:
            first = int(_exact((onset + offset) / 2 / hop))
            last = first + 1
        labels[first:last, int(number)] = True
    return labels


def segment_labels(events: np.ndarray, seconds: float, segment: float, num_classes: int) -> np.ndarray:
    """``(S, C)`` bool: whether any part of an event lies in the segment. The last segment may be shorter."""
    labels = np.zeros((num_segments(seconds, segment), num_classes), dtype=bool)
    for onset, offset, number in events:
        labels[int(_exact(onset / segment)) : ceil(_exact(offset / segment)), int(number)] = True
    return labels


def segment_decisions(active: np.ndarray, hop: float, seconds: float, segment: float) -> np.ndarray:
    """``(T, C)`` decisions on frames -> ``(S, C)``: whether any frame whose centre lies in the segment is active."""
    decisions = np.zeros((num_segments(seconds, segment), active.shape[1]), dtype=bool)
    centres = np.round((np.arange(len(active)) + 0.5) * hop / segment, _DECIMALS)
    place = centres.astype(np.int64).clip(max=len(decisions) - 1)
    np.logical_or.at(decisions, place, active)
    return decisions


def num_segments(seconds: float, segment: float) -> int:
    return max(1, ceil(_exact(seconds / segment)))


def _exact(quotient: float) -> float:
    """A time in frames or segments without its rounding: 0.3 / 0.1 is below 3, and 1.1 / 0.1 above 11."""
    return round(quotient, _DECIMALS)
