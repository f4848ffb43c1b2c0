"""Every key of a configuration with its value and one line about it, from comments and docstrings of the sections."""

import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from .sections import Config
from .text import write_yaml

__all__ = ["describe", "explanations", "shown"]


def describe(config: Config) -> str:
    """One line for each key: ``section.key: value  # explanation``."""
    rows = [(f"{key}: {shown(value)}", about) for key, value, about in explanations(config)]
    width = max(len(left) for left, _ in rows if len(left) <= 60)
    return "\n".join(f"{left:{width}}  # {about}" if about else left for left, about in rows)


def explanations(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, one line about it) of every key below a section."""
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            yield from explanations(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, value, _explanation(type(section), entry.name)


def shown(value: Any) -> str:
    """A value as it is written in YAML and behind ``key=``, on one line."""
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return write_yaml({"": value}).partition(":")[2].strip()


def _explanation(section: type, name: str) -> str:
    """Documentation of a field, from the class that defines it or one that it inherits the field from."""
    for kind in section.__mro__:
        if is_dataclass(kind) and (found := _sayings(kind).get(name)):
            return found
    return ""


@cache
def _sayings(section: type) -> dict[str, str]:
    """Field -> the comment beside or above it in the source, else its entry under "Attributes:" in the docstring."""
    found = _attributes(inspect.cleandoc(section.__doc__ or ""))
    module = sys.modules[section.__module__]
    try:
        source = inspect.getsource(module)
    except OSError:  # compiled files alone
        return found
    comments: dict[int, tuple[str, bool]] = {}  # line -> text, whether it has the line for itself
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            comments[token.start[0]] = token.string.lstrip("# ").strip(), alone
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == section.__name__:
            for entry in node.body:
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                    lines = range(entry.lineno, (entry.end_lineno or entry.lineno) + 1)
                    words = [comments[line][0] for line in lines if line in comments]
                    above = entry.lineno - 1
                    while not words and comments.get(above, ("", False))[1]:
                        above -= 1
                    if not words:
                        words = [comments[line][0] for line in range(above + 1, entry.lineno)]
                    if words:
                        found[entry.target.id] = " ".join(words)
    return found


def _attributes(docstring: str) -> dict[str, str]:
    _, heading, rest = docstring.partition("Attributes:\n")
    if not heading:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in rest.splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return found
