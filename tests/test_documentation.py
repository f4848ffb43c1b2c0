"""The documentation: Python blocks run, command lines are accepted, paths and links exist, the README stays short."""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

import pytest

from bestrq2.config import Config, load_config
from bestrq2.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "bestrq2/ops/*.md", "kernels/*.md")
    for path in ROOT.glob(pattern)
)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def examples():
    for page in PAGES:
        for number, code in enumerate(code_of(page, "python")):
            yield pytest.param(code, id=f"{page}-{number}")


@pytest.mark.parametrize("code", list(examples()))
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def commands():
    """Every command of every page, without the comment behind it."""
    for page in PAGES:
        for block in code_of(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                for chained in shlex.join(shlex.split(line, comments=True)).split(" '&&' "):
                    words = shlex.split(chained)
                    if words:
                        yield pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")


class Accepted(Exception):
    """Raised in place of running a command whose arguments are accepted."""


@pytest.fixture
def only_parse(monkeypatch):
    def accept(parse):
        def parsed(parser, arguments=None, namespace=None):
            raise Accepted(parse(parser, arguments, namespace))

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, accept(getattr(argparse.ArgumentParser, name)))


def program(words):
    """The words from the program on, behind torchrun and its options, or None if the program is not ours."""
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[:2] == ["python", "-m"] and words[2].startswith("bestrq2"):
        return words[2:]
    if words[0] == "bestrq2":
        return ["bestrq2.__main__", *words[1:]]
    if words[0] == "python" and words[1].endswith(".py"):
        return words[1:]
    return None


def run_as_main(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, about modules imported before
        if name.endswith(".py"):
            runpy.run_path(str(ROOT / name), run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("words", list(commands()))
def test_command_line_is_accepted(words, only_parse, monkeypatch):
    ours = program(words)
    if ours is None:  # an environment, pip, pytest, CI
        assert words[0] in ("python3", ".", ".ci/run", "pytest", "pip"), f"no check for {words[0]}"
        return
    name, *arguments = ours
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))  # scripts change it
    with pytest.raises(Accepted) as accepted:
        run_as_main(name)
    options = accepted.value.args[0]
    if hasattr(options, "overrides"):
        recipe = getattr(options, "config", None)
        load_config(recipe if recipe and not recipe.endswith(".yaml") else "best_rq2_tiny", options.overrides)


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_prose_exist(page):
    load_config("best_rq2_tiny", re.findall(r"`([a-z_]+(?:\.[a-z_]+)+=[^`\s]+)`", text_of(page)))
    sections = "|".join(field.name for field in fields(Config))
    for key in re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)`", text_of(page)):
        attrgetter(key)(Config())


def test_two_commands_do_all_set_up():
    found = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.+)\n```", text_of("README.md"))
    assert [name for name, _ in found] == ["train", "test"]
    assert found[0][1].endswith("python -m bestrq2.train")
    assert found[1][1].endswith("pytest")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    for path in re.findall(r"`((?:bestrq2|kernels|csrc|tests|benchmarks|docs)/[\w./*-]+)`", text_of(page)):
        assert list(ROOT.glob(path)), f"{page} names {path}, which does not exist"


def anchors(path):
    return {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page} links to {target}"


def prose_of(page):
    """Paragraphs and list items, without code, tables, headings, comments and link targets."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n", text_of(page), flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|^#.*$|^\|.*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"^\s*(?:-|\d+\.) ", "\n\n", text, flags=re.MULTILINE)


def sentences_of(page):
    paragraphs = re.split(r"\n\s*\n", prose_of(page))
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+", " ".join(p.split())) if s]
    return [len(sentence.split()) for sentence in sentences]


def test_readme_is_short():
    text = text_of("README.md")
    assert len(text.split()) < 700
    assert max(sentences_of("README.md")) <= 35


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])
def test_sentences_are_short(page):
    lengths = sentences_of(page)
    assert sum(lengths) / len(lengths) < (18 if page == "README.md" else 20)


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_prose_are_short(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]
    assert not long, f"{page}: lines of more than 120 columns: {long}"


def test_list_of_files_is_the_present_one():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    assert tree.PAGE.read_text(encoding="utf-8") == tree.page(), "run: python docs/tree.py"


def test_version_is_the_same_everywhere():
    assert re.search(r"^version: (.+)$", text_of("CITATION.cff"), re.MULTILINE).group(1) == __version__
    assert f"## {__version__} (" in text_of("CHANGELOG.md")
