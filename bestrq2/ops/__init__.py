"""The three fused operations, importable into any model: ``from bestrq2 import ops``."""

from . import interop, reference
from .chunk_layouts import ChunkLayout
from .chunked_attention import chunked_attention
from .chunked_attention_sinusoidal import chunked_attention_sinusoidal
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
    "chunked_attention_sinusoidal",
    "interop",
    "masked_cross_entropy",
    "quantize",
    "reference",
    "use_backend",
]
