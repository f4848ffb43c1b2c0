"""Alias of :mod:`bestrq2.interchange.speechbrain`, kept for old imports."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("bestrq2.interchange.speechbrain"), name)
