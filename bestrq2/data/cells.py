"""Values of rows: JSON is read strictly, and values become text of a table or numbers and text that JSON has."""

import json
from collections import Counter
from math import isfinite, isnan
from typing import Any

__all__ = ["TwiceError", "as_cell", "as_json", "read_json"]


class TwiceError(Exception):
    """A name is there twice in one JSON object: json would keep the last value without a word."""


def read_json(text: str) -> Any:
    """The value of a JSON text. ``NaN`` and ``Infinity``, which Python's writers leave there, are numbers.

    Raises:
        TwiceError: it names what is there twice.
        ValueError: it is no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise TwiceError(f"{name!r} is there twice in one object")
    return found


def as_json(value: Any) -> Any:
    """The value with what no JSON has replaced, also in lists and objects: NaN by null, infinity by the text "inf"."""
    if isinstance(value, float) and not isfinite(value):
        return None if isnan(value) else str(value)
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def as_cell(value: Any) -> str:
    """A value as the text of a cell or a label: lists and objects as JSON, nothing for null and NaN."""
    value = as_json(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "" if value is None else str(value)
