"""Encoders in the forms that others read, and others' encoders in ours."""

from .adapters import AudioEncoder
from .errors import UnknownLayoutError
from .foreign import open_encoder
from .opening import Source, load, load_pretraining, open_source
from .published import Published, from_published, to_published

__all__ = [
    "AudioEncoder",
    "Published",
    "Source",
    "UnknownLayoutError",
    "from_published",
    "load",
    "load_pretraining",
    "open_encoder",
    "open_source",
    "to_published",
]
