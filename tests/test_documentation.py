"""Every Python block of the documentation runs, and the README's commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "bestrq2/ops/README.md"]


def blocks():
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)):
            yield pytest.param(code, id=f"{page}-{number}")


@pytest.mark.parametrize("code", list(blocks()))
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_two_commands_do_all_set_up():
    commands = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.+)\n```", (ROOT / "README.md").read_text())
    assert [name for name, _ in commands] == ["train", "test"]
    assert commands[0][1].endswith("python -m bestrq2.train")
    assert commands[1][1].endswith("pytest")


@pytest.mark.parametrize("page", [*PAGES, "kernels/README.md", "benchmarks/README.md"])
def test_paths_in_documentation_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`((?:bestrq2|kernels|csrc|tests|benchmarks)/[\w./*-]+)`", text):
        assert list(ROOT.glob(path)), f"{page} names {path}, which does not exist"
