"""Plain English in documentation, docstrings and comments: no phrases that only make sense to their author."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bestrq2", "kernels", "benchmarks", "csrc", "docs", "tests")
SUFFIXES = (".py", ".md", ".h", ".cpp", ".cu", ".cuh", ".yaml")
QUESTIONS = ("What", "How", "Which", "Where", "Whether", "Why", "Who", "Whose", "When", "If", "That")

# Pattern -> what to write instead.
PHRASES = {
    r"\bjudged\b": "reference workload",
    r"\bnobody\b": "say who or what: 'was not closed', 'unknown rank'",
    r"\bsays? so\b": "'prints a notice', 'raises an error'",
    r"\b(?:is|are|was|and) said\b": "reported",
    r"\bpassed over\b": "skipped",
    r"\briddles?\b": "an obscure error",
    r"\bthrown away\b": "discarded",
    r"\bby nature\b": "leave it out",
    r"\bblind to\b": "independent of",
    r"\bfilled up\b|\bfill up\b": "padded, pad",
    r"\bnever learns\b|\bknows? (?:of|nothing|about|that)\b": "unknown to; independent of",
    r"\bfor ever\b": "forever",
    r"\bof no meaning\b": "undefined",
    r"\bdo(?:es)? not say them\b|\bbrings along\b": "state",
}


def files():
    for folder in FOLDERS:
        yield from (
            p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES and p.name != Path(__file__).name
        )
    yield from sorted(ROOT.glob("*.md"))


def test_phrases():
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, instead in PHRASES.items():
                if match := re.search(pattern, line, re.IGNORECASE):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {match.group(0)!r}; write: {instead}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["bestrq2", "kernels", "benchmarks", "tests"])
def test_docstrings_start_with_an_imperative_or_a_noun(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").split(" ", 1)[0]
                if first in QUESTIONS:
                    found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {first} ...")
    assert not found, "\n".join(found)
