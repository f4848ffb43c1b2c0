"""Tensors made by the package name their device and, unless the values decide it, their dtype.

``torch.set_default_dtype`` and ``torch.set_default_device`` belong to the user's program. A factory that follows them
gives a kernel a buffer of another size or place than it writes to, or degrades an exact transform.
"""

import ast
from pathlib import Path

import pytest

import bestrq2

PACKAGE = Path(bestrq2.__file__).parent
FOLDERS = [PACKAGE / name for name in ("interchange", "layers", "models", "ops")]
FOLDERS.append(PACKAGE / "kernels" if (PACKAGE / "kernels").exists() else PACKAGE.parent / "kernels")
FILES = sorted(file for folder in FOLDERS for file in folder.rglob("*.py"))
FLOATING = {"empty", "eye", "hann_window", "linspace", "ones", "rand", "randn", "zeros"}
INTEGER = {"arange", "randint", "randperm"}  # int64 unless an argument is floating
FROM_VALUES = {"as_tensor", "full", "scalar_tensor", "tensor"}


def violations(source):
    tree = ast.parse(source)
    # Parameters follow the defaults, as those of torch's own modules do.
    exempt = {
        id(inner)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "Parameter"
        for inner in ast.walk(call)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or id(call) in exempt or not isinstance(call.func, ast.Attribute):
            continue
        name = call.func.attr
        if ast.unparse(call.func.value) != "torch" or name not in FLOATING | INTEGER | FROM_VALUES:
            continue
        given = {keyword.arg for keyword in call.keywords}
        missing = {"device"} - given
        if name in FLOATING or (name in FROM_VALUES and holds_floats(call)):
            missing |= {"dtype"} - given
        if missing:
            yield f"line {call.lineno}: torch.{name} without {' and '.join(sorted(missing))}"


def holds_floats(call):
    """Return True if the values may be floating: a float literal, or a call of float."""
    return any(
        (isinstance(node, ast.Constant) and isinstance(node.value, float))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) == "float")
        for node in ast.walk(call)
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_factory_names_its_device_and_dtype(file):
    assert list(violations(file.read_text())) == []


def test_what_counts_as_a_violation():
    assert list(violations("torch.zeros(3)")) == ["line 1: torch.zeros without device and dtype"]
    assert list(violations("torch.tensor([0.5], device=d)")) == ["line 1: torch.tensor without dtype"]
    assert list(violations("nn.Parameter(torch.zeros(3))\ntorch.arange(3, device=x.device)")) == []
