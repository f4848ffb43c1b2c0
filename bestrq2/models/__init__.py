"""Models assembled from the layers."""

from .best_rq2 import BestRQ, BestRQ2, PretrainOutput
from .build import build_encoder, build_model
from .conformer import ConformerEncoder
from .encoder import PretrainableEncoder
from .streaming import StreamingState
from .vit import ViTEncoder

__all__ = [
    "BestRQ",
    "BestRQ2",
    "ConformerEncoder",
    "PretrainOutput",
    "PretrainableEncoder",
    "StreamingState",
    "ViTEncoder",
    "build_encoder",
    "build_model",
]
