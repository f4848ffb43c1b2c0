"""The three fused operations, importable into any model: ``from bestrq2 import ops``."""

from typing import TYPE_CHECKING, Any

from . import interop, reference
from .chunk_layouts import ChunkLayout
from .chunked_attention import chunked_attention
from .dispatch import BACKENDS, use_backend
from .masked_cross_entropy import masked_cross_entropy
from .native import available_backends
from .quantize import check_codes, quantize

__all__ = [
    "BACKENDS",
    "ChunkLayout",
    "available_backends",
    "check_codes",
    "chunked_attention",
    "interop",
    "masked_cross_entropy",
    "quantize",
    "reference",
    "use_backend",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "chunked_attention_sinusoidal":
            raise AttributeError(
                "bestrq2.ops.chunked_attention_sinusoidal was removed: project the sinusoids to a table and call "
                "chunked_attention(..., position=table)"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
