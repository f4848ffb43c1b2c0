"""BEST-RQ-2 pretraining of audio encoders, and the three fused operations it is made of (``bestrq2.ops``)."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from .version import __version__

_repository = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).resolve().parent / "kernels").exists() and (_repository / "kernels" / "__init__.py").exists():
    # An uninstalled checkout: kernels/ lies beside bestrq2/ and is only mapped to bestrq2.kernels by an install.
    __path__.append(str(_repository))

# Name -> the module that has it; None: a module itself.
_PUBLIC = {
    "BestRQ": "bestrq2.models",
    "BestRQ2": "bestrq2.models",
    "BestRQError": "bestrq2.errors",
    "ConformerEncoder": "bestrq2.models",
    "LogMel": "bestrq2.layers",
    "PretrainableEncoder": "bestrq2.models",
    "RandomProjectionQuantizer": "bestrq2.layers",
    "ViTEncoder": "bestrq2.models",
    "data": None,
    "layers": None,
    "load": "bestrq2.interchange",
    "models": None,
    "ops": None,
}

if _TYPE_CHECKING:
    from . import data, layers, models, ops
    from .errors import BestRQError
    from .interchange import load
    from .layers import LogMel, RandomProjectionQuantizer
    from .models import BestRQ, BestRQ2, ConformerEncoder, PretrainableEncoder, ViTEncoder


def __getattr__(name: str) -> _Any:
    # Lazy, so that `from bestrq2 import ops` in another model pulls in nothing but the operations.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bestrq2' has no attribute {name!r}")
    home = _PUBLIC[name]
    return _import_module(f"bestrq2.{name}") if home is None else getattr(_import_module(home), name)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "BestRQ",
    "BestRQ2",
    "BestRQError",
    "ConformerEncoder",
    "LogMel",
    "PretrainableEncoder",
    "RandomProjectionQuantizer",
    "ViTEncoder",
    "__version__",
    "data",
    "layers",
    "load",
    "models",
    "ops",
]
