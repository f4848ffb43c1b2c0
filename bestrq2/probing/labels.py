"""Labels of clips from a manifest. What cannot be used is counted by reason, never dropped in silence.

Letters: N clips, C classes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any
from unicodedata import category, normalize

import numpy as np

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile, ManifestError
from bestrq2.data.manifest import read_rows
from bestrq2.errors import counted, printable

from .events import read_events
from .label_cells import PLACEHOLDERS, labels_in, number_in, one_label
from .task import ProbeTask

MOST_LABELS = 10  # that an error names
TRAIN, TEST = 0, 1  # of a fixed split: gallery and queries in retrieval
OUTSIDE = "outside of --where"  # the reason of rows that were not asked for
_YES, _NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


@dataclass
class LabelledClips:
    """
    Attributes:
        files: N of them.
        targets: classification and retrieval ``(N,)`` int64 class; multilabel and events ``(N, C)`` bool, for events
            whether the class occurs; regression ``(N,)`` float64.
        classes: names, by number; empty for regression.
        groups: ``(N,)`` int64.
        parts: ``(N,)`` TRAIN or TEST, or None for cross-validation.
        events: of every clip ``(E, 3)`` float64 rows (onset, offset, class); empty unless the kind is "events".
        left_out: rows that are not here, by reason.
        warnings: what is doubtful about those that are.
    """

    files: list[AudioFile]
    targets: np.ndarray
    classes: list[str]
    groups: np.ndarray
    parts: np.ndarray | None = None
    events: list[np.ndarray] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, kept: Sequence[int] | np.ndarray) -> "LabelledClips":
        """Those clips alone, groups numbered anew."""
        kept = np.asarray(kept, dtype=np.int64)
        return replace(
            self,
            files=[self.files[i] for i in kept],
            targets=self.targets[kept],
            groups=np.unique(self.groups[kept], return_inverse=True)[1].astype(np.int64),
            parts=None if self.parts is None else self.parts[kept],
            left_out=self.left_out.copy(),
            warnings=list(self.warnings),
            events=[self.events[i] for i in kept] if self.events else [],
        )


def read_clips(task: ProbeTask) -> LabelledClips:
    """Read the manifest of a task.

    Raises:
        ManifestError: for a missing column, a group that is not given, a label that is none, or no usable row.
        ConfigError: for labels that no probe can be trained on and tested.
        OSError: if a file cannot be read.
    """
    rows = read_rows(task.path)
    known = dict.fromkeys(name for _, row in rows for name in row)
    columns = [*(task.label_columns if task.kind != "events" else ()), task.group, task.split]
    for column in [*filter(None, columns), *(name for name, _ in task.where)]:
        if column not in known:
            raise ManifestError(f"{task.path}: no column {column!r}; its columns are {list(known)}")
    left_out: Counter[str] = Counter()
    files, values, groups, parts = [], [], [], []
    for file, row in rows:
        if any(str(row.get(name)).strip() not in allowed for name, allowed in task.where):
            left_out[OUTSIDE] += 1
            continue
        part = _part(task, row, left_out)
        if part is None:
            continue
        value = _value(task, file, row)
        if value is None:
            left_out["without a label" if task.kind != "regression" else "without a finite number"] += 1
            continue
        if task.group and _missing(row.get(task.group)):
            raise ManifestError(
                f"{task.path}: {file.path} has no {task.group!r}, so nothing says which clips belong with it"
            )
        files.append(file)
        values.append(value)
        groups.append(str(row[task.group]).strip() if task.group else file.path)
        parts.append(part)
    if not files:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ManifestError(f"{task.path}: no row can be used: {reasons}")
    group_names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    numbers = numbers.astype(np.int64)
    clips = LabelledClips(files, np.zeros(0), [], numbers, np.asarray(parts) if task.split else None)
    clips.left_out = left_out
    _set_targets(clips, task, values)
    if task.kind == "multilabel" and not any(isinstance(row.get(task.label_columns[0]), list) for _, row in rows):
        clips.warnings += _doubtful_separator(clips.classes, task)
    if task.group is None and task.kind != "retrieval" and not task.split:
        clips.warnings.append("no --group: clips of one recording may lie in training and test, and scores too high")
    if task.group:
        clips.warnings += _doubtful_groups([str(name) for name in group_names])
    clips.warnings += _listed_again(clips, values, task)
    clips.warnings += _absent_values(task, [row for _, row in rows])
    if clips.parts is not None and task.group:
        shared = set(clips.groups[clips.parts == TRAIN]) & set(clips.groups[clips.parts == TEST])
        if shared and task.kind == "retrieval":
            clips.warnings.append(
                f"{counted(len(shared), 'group')} with clips in the gallery and among the queries, which find each "
                "other: groups are kept apart only without --split"
            )
        elif shared:
            clips.warnings.append(f"{counted(len(shared), 'group')} with clips in training and in test")
    if clips.parts is not None:
        sides: tuple[set[str], set[str]] = (set(), set())
        for file, side in zip(files, clips.parts):
            sides[int(side == TEST)].add(file.path)
        if both := len(sides[0] & sides[1]):
            where = "the gallery and the queries" if task.kind == "retrieval" else "training and test"
            clips.warnings.append(f"{counted(both, 'file')} both in {where}, which makes scores too high")
    return clips


def _listed_again(clips: LabelledClips, values: list[Any], task: ProbeTask) -> list[str]:
    """Warnings of clips that are listed several times on one side of a split, with one label or with several."""
    rows: dict[Any, list[int]] = {}
    for row, file in enumerate(clips.files):
        part = None if clips.parts is None else int(clips.parts[row])
        rows.setdefault((file.path, file.start, file.end, part), []).append(row)
    again = {clip: found for clip, found in rows.items() if len(found) > 1}
    if not again:
        return []
    other = [clip for clip, found in again.items() if any(values[row] != values[found[0]] for row in found)]
    # In retrieval within one list; clips of one group are not searched for each other.
    apart = task.group is None or any(len(set(clips.groups[found])) > 1 for found in again.values())
    itself = task.kind == "retrieval" and clips.parts is None and apart
    effect = ": each finds itself, and scores are too high" if itself else ""
    warnings = [f"{counted(len(again), 'clip')} listed more than once, first {printable(next(iter(again))[0])}{effect}"]
    if other:
        first = printable(other[0][0])
        warnings.append(f"{counted(len(other), 'clip')} listed with labels that contradict each other, first {first}")
    return warnings


def _absent_values(task: ProbeTask, rows: list[dict[str, Any]]) -> list[str]:
    """Warnings of values that were asked for and that no row has: misspelt, they leave out clips in silence."""
    split = [(task.split, chosen) for chosen in (task.train_values, task.test_values) if task.split and chosen]
    warnings = []
    for column, chosen in [*task.where, *split]:
        there = {str(row.get(column)).strip() for row in rows}
        warnings += [f"no row has {column} {value!r}, which was asked for" for value in chosen if value not in there]
    return warnings


def _missing(value: Any) -> bool:
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and isnan(value))
    )


def _part(task: ProbeTask, row: dict[str, Any], left_out: Counter[str]) -> int | None:
    if not task.split:
        return TEST
    retrieval = task.kind == "retrieval"
    value = "" if _missing(row.get(task.split)) else str(row[task.split]).strip()
    if value in (task.train_values or (("gallery",) if retrieval else ("train",))):
        return TRAIN
    if value in (task.test_values or (("query",) if retrieval else ("test",))):
        return TEST
    left_out[f"with {task.split} {value!r}"] += 1
    return None


def _value(task: ProbeTask, file: AudioFile, row: dict[str, Any]) -> Any:
    """The label of a row in the form of its kind, or None where there is none."""
    cells = [row.get(name) for name in task.label_columns]
    if task.kind == "events":
        return ()
    if any(_missing(cell) for cell in cells):
        return None
    if len(cells) == 1:
        read: Callable[[Any], Any] = number_in if task.kind == "regression" else one_label
        try:
            return labels_in(cells[0], task.separator) if task.kind == "multilabel" else read(cells[0])
        except ValueError as error:
            raise ManifestError(f"{task.path}: {file.path}: {task.label_columns[0]!r} {error}") from error
    chosen = []
    for name, cell in zip(task.label_columns, cells):
        text = str(cell).strip().lower()
        if text not in _YES | _NO:
            raise ManifestError(f"{task.path}: {file.path}: expected 0 or 1 in column {name!r}, got {cell!r}")
        if text in _YES:
            chosen.append(name)
    return chosen


def _set_targets(clips: LabelledClips, task: ProbeTask, values: list[Any]) -> None:
    if task.kind == "regression":
        clips.targets = np.asarray(values, dtype=np.float64)
        return
    if task.kind in ("classification", "retrieval"):
        names, numbers = np.unique(np.asarray(values), return_inverse=True)
        clips.classes, clips.targets = [str(name) for name in names], numbers.astype(np.int64)
        clips.warnings += doubtful_names(clips.classes)
        return
    if task.kind == "events":
        assert task.events is not None
        found = read_events(task.events, clips.files, task.path)
        clips.classes, clips.events = found.classes, found.of_clip
        clips.warnings += found.warnings
        values = [sorted({clips.classes[int(c)] for c in rows[:, 2]}) for rows in clips.events]
    else:
        clips.classes = (
            list(task.label_columns) if len(task.label_columns) > 1 else sorted({v for x in values for v in x})
        )
    clips.warnings += doubtful_names(clips.classes)
    number = {name: i for i, name in enumerate(clips.classes)}
    clips.targets = np.zeros((len(values), len(clips.classes)), dtype=bool)
    for row, chosen in enumerate(values):
        clips.targets[row, [number[name] for name in chosen]] = True


def _doubtful_separator(classes: Sequence[str], task: ProbeTask) -> list[str]:
    """A warning where labels contain another usual separator, so that a cell was taken for one label: most of them, or
    one with a part that is a label by itself."""
    if len(task.label_columns) > 1:
        return []
    for other in ";|,":
        joined = [name for name in classes if other in name and other != task.separator]
        telling = [name for name in joined if not {part.strip() for part in name.split(other)}.isdisjoint(classes)]
        most = 2 * len(joined) > len(classes)
        if most or telling:
            example = joined[0] if most else telling[0]
            return [_joined(example, other)]
    if task.separator != " " and _are_words_of_few(classes):
        return [_joined(next(name for name in classes if " " in name), " ")]
    return []


def _joined(example: str, separator: str) -> str:
    return f"labels such as {example!r} are taken as one: if they are several, add --separator '{separator}'"


def _are_words_of_few(classes: Sequence[str]) -> bool:
    """Return True if all labels are made of one or more words that each occur in several, fewer words than labels: as
    lists of labels are, and names such as "dog bark" are not."""
    parts = [set(name.split()) for name in classes]
    words = Counter(word for part in parts for word in part)
    return len({len(part) for part in parts}) > 1 and len(words) < len(classes) and min(words.values()) > 1


def _doubtful_groups(groups: Sequence[str]) -> list[str]:
    """Warnings of groups that may be one: their clips would lie in training and test."""
    return _warnings(groups, "groups", "not kept together")


def _warnings(names: Sequence[str], what: str, state: str) -> list[str]:
    """Warnings of at most three sets of names that are almost alike, and how many there are more."""
    found = [
        f"{what} {', '.join(map(_distinct(alike), alike))} are {state}: write them alike if they are one"
        for alike in _almost_alike(names)
    ]
    return found if len(found) <= 3 else [*found[:3], f"{len(found) - 3} more sets of {what} that are almost alike"]


def _almost_alike(names: Sequence[str]) -> list[list[str]]:
    """Sets of names that differ only in capitals, in the form of a number, in spaces, or in what cannot be seen: the
    Unicode normal form ("é" as one character or as two) and characters without width."""
    alike: dict[str, list[str]] = {}
    for name in names:
        try:
            key = repr(float(name))
        except ValueError:
            text = normalize("NFKC", normalize("NFKC", name).casefold())
            key = " ".join("".join(c for c in text if category(c) != "Cf").split())
        alike.setdefault(key, []).append(name)
    return [found for found in alike.values() if len(found) > 1]


def _distinct(names: Sequence[str]) -> Callable[[str], str]:
    """Writing of names in a message: with escapes where some would look the same."""
    return repr if len({normalize("NFC", name) for name in names}) == len(names) else ascii


def doubtful_names(classes: Sequence[str]) -> list[str]:
    """Warnings of classes that may be one (``Dog`` and ``dog``, ``1`` and ``1.0``), or stand for a missing label."""
    found = _warnings(classes, "labels", "different classes")
    missing = [name for name in classes if name.casefold() in PLACEHOLDERS]
    if missing:
        found.append(f"the label {missing[0]!r} is a class of its own: leave the field empty where a label is missing")
    return found


def check_testable(clips: LabelledClips, task: ProbeTask) -> None:
    """Refuse, before any audio is decoded, what :func:`settle` and :func:`check_sides` would refuse once it is.

    Clips that cannot be read make only fewer labels testable.

    Raises:
        ConfigError: as these.
    """
    settle(clips.take(np.arange(len(clips))), task)
    check_sides(clips, task)


def check_sides(clips: LabelledClips, task: ProbeTask) -> None:
    """
    Raises:
        ConfigError: if one side of a fixed split is empty, with the rows that were left out.
    """
    if clips.parts is None or len(np.unique(clips.parts)) > 1:
        return
    expected, sides = "training and test clips", ("training clips", "test clips")
    if task.kind == "retrieval":
        expected, sides = "a gallery and queries", ("a gallery", "queries")
    raise ConfigError(
        f"--split: expected {expected}, got only {sides[clips.parts[0]]}"
        + "".join(f"; {counted(count, 'row')} {reason}" for reason, count in clips.left_out.items())
    )


def settle(clips: LabelledClips, task: ProbeTask) -> tuple[LabelledClips, np.ndarray]:
    """The clips that a probe can be trained on and tested with, after those that cannot be read were left out.

    A class can be tested if it occurs in at least two groups, or, with a fixed split, in training and in test; a single
    label that only training has is a way to be wrong, and stays. Multi-label classes that cannot be tested are left out
    as classes, their clips stay.

    Returns:
        the clips, and their numbers among those given.

    Raises:
        ConfigError: if too little remains, or single labels cannot be tested and ``drop_rare`` is not set.
    """
    everything = np.arange(len(clips))
    if task.kind == "retrieval":
        return clips, everything
    if task.kind == "regression":
        if np.ptp(clips.targets) == 0:
            raise ConfigError(f"{task.path}: every {task.label!r} is {clips.targets[0]:g}: there is nothing to predict")
        return clips, everything
    single = task.kind == "classification"
    has = clips.targets[:, None] == np.arange(len(clips.classes)) if single else clips.targets
    testable = np.array([_testable(clips, has[:, c], single) for c in range(len(clips.classes))], dtype=bool)
    gone = [name for name, fine in zip(clips.classes, testable) if not fine]
    where = "two groups" if clips.parts is None else "training" if single else "training and test"
    if gone and single and not task.drop_rare:
        named = ", ".join(map(repr, gone[:MOST_LABELS]))
        more = f" and {len(gone) - MOST_LABELS} more" if len(gone) > MOST_LABELS else ""
        raise ConfigError(
            f"labels {named}{more} do not occur in {where}, so they cannot be tested on clips from "
            "elsewhere; choose other groups (--group) or leave these labels out (--drop-rare)"
        )
    if gone:
        clips.warnings.append(f"classes left out because they do not occur in {where}: {', '.join(gone)}")
    if testable.sum() < (2 if single else 1):
        expected = "two different labels" if single else "one label"
        without = f" without {gone}" if gone else ""
        raise ConfigError(f"{task.path}: expected at least {expected} that can be tested, got {clips.classes}{without}")
    renumber = np.cumsum(testable) - 1
    if single:
        numbers = np.flatnonzero(testable[clips.targets])
        kept = clips.take(numbers)
        if len(kept) < len(clips):
            kept.left_out["of classes that are too rare"] += len(clips) - len(kept)
        kept.targets = renumber[kept.targets].astype(np.int64)
    else:
        numbers, kept = everything, clips.take(everything)
        kept.targets = clips.targets[:, testable]
        kept.events = [rows[testable[rows[:, 2].astype(int)]].copy() for rows in clips.events]
        for rows in kept.events:
            rows[:, 2] = renumber[rows[:, 2].astype(int)]
    kept.classes = [name for name, fine in zip(clips.classes, testable) if fine]
    return kept, numbers


def _testable(clips: LabelledClips, has: np.ndarray, single: bool) -> bool:
    if clips.parts is None:
        return len(np.unique(clips.groups[has])) >= 2
    needed = (TRAIN,) if single else (TRAIN, TEST)
    return all(bool(has[clips.parts == part].any()) for part in needed)
