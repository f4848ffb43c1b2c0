"""The parts that models are assembled from, in the order of the data flow."""

from .code_usage import CodeUsage
from .log_mel import LogMel
from .masking import MaskPlan, RandomMasking
from .patches import Patches, extract_patches
from .quantizer import RandomProjectionQuantizer
from .transformer import Transformer, TransformerSettings

__all__ = [
    "CodeUsage",
    "LogMel",
    "MaskPlan",
    "Patches",
    "RandomMasking",
    "RandomProjectionQuantizer",
    "Transformer",
    "TransformerSettings",
    "extract_patches",
]
