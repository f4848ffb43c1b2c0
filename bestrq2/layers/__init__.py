"""The parts that models are assembled from, in the order of the data flow."""

from .chunk_sampling import SpeechBrainChunks, WeNetChunks
from .code_head import CodeHead
from .code_usage import CodeUsage
from .conformer import Conformer, ConformerBlock, ConformerSettings
from .conformer_attention import RelativeAttention
from .linear_cross_entropy import LinearMaskedCrossEntropy
from .log_mel import LogMel
from .masking import MaskPlan, RandomMasking
from .patches import Patches, extract_patches
from .quantizer import RandomProjectionQuantizer
from .speechbrain import SpeechBrainRandomProjectionQuantizer, SpeechBrainRelPosMHAXL
from .transformer import Transformer, TransformerSettings

__all__ = [
    "CodeHead",
    "CodeUsage",
    "Conformer",
    "ConformerBlock",
    "ConformerSettings",
    "LinearMaskedCrossEntropy",
    "LogMel",
    "MaskPlan",
    "Patches",
    "RandomMasking",
    "RandomProjectionQuantizer",
    "RelativeAttention",
    "SpeechBrainChunks",
    "SpeechBrainRandomProjectionQuantizer",
    "SpeechBrainRelPosMHAXL",
    "Transformer",
    "TransformerSettings",
    "WeNetChunks",
    "extract_patches",
]
