"""Import and export of encoders."""

from bestrq2.errors import UnknownLayoutError

from .adapters import AudioEncoder
from .loading import load, open_encoder
from .opening import OpenedModel, load_pretraining, open_source
from .published import Published, from_published, to_published

__all__ = [
    "AudioEncoder",
    "OpenedModel",
    "Published",
    "UnknownLayoutError",
    "from_published",
    "load",
    "load_pretraining",
    "open_encoder",
    "open_source",
    "to_published",
]
