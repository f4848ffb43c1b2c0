"""Encoders in the forms that others read, and others' encoders in ours."""

from .errors import UnknownLayoutError
from .opening import Source, load, load_pretraining, open_source
from .published import Published, from_published, to_published

__all__ = [
    "Published",
    "Source",
    "UnknownLayoutError",
    "from_published",
    "load",
    "load_pretraining",
    "open_source",
    "to_published",
]
