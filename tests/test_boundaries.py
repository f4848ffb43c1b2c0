"""Dependencies point one way, files stay short, and importing the package pulls in nothing heavy."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bestrq2

ROOT = Path(__file__).resolve().parent.parent

# Each layer may import itself and those before it.
LAYERS = [
    (
        "bestrq2.version",
        "bestrq2.hashing",
        "bestrq2.errors",
        "bestrq2.encodings",
        "bestrq2.durability",
        "bestrq2.real_content",
        "bestrq2.outputs",
        "bestrq2.feature_files",
        "bestrq2.signals",
        "bestrq2.console",
        "bestrq2.charts",
        "bestrq2.command",
    ),
    ("bestrq2.kernels", "kernels"),
    ("bestrq2.ops",),
    ("bestrq2.layers",),
    ("bestrq2.config", "bestrq2.hardware", "bestrq2.data"),
    ("bestrq2.models",),
    ("bestrq2.runs",),
    ("bestrq2.interchange",),
    ("bestrq2.training", "bestrq2.probing"),
    (
        "bestrq2.train",
        "bestrq2.embed",
        "bestrq2.stats",
        "bestrq2.export",
        "bestrq2.probe",
        "bestrq2.stream",
        "bestrq2.report",
        "bestrq2.manifest",
        "bestrq2.shards",
        "bestrq2.cache",
        "bestrq2.__main__",
    ),
]
FILES = sorted([*(ROOT / "bestrq2").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
ALL_FILES = sorted(
    path for folder in ("bestrq2", "kernels", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int | None:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    return None


def imports(path: Path):
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = module_name(path)
    if own in ("bestrq2", "bestrq2.recipes"):
        return  # the package itself re-exports lazily
    assert rank(own) is not None, f"{own} has no place in LAYERS"
    for imported in imports(path):
        if rank(imported) is not None:
            assert rank(imported) <= rank(own), f"{own} imports {imported}"
    if own.startswith("kernels"):
        outside = {name.split(".")[0] for name in imports(path)} - {"torch", "triton", "kernels"}
        assert outside <= set(sys.stdlib_module_names), f"{own} imports {outside}"


def test_every_module_has_a_public_name():
    """A part that one layer takes from another is not private; an underscore would say that it is."""
    private = [f for f in FILES if any(re.match("_[^_]", part) for part in f.relative_to(ROOT).parts)]
    assert not private


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one node that reach each other (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in order:
            visit(node)
    return groups


def test_cycles_are_found():
    assert strongly_connected({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_no_file_imports_itself_through_others():
    """Imports inside of functions and for type checkers count; a package's __init__ only hands names on."""
    modules = {
        module_name(path).replace("kernels", "bestrq2.kernels", 1): path for path in FILES if "kernels" in path.parts
    }
    modules |= {module_name(path): path for path in FILES if "kernels" not in path.parts}
    files = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for imported in imports(path):
            imported = imported.replace("kernels", "bestrq2.kernels", 1) if imported.startswith("kernels") else imported
            if imported in files and imported != name:
                graph[name].add(imported)
    assert sum(map(len, graph.values())) > 100
    assert strongly_connected(graph) == []


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 420


def test_only_commands_print():
    """A program that uses the library gets nothing on its standard output; the log is what it may show."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if path.parent != ROOT / "bestrq2"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and not any(keyword.arg == "file" for keyword in node.keywords)
    ]
    assert not found


def test_importing_the_operations_is_light():
    heavy = ("triton", "soundfile", "matplotlib", "omegaconf")
    code = f"import sys, bestrq2.ops; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_models_imports_no_compiler():
    """It takes as long as torch itself."""
    heavy = ("torch._dynamo", "triton", "sympy", "matplotlib")
    names = f"import sys, bestrq2, bestrq2.embed; [getattr(bestrq2, name) for name in {bestrq2.__all__}]"
    code = f"{names}; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_package_shows_its_public_names_and_nothing_else():
    code = "import bestrq2; bestrq2.ops.quantize; print(dir(bestrq2) == sorted(bestrq2.__all__), dir(bestrq2))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("True"), result.stdout
    for name in bestrq2.__all__:
        assert getattr(bestrq2, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'op'"):
        bestrq2.op  # noqa: B018 (the access itself fails)


def test_every_folder_of_the_package_is_installed():
    """Setuptools takes folders with an ``__init__.py`` only, and a file that git ignores is not in a clone."""
    folders = {path.parent for folder in ("bestrq2", "kernels") for path in (ROOT / folder).rglob("*.py")}
    missing = [str(f.relative_to(ROOT)) for f in sorted(folders) if not (f / "__init__.py").exists()]
    assert not missing
    ignored = subprocess.run(
        ["git", "check-ignore", *(str(f / "__init__.py") for f in folders)], cwd=ROOT, capture_output=True, text=True
    )
    assert not ignored.stdout


def test_nothing_else_stands_at_the_top():
    """Files of a trial were once committed beside the package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a clone and git")
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:  # as for a clone of another user
        pytest.skip(f"git ls-files: {result.stderr}")
    listed = [name for name in result.stdout.split("\n") if name and not name.startswith(".")]
    folders = {name.split("/")[0] for name in listed if "/" in name}
    files = {name for name in listed if "/" not in name}
    assert folders == {"benchmarks", "bestrq2", "csrc", "docs", "kernels", "tests"}
    assert {name for name in files if name.split(".")[-1] not in ("md", "toml", "txt", "cff")} == {
        "LICENSE",
        "setup.py",
    }
