"""BEST-RQ-2 pretraining of audio encoders, and the three fused operations it is made of (``bestrq2.ops``)."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

_repository = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").exists() and (_repository / "kernels" / "__init__.py").exists():
    # An uninstalled checkout: kernels/ lies beside bestrq2/ and is only mapped to bestrq2.kernels by an install.
    __path__.append(str(_repository))

_PUBLIC = {
    "BestRQ": "bestrq2.models",
    "BestRQ2": "bestrq2.models",
    "ConformerEncoder": "bestrq2.models",
    "ViTEncoder": "bestrq2.models",
    "RandomProjectionQuantizer": "bestrq2.layers",
    "LogMel": "bestrq2.layers",
    "load": "bestrq2.interchange",
}

if TYPE_CHECKING:
    from .interchange import load
    from .layers import LogMel, RandomProjectionQuantizer
    from .models import BestRQ, BestRQ2, ConformerEncoder, ViTEncoder


def __getattr__(name: str) -> Any:
    # Lazy, so that `from bestrq2 import ops` in another model pulls in nothing but the operations.
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bestrq2' has no attribute {name!r}")


__all__ = [
    "BestRQ",
    "BestRQ2",
    "ConformerEncoder",
    "LogMel",
    "RandomProjectionQuantizer",
    "ViTEncoder",
    "__version__",
    "load",
]
