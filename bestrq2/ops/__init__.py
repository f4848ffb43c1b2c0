"""The three fused operations, importable into any model: ``from bestrq2 import ops``."""

from . import reference
from .dispatch import BACKENDS, use_backend
from .native import available_backends
from .quantize import check_codes, quantize

__all__ = ["BACKENDS", "available_backends", "check_codes", "quantize", "reference", "use_backend"]
