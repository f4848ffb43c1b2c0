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
    """The names that a pattern stands for; a name that exists, also of a folder in front, stands for itself.

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
    above = _folders_that_exist(pattern)
    for name in (above + rest for rest in _expand_braces(pattern[len(above) :])):
        folders = _folders_that_exist(name)
        magic = _MAGIC.search(name, len(folders))
        if os.path.lexists(name) or magic is None:
            yield None, [name]
            continue
        looked_up = glob.escape(folders) + name[len(folders) :]
        fitting = sorted(path for path in glob.glob(looked_up, recursive=True) if not path.endswith(".index.json"))
        if not fitting:
            set_of_letters = "[" in name[len(folders) :]
            advice = "; [ ] stand for one of the letters between them, [[] for a bracket" if set_of_letters else ""
            raise DataError(f"no file fits {name}{advice}")
        yield os.path.dirname(name[: magic.start()]) or ".", fitting


def _folders_that_exist(pattern: str) -> str:
    """The folders that a pattern begins with, as far as they exist by these very names."""
    end = 0
    while (separator := pattern.find(os.sep, end)) >= 0 and os.path.isdir(pattern[: separator + 1]):
        end = separator + 1
    return pattern[:end]


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
