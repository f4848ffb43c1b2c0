"""The specification of every operation in plain PyTorch, one short file each.

They run on any device in any floating dtype (float64 for ground truth), are differentiable by autograd, and are what
the kernels, tests and benchmarks are compared with.
"""

from .chunked_attention import chunked_attention
from .masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_gradients
from .quantize import quantize

__all__ = ["chunked_attention", "masked_cross_entropy", "masked_cross_entropy_gradients", "quantize"]
