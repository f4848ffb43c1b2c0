"""Patterns of names: braces are written out, ``*``, ``?`` and ``[`` are looked up."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

from bestrq2.data.files import split_address
from bestrq2.errors import DataError

__all__ = ["expand", "expand_pattern"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_LARGEST_PATTERN = 1_000_000
_MAGIC = re.compile(r"[*?[]")


def expand_pattern(pattern: str) -> list[str]:
    """The names that a pattern stands for; a name that exists stands for itself.

    >>> expand_pattern("shards-{008..010}.tar")
    ['shards-008.tar', 'shards-009.tar', 'shards-010.tar']

    Raises:
        DataError: nothing fits a pattern with ``*``, ``?`` or ``[``, or it stands for over a million names.
    """
    return [name for _, names in expand(pattern) for name in names]


def expand(pattern: str) -> Iterator[tuple[str | None, list[str]]]:
    """Names as in :func:`expand_pattern`, with the folder in which those with ``*``, ``?`` or ``[`` were looked up."""
    if os.path.lexists(pattern) or split_address(pattern):
        yield None, [pattern]
        return
    for name in _expand_braces(pattern):
        if os.path.lexists(name) or (magic := _MAGIC.search(name)) is None:
            yield None, [name]
            continue
        fitting = sorted(path for path in glob.glob(name, recursive=True) if not path.endswith(".index.json"))
        if not fitting:
            raise DataError(f"no file fits {name}")
        yield os.path.dirname(name[: magic.start()]) or ".", fitting


def _expand_braces(pattern: str) -> list[str]:
    pieces = _BRACES.split(pattern)  # text, inside of braces, text, ...
    choices: list[list[str]] = []
    total = 1
    for number, piece in enumerate(pieces):
        if number % 2 == 0:
            choices.append([piece])
            continue
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            total *= max(1, abs(last - first) + 1)
        elif "," in piece:
            total *= piece.count(",") + 1
        if total > _LARGEST_PATTERN:
            raise DataError(f"{pattern} stands for over {_LARGEST_PATTERN:,} names")
        if numbers:
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
            step = 1 if last >= first else -1
            choices.append([f"{value:0{width}d}" for value in range(first, last + step, step)])
        else:
            choices.append(piece.split(",") if "," in piece else ["{" + piece + "}"])
    return ["".join(parts) for parts in itertools.product(*choices)]
