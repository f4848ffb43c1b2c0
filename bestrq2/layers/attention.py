"""Softmax attention of a plain Transformer: which implementation runs when.

On CPUs, in this order (docs/benchmarks.md has the measurements):

- at most 384 keys: our kernel that holds the scores of a head in the cache (csrc/short_attention). In fp32 with AVX2 or
  AVX-512; in bf16 on a processor with fast bf16 products (AMX, or AVX-512 BF16 of AMD), where the backward pass of
  PyTorch's kernel is several times slower than its forward pass.
- clips of different lengths, or bf16 and more keys: ``ops.chunked_attention`` with one chunk, which skips padding of
  self-attention; with other queries than keys it is a mask of keys.
- fp32 without padding and with more keys: ``scaled_dot_product_attention``.

On GPUs, in this order, eager and under torch.compile:

- bf16 or fp16, at most GPU_KEYS queries and keys, heads of at most GPU_DIM: layers/short_attention. On an H100 it takes
  3.8 ms of a base step. cuDNN's kernels took 5.2, joining the gradients of queries, keys and values 0.6, and
  preparing every new number of tokens up to 16 ms of the host.
- clips of different lengths, eager only: ``ops.chunked_attention`` with one chunk, which skips padding.
- ``scaled_dot_product_attention``, which chooses among its kernels by PyTorch's rule: in bf16 and fp16 on sm_90 and
  sm_100 cuDNN first (torch 2.13 with cuDNN 9.15.1 or later), else flash attention.

``BESTRQ2_BACKEND=reference`` and ``ops.use_backend("reference")`` leave everything to the last one of either list, and
so do transforms of ``torch.func``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq2 import ops
from bestrq2.ops.common import native
from bestrq2.ops.common.compiler import constant_when_compiled
from bestrq2.ops.common.dispatch import forced_backend

from .block_rows import add_bias
from .padding import length_mask
from .row_functions import have_addresses
from .short_attention import CachedAttention, short_attention, short_self_attention

MOST_KEYS = 384
"""Keys of the cached kernel. Its scratch memory, 20 bytes a score, leaves the second cache level not far above."""
GPU_KEYS = 128
"""Queries and keys of the kernel on GPUs, which can 256 with heads of 64; 0 leaves all to PyTorch."""
GPU_DIM = 128
"""Head size of the kernel on GPUs."""
GPU_TYPE = "cuda"


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None, *, cross: bool = False) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` over the first ``lengths[b]`` keys of every clip.

    Args:
        query: ``(B, H, Nq, d)``.
        key, value: ``(B, H, Nk, d)``.
        lengths: ``(B,)`` integers, valid keys on the device, at least 1; None: all. Where Nq = Nk queries are cut off
            like keys, and what those from ``lengths`` on give is undefined.
        cross: queries are other tokens than keys, and all of them count, also where Nq = Nk.

    Returns:
        ``(B, H, Nq, d)``; of our own kernels in the memory order ``(B, Nq, H, d)``.
    """
    cuts_queries = lengths is not None and query.shape[2] == key.shape[2]  # the kernels of short clips do
    if not (cross and cuts_queries):
        if _is_short_on_gpu(query, key, value):
            return short_attention(query, key, value, lengths)
        if _is_eager(query) and _is_short(query, key, value):
            return CachedAttention.apply(lengths, 0, None, query, key, value)
    chunks = _is_eager(query) and _prefers_chunks(query, lengths)
    if chunks and cuts_queries and not cross:
        return ops.chunked_attention(query, key, value, right_context=None, lengths=lengths)
    valid = None if lengths is None else length_mask(lengths, key.shape[2], key.device)
    if chunks:
        return ops.chunked_attention(query, key, value, right_context=None, key_mask=valid)
    mask = None if valid is None else valid[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def self_attend(qkv: Tensor, lengths: Tensor | None = None, first: int = 0, bias: Tensor | None = None) -> Tensor:
    """:func:`attend` for queries, keys and values of one linear layer, ``(B, N, 3, H, d)`` -> ``(B, H, N - first, d)``.

    The queries are those from ``first`` on. ``bias (3 H d,)`` of the layer is still to be added, in place: qkv has no
    other reader. Gradients of queries, keys and values are written side by side, as the layer needs them.
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if _is_eager(qkv) and _is_short(query, key, value):
        return CachedAttention.apply(lengths, first, bias, qkv, None, None)
    if bias is not None:
        qkv = add_bias(qkv.flatten(2), bias).view(qkv.shape)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if _is_short_on_gpu(query, key, value):
        return short_self_attention(qkv, lengths, first)
    return attend(query[:, :, first:], key, value, lengths)


def _is_eager(x: Tensor) -> bool:
    transforms = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not transforms and x.numel() > 0


def _is_short(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype
        and have_addresses(query, key, value)
        and key.shape[2] <= MOST_KEYS
        and query.shape[2] <= MOST_KEYS
        and forced_backend() in (None, "cpu")
        and native.extension_obstacle() is None
        and _is_fast(query.dtype)
    )


def _is_short_on_gpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type == GPU_TYPE
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and key.shape[2] <= GPU_KEYS
        and query.shape[2] <= GPU_KEYS
        and query.shape[3] <= GPU_DIM
        and forced_backend() in (None, "triton")
        and _gpu_obstacle(query.device.index) is None
        and not torch._C._are_functorch_transforms_active()
    )


@constant_when_compiled
def _gpu_obstacle(index: int) -> str | None:
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "it needs bf16 products of the matrix units, compute capability 8.0"
    return native.triton_obstacle(torch.device("cuda", index))


def _is_fast(dtype: torch.dtype) -> bool:
    extension = native.extension()
    return extension.bf16_dot_beats_fma() if dtype == torch.bfloat16 else extension.isa() != "portable"


def _prefers_chunks(query: Tensor, lengths: Tensor | None) -> bool:
    if forced_backend() == "reference" or query.shape[-1] > 256 or query.dtype == torch.float64:
        return False
    if query.device.type == "cpu":
        wanted = lengths is not None or query.dtype == torch.bfloat16
        return wanted and native.extension_obstacle() is None
    return lengths is not None and query.device.type == "cuda" and native.triton_obstacle(query.device) is None
