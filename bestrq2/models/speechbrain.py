"""Former place of :mod:`bestrq2.interchange.speechbrain`; its names go on working here."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("bestrq2.interchange.speechbrain"), name)
