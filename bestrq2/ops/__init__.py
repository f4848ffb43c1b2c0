"""The three fused operations, importable into any model: ``from bestrq2 import ops``."""

from . import reference
from .dispatch import BACKENDS, use_backend

__all__ = ["BACKENDS", "reference", "use_backend"]
