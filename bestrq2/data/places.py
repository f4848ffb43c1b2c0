"""Columns that may say which part of a file a row stands for, and are none of those that are read.

Such a row would be taken as the whole file without a word, so it is refused. A label that only resembles a place
(``end_reason``, ``left`` alone, ``timestamp`` of a day) stays a label.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from math import isfinite
from typing import Any

from bestrq2.errors import ManifestError

# Names such as start_sample, "Start (s)", clip_end, frameOffset: words of the first kind, beside none but the second.
_PLACES = (
    r"(?:start|begin|beg|onset|offset|end|stop|from|to|tmin|tmax|xmin|xmax|tstart|tend|tbegin|tstop|starttime|endtime|"
    r"begintime|stoptime)"
)
_UNITS = (
    r"(?:s|secs?|seconds?|ms|msecs?|millis|milliseconds?|t|times?|timestamp|samples?|frames?|idx|index|pos|position|"
    r"segment|seg|clip|audio|file|utterance|utt|chunk|crop|in|of)"
)
_PLACE = re.compile(rf"(?:{_UNITS} )*{_PLACES}(?: {_PLACES}| {_UNITS})*")
# A place only together, and only if the first is below the second.
_PAIRS = (
    ("t0", "t1"),
    ("left", "right"),
    ("cue_in", "cue_out"),
    ("in_point", "out_point"),
    ("min_time", "max_time"),
    ("time_min", "time_max"),
    ("first_sample", "last_sample"),
    ("first_frame", "last_frame"),
)
# Two numbers, or objects with a start, under one name; CSV has them as text in brackets.
_NESTED = frozenset(
    f"{name}{s}"
    for name in ("segment", "timestamp", "interval", "span", "time_range", "region", "window", "bound")
    for s in ("", "s")
) | {"boundaries"}
# Options of SpeechBrain's reader, such as "start:10000 stop:26000" in samples.
_OPTIONS = "wav_opts"
_BRACKETS = re.compile(r"\s*[\[(]\s*([\d.]+)\s*[,;\s]\s*([\d.]+)\s*[\])]\s*")

# The length of a part: in seconds or milliseconds where the name tells it, else in what the name leaves open.
_OF_A_PART = r"(?:(?:audio|clip|segment|seg|chunk|crop|utterance|utt) )*"
_SECONDS = re.compile(rf"{_OF_A_PART}(?:(?:length|len|duration|dur) (?:in )?(?:secs?|seconds?)|(?:duration|dur) s)")
_MILLISECONDS = re.compile(rf"{_OF_A_PART}(?:length|len|duration|dur) (?:in )?(?:ms|msecs?|millis|milliseconds?)")
_OPEN = re.compile(
    rf"{_OF_A_PART}(?:(?:length|len|duration|dur)(?: (?:in )?(?:s|samples?|frames?))?|"
    r"(?:(?:number|num|nb|no|n) (?:of )?)?(?:samples|frames)|(?:num|nb|n)(?:samples|frames))"
)


@lru_cache(4096)
def _words(column: str) -> str:
    return " ".join(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower()))


@lru_cache(4096)
def is_like_a_place(column: str) -> bool:
    """Return True for a name that, over a number, says where a part begins or ends."""
    return _PLACE.fullmatch(_words(column)) is not None


@lru_cache(4096)
def is_a_length(column: str) -> bool:
    """Return True for a name that says how long a part is, in any unit."""
    return any(form.fullmatch(_words(column)) for form in (_SECONDS, _MILLISECONDS, _OPEN))


def may_hold_a_place(column: str) -> bool:
    """Return True for all names that this module looks at."""
    name = column.strip().lower()
    return (
        name == _OPTIONS
        or name in _NESTED
        or any(name in pair for pair in _PAIRS)
        or is_like_a_place(column)
        or is_a_length(column)
    )


def check_places(where: str, row: dict[str, Any], known: Iterable[str], placed: bool) -> None:
    """Refuse a row that may stand for a part of its file in a form that is not read.

    Args:
        known: names that are read, in lower case.
        placed: the row states its part in columns that are read. Pairs and lists then are labels.

    Raises:
        ManifestError: it names the column.
    """
    places, pairs, lists = _suspects(tuple(row))
    for name in places:
        if name.strip().lower() not in known and _number(row[name]) is not None:
            raise _refused(where, name, row[name])
    if isinstance(options := row.get(_OPTIONS), str) and options.strip():
        raise _refused(where, _OPTIONS, options)
    if placed:
        return
    for first, second in pairs:
        low, high = _finite(row[first]), _finite(row[second])
        marks = (low, high) == (0, 1) and first.strip().lower() == "left"  # which side, in a table of 0 and 1
        if low is not None and high is not None and 0 <= low < high and not marks:
            raise _refused(where, f"{first} and {second}", (low, high))
    for name in lists:
        if _is_a_span(row[name]):
            raise _refused(where, name, row[name])


@lru_cache(256)
def _suspects(columns: tuple[str, ...]) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """The columns that are like a place, in pairs, or with lists, whatever their values."""
    names = {name.strip().lower(): name for name in columns}
    pairs = [(names[first], names[second]) for first, second in _PAIRS if first in names and second in names]
    return (
        [name for name in columns if is_like_a_place(name)],
        pairs,
        [names[name] for name in names if name in _NESTED],
    )


def _refused(where: str, name: str, value: Any) -> ManifestError:
    shown = repr(value)
    return ManifestError(
        f"{where}: {name} = {shown if len(shown) < 80 else shown[:80] + ' ...'} may stand for a part of the file: name "
        "the column start or end, in seconds, or start_ms or end_ms, or remove it"
    )


def _is_a_span(value: Any) -> bool:
    if isinstance(value, str):
        found = _BRACKETS.fullmatch(value)
        return found is not None and _is_a_span([_finite(text) for text in found.groups()])
    if isinstance(value, dict):
        return any(is_like_a_place(str(name)) and _finite(value[name]) is not None for name in value)
    if not isinstance(value, list | tuple):
        return False
    if len(value) == 2 and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        return 0 <= value[0] < value[1]
    return any(isinstance(item, dict | list | tuple) and _is_a_span(item) for item in value)


def length_of_part(where: str, row: dict[str, Any], known: Iterable[str]) -> float | None:
    """The length of the part of a row, in seconds, for a row with a start that has neither end nor duration.

    Raises:
        ManifestError: for a length whose unit its name leaves open, for two that differ, and for one that is negative,
            NaN or infinite.
    """
    lengths = {name: _finite(row[name]) for name in row if is_a_length(name) and name.strip().lower() not in known}
    found: dict[str, float] = {}
    for name, number in lengths.items():
        unit = 1 if _SECONDS.fullmatch(_words(name)) else 1000 if _MILLISECONDS.fullmatch(_words(name)) else None
        if unit and number is not None:
            found[name] = number / unit
        elif unit and _number(row[name]) is not None:
            raise ManifestError(f"{where}: {name} must be a number > 0, got {row[name]!r}")
    for name, length in found.items():
        if length <= 0:
            raise ManifestError(f"{where}: {name} must be a number > 0, got {row[name]!r}")
        first, other = next(iter(found.items()))
        if abs(length - other) > 0.002:
            raise ManifestError(f"{where}: {first} and {name} differ: {other:g} s and {length:g} s")
    unsure = next((name for name, number in lengths.items() if number is not None), None)
    if unsure is not None and not found:
        raise ManifestError(
            f"{where}: {unsure} = {row[unsure]!r} beside a start may count seconds or samples, or be that of the whole "
            "file: name it duration, in seconds, or give end, or remove it"
        )
    return next(iter(found.values()), None)


def _number(value: Any) -> float | None:
    """The number that a cell has, as text or in JSON, be it NaN, or None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _finite(value: Any) -> float | None:
    number = _number(value)
    return number if number is not None and isfinite(number) else None
