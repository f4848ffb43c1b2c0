"""The code of an encoder of somebody else: the file that is named, and the files of theirs that it uses."""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

INSTALLED = ("site-packages", "dist-packages")
LIBRARIES = ("bestrq2", "torch")  # also where they are used from a clone


def code_digest(module: ModuleType, encoder: object) -> str:
    """Digest of the file of ``module`` and of those that it, and the parts of ``encoder``, take anything from.

    Installed libraries are left out: their code belongs to their version. Empty for a module without a file.
    """
    first = _file(module)
    if first is None:
        return ""
    parts = encoder.modules() if isinstance(encoder, nn.Module) else ()
    waiting = [module, *_defining(type(part) for part in parts)]
    found: dict[str, Path] = {}
    while waiting:
        other = waiting.pop()
        file = first if other is module else _file_of_user(other)
        if file is not None and other.__name__ not in found:
            found[other.__name__] = file
            waiting += _defining(vars(other).values())
    del found[module.__name__]
    files = [first, *(found[name] for name in sorted(found))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _defining(values: Iterable[object]) -> Iterator[ModuleType]:
    """The modules among ``values``, and those that define the others."""
    for value in list(values):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and isinstance(found := sys.modules.get(name), ModuleType):
            yield found


def _file(module: ModuleType) -> Path | None:
    path = Path(getattr(module, "__file__", None) or "")
    return path.resolve() if path.is_file() else None


def _file_of_user(module: ModuleType) -> Path | None:
    """The file of a module that belongs to no library."""
    file = _file(module)
    if file is None or module.__name__.partition(".")[0] in LIBRARIES or {*INSTALLED} & {*file.parts}:
        return None
    return None if file.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve()) else file
