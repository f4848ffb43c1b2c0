"""The three fused operations, importable into any model: ``from bestrq2 import ops``."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from . import interop, reference
from .chunked_attention import ChunkLayout, chunked_attention
from .common.dispatch import BACKENDS, use_backend
from .common.native import available_backends
from .masked_cross_entropy import masked_cross_entropy
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

if not _TYPE_CHECKING:

    def __getattr__(name: str) -> _Any:
        if name == "chunked_attention_sinusoidal":
            raise AttributeError(
                "bestrq2.ops.chunked_attention_sinusoidal was removed: project the sinusoids to a table and call "
                "chunked_attention(..., position=table)"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
