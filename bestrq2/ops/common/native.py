"""Access to compiled code: the C++/CUDA extension ``bestrq2._C`` and the Triton kernels, both imported lazily."""

import hashlib
import os
import sys
import warnings
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch  # loads the OpenMP runtime whose thread pool the extension shares; must come before bestrq2._C

from bestrq2.version import __version__

from .dispatch import BACKENDS

__all__ = ["available_backends", "extension", "extension_obstacle", "triton_interpreted", "triton_obstacle"]


def _import_installed() -> ModuleType:
    """Import the extension of the *installed* bestrq2 of the same version.

    `python -m bestrq2.train` inside a clone imports the clone's Python files, while `pip install .` put the compiled
    extension into site-packages; without this, that user would silently get the slow path.
    """
    # All of them: building leaves a bestrq2.egg-info without compiled files in the clone, and that is found first.
    for distribution in metadata.distributions(name="bestrq2"):
        if distribution.version != __version__:
            continue
        for file in distribution.files or ():
            path = Path(str(file.locate()))
            if file.parts[0] == "bestrq2" and file.name.startswith("_C.") and path.exists():
                spec = spec_from_file_location("bestrq2._C", path)
                if spec and spec.loader:
                    module = module_from_spec(spec)
                    spec.loader.exec_module(module)
                    sys.modules["bestrq2._C"] = module
                    return module
    raise ModuleNotFoundError("no installed extension of this version", name="bestrq2._C")


def _digest(csrc: Path) -> str:
    """Digest of the C++ and CUDA sources, as CMakeLists.txt writes it into the extension."""
    sources = {
        path.relative_to(csrc).as_posix(): path for path in csrc.rglob("*") if path.suffix in (".cpp", ".h", ".cu")
    }
    lines = (f"{name} {hashlib.sha256(sources[name].read_bytes()).hexdigest()}\n" for name in sorted(sources))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def stale(module: ModuleType, csrc: Path) -> str | None:
    """Reason why the extension does not match the sources in ``csrc``, or None (also if there are no sources).

    An extension of an older build has the same version number; its functions may take other arguments or mean other
    things by them. An installed package has no sources beside it and is installed as one.
    """
    if not (csrc / "bindings.cpp").exists() or getattr(module, "sources", None) == _digest(csrc):
        return None
    return (
        f"the C++ extension {module.__file__} was built from other sources than those in {csrc}; build it again: "
        "`pip install .`, or `python setup.py build_ext --inplace` in a checkout that is not installed"
    )


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    reason: str | None
    try:
        try:
            module = import_module("bestrq2._C")
        except ModuleNotFoundError as error:
            if error.name != "bestrq2._C":
                raise
            module = _import_installed()
    except ModuleNotFoundError:
        return None, "the C++ extension is not built (`pip install .` builds it where a C++ compiler is found)"
    except ImportError as error:
        reason = f"the C++ extension does not load: {error}"
    else:
        reason = stale(module, Path(__file__).resolve().parents[3] / "csrc")
        if reason is None:
            return module, None
    # Loud, because what follows is the slow path.
    warnings.warn(f"bestrq2: {reason}. Until then plain PyTorch is used.", RuntimeWarning, stacklevel=3)
    return None, reason


def extension() -> ModuleType:
    """Return ``bestrq2._C``; only call it when :func:`extension_obstacle` returned None."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    return module


def extension_obstacle(*, cuda: bool = False) -> str | None:
    """Reason why the extension (with ``cuda``: its CUDA part) cannot be used here, or None."""
    module, reason = _load()
    if module is None:
        return reason
    if cuda and not module.has_cuda:
        return "the C++ extension was built without CUDA (no nvcc when bestrq2 was installed)"
    return None


def triton_interpreted() -> bool:
    """Return True if Triton kernels run in its CPU interpreter (``TRITON_INTERPRET=1``), as tests without a GPU do."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def triton_obstacle(device: torch.device) -> str | None:
    """Reason why Triton cannot run on tensors of ``device``, or None."""
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and triton_interpreted()):
        return None
    return f"Triton needs CUDA tensors (or TRITON_INTERPRET=1 for CPU tensors), got {device.type!r}"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run, fastest first; ``"reference"`` always can.

    One operation may lack one of them, or a call may not suit it: asking for it then says why.
    """
    cuda = torch.cuda.is_available()
    usable = {
        "triton": triton_obstacle(torch.device("cuda" if cuda else "cpu")) is None,
        "cuda": cuda and extension_obstacle(cuda=True) is None,
        "cpu": extension_obstacle() is None,
        "reference": True,
    }
    return tuple(name for name in BACKENDS if usable[name])
