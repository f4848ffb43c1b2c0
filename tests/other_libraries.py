"""Selection of the tests that compare with other libraries: ``pytest --other-libraries`` runs these and no others.

They skip where a library is missing. CI runs them in an environment of its own, ``.ci/other_libraries``.
"""

import ast
import functools

# By the names that importorskip is given.
LIBRARIES = (
    "accelerate",
    "datasets",
    "peft",
    "s3prl",
    "speechbrain",
    "torchaudio",
    "transformers",
    "vector_quantize_pytorch",
    "xares",
    "xares_llm",
)


def _requires(node: ast.AST) -> bool:
    """Return True if there is ``importorskip("LIBRARY...")`` in a part of a module."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("importorskip") and call.args:
            name = call.args[0]
            if isinstance(name, ast.Constant) and str(name.value).split(".")[0] in LIBRARIES:
                return True
    return False


@functools.cache
def functions_of(path: str) -> frozenset[str] | None:
    """Names of a file's functions that need one of the libraries, also by another of them; None: all do."""
    with open(path, encoding="utf-8") as file:
        body = ast.parse(file.read()).body
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if any(_requires(node) for node in body if node not in functions.values()):
        return None
    found = {name for name, node in functions.items() if _requires(node)}
    while True:
        more = {
            name
            for name, node in functions.items()
            if name not in found and found & {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        }
        if not more:
            return frozenset(found)
        found |= more


def needs_other_library(item) -> bool:
    """Return True for a test that skips where one of the libraries is missing."""
    names = functions_of(str(item.path))
    if names is None:
        return True
    used = {getattr(item, "originalname", item.name), *getattr(item, "fixturenames", ())}
    return bool(names & used)
