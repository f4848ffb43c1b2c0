"""The parts that models are assembled from, in the order of the data flow."""

from .chunk_sampling import SpeechBrainChunks, WeNetChunks
from .code_usage import CodeUsage
from .conformer import ConformerSettings
from .log_mel import LogMel
from .masking import MaskPlan, RandomMasking
from .patches import Patches, extract_patches
from .quantizer import RandomProjectionQuantizer
from .transformer import Transformer, TransformerSettings

__all__ = [
    "CodeUsage",
    "ConformerSettings",
    "LogMel",
    "MaskPlan",
    "Patches",
    "RandomMasking",
    "RandomProjectionQuantizer",
    "SpeechBrainChunks",
    "Transformer",
    "TransformerSettings",
    "WeNetChunks",
    "extract_patches",
]
