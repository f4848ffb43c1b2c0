"""The specification of every operation in plain PyTorch: the file ``reference.py`` of each operation.

They run on any device in any floating dtype (float64 for ground truth), are differentiable by autograd, and are what
the kernels, tests and benchmarks are compared with.
"""

from .chunked_attention.reference import chunked_attention
from .masked_cross_entropy.reference import masked_cross_entropy, masked_cross_entropy_gradients
from .quantize.reference import quantize

__all__ = ["chunked_attention", "masked_cross_entropy", "masked_cross_entropy_gradients", "quantize"]
