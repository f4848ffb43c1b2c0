"""One cell of a column with labels: a name, several names, or a number; what is none of these is refused."""

import ast
import io
import re
import tokenize
from itertools import pairwise
from math import isfinite
from typing import Any

from bestrq2.errors import printable

PLACEHOLDERS = {"nan", "none", "null", "n/a", "na", "<na>"}
_BESIDE_LABELS = PLACEHOLDERS - {"na"}  # of several labels of a clip: no label, where na may be one (a language)


def number_in(cell: Any) -> float | None:
    """The number of a cell, None if it is not finite.

    Raises:
        ValueError: for anything else, such as True or 1_2, which Python takes for 1 and 12.
    """
    try:
        if isinstance(cell, bool) or "_" in str(cell):
            raise ValueError
        number = float(cell)
    except (TypeError, ValueError) as error:
        hint = ": write decimals with a point" if re.fullmatch(r"[-+]?[\d.]*,\d+", str(cell).strip()) else ""
        raise ValueError(f"is no number: {cell!r}{hint}") from error
    return number if isfinite(number) else None


def one_label(cell: Any) -> str:
    """The label of a cell.

    Raises:
        ValueError: for a list or an object, also as text, whose brackets would be part of the name.
    """
    text = str(cell).strip()
    if isinstance(cell, list | dict) or _listed(text):
        raise ValueError(f"must be one label, got {printable(text)}; several are for --kind multilabel")
    return text


def labels_in(cell: Any, separator: str) -> list[str] | None:
    """The labels of a cell, sorted; None if it says that they are not known.

    Raises:
        ValueError: for a list that cannot be read, or a missing value beside labels.
    """
    parts = cell if isinstance(cell, list) else _split(str(cell).strip(), separator)
    if parts and all(part is None or part != part for part in parts):
        return None
    if nested := [part for part in parts if isinstance(part, list | dict)]:
        raise ValueError(f"has {printable(str(nested[0]))} in place of a label")
    names = {str(part).strip() for part in parts} - {""}
    absent = sorted(name for name in names if name.casefold() in _BESIDE_LABELS)
    if absent and len(names) > 1:
        raise ValueError(
            f"has a missing value ({absent[0]}) beside labels, got {printable(str(cell))}: leave it out, or the whole "
            "field empty if the labels are not known"
        )
    return sorted(names)


def _split(text: str, separator: str) -> list[str]:
    """The labels of a cell: between separators, or a list as JSON or Python write it.

    Raises:
        ValueError: for what looks like such a list and is none, such as one of numpy, without commas.
    """
    parts = text.split(separator)
    listed = _listed(text)
    if listed is not None:
        return listed
    in_brackets = re.fullmatch(r"[\[({].*[\])}]", text, re.DOTALL)
    cut = any(part.count(left) != part.count(right) for part in parts for left, right in ("[]", "{}"))
    bare = in_brackets and len(parts) == 1 and re.search(r"""['",]|\d\s+[-+.\d]""", text) and text[0] != "("
    quoted = in_brackets and re.match(r"""[\[({]\s*['"]""", text)
    if cut or bare or quoted or re.match(r"(array|frozenset|set|list|tuple)\(", text):
        raise ValueError(f"must be labels between {separator!r}, or a list such as ['a', 'b'], got {printable(text)}")
    return parts


def _listed(text: str) -> list[str] | None:
    """The strings, or the whole numbers, of a list, tuple or set as text; None if it is none of these."""
    try:
        values = ast.literal_eval(text)
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (SyntaxError, ValueError, tokenize.TokenError, MemoryError, RecursionError):
        return None
    if isinstance(values, str) and text[0] == "(":
        values = [values]
    if not isinstance(values, list | tuple | set) or text[0] not in "[({s":
        return None
    kinds = [kind for kind in tokens if kind not in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT)]
    joined = (tokenize.STRING, tokenize.STRING) in pairwise(kinds)  # Python joins two strings without a comma
    if joined or {type(value) for value in values} not in (set(), {str}, {int}):
        return None
    return [str(value) for value in values]
