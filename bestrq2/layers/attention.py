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

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq2 import ops
from bestrq2.ops.common import native
from bestrq2.ops.common.compiler import constant_when_compiled
from bestrq2.ops.common.dispatch import forced_backend
from bestrq2.ops.common.transforms import refuse_second_derivative

from .block_rows import add_bias
from .padding import length_mask
from .short_attention import short_attention, short_self_attention

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
        if _is_eager(query) and _is_short(query, key):
            return _ShortAttention.apply(lengths, 0, None, query, key, value)
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
    if _is_eager(qkv) and _is_short(query, key):
        return _ShortAttention.apply(lengths, first, bias, qkv)
    if bias is not None:
        qkv = add_bias(qkv.flatten(2), bias).view(qkv.shape)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
    if _is_short_on_gpu(query, key, value):
        return short_self_attention(qkv, lengths, first)
    return attend(query[:, :, first:], key, value, lengths)


def _is_eager(x: Tensor) -> bool:
    transforms = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not transforms and x.numel() > 0


def _is_short(query: Tensor, key: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float32)
        and query.dtype == key.dtype
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


def _place(x: Tensor) -> tuple[int, ...]:
    """Address and strides of batch, head and token."""
    return (x.data_ptr(), *x.stride()[:3])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _ShortAttention(torch.autograd.Function):
    """Of query, key and value ``(B, H, N, d)``, or of qkv ``(B, N, 3, H, d)`` with the queries from ``first`` on, plus
    ``bias (3 H d,)`` or None.

    The bias of the keys adds the same number to all scores of a row, so it has no effect and its gradient is 0.
    """

    @staticmethod
    def forward(ctx: Any, lengths: Tensor | None, first: int, bias: Tensor | None, *frames: Tensor) -> Tensor:
        frames = tuple(map(_rows, frames))
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()  # read by address
        query, key, value = _split(frames, first)
        batch, heads, num_queries, dim = query.shape
        out = query.new_empty(batch, num_queries, heads, dim).transpose(1, 2)
        logsumexp = torch.empty(batch, heads, num_queries, dtype=torch.float32, device="cpu")
        ctx.sizes, ctx.scale, ctx.first = (batch, heads, num_queries, key.shape[2], dim), dim**-0.5, first
        rows = [*map(_place, (query, key, value, out))]
        native.extension().short_attention_forward(
            query.dtype == torch.bfloat16, ctx.sizes, 0 if lengths is None else lengths.data_ptr(), ctx.scale, rows,
            _biases(bias, heads * dim), logsumexp.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        ctx.save_for_backward(lengths, logsumexp, bias, *frames)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("short attention")
        lengths, logsumexp, bias, *frames = ctx.saved_tensors
        if len(frames) == 1:
            grads = [torch.empty(frames[0].shape, dtype=frames[0].dtype, device="cpu")]
            grads[0][:, : ctx.first, 0] = 0
        else:
            grads = [torch.empty(x.transpose(1, 2).shape, dtype=x.dtype, device="cpu").transpose(1, 2) for x in frames]
        query, key, value = _split(frames, ctx.first)
        grad = _rows(grad.to(query.dtype))
        rows = [
            *map(_place, (query, key, value, grad, grad, *_split(grads, ctx.first)))
        ]  # the fourth, the output, is not read
        batch, heads, _, _, dim = ctx.sizes
        sums = None  # of each clip
        if ctx.needs_input_grad[2]:
            sums = torch.empty(batch, 3 * heads * dim, dtype=torch.float32, device="cpu")
        native.extension().short_attention_backward(
            query.dtype == torch.bfloat16, ctx.sizes, 0 if lengths is None else lengths.data_ptr(), ctx.scale, rows,
            _biases(bias, heads * dim), logsumexp.data_ptr(), 0 if sums is None else sums.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return None, None, None if sums is None else sums.sum(0), *grads


def _biases(bias: Tensor | None, width: int) -> tuple[int, int]:
    """Addresses of the biases of queries and values."""
    return (0, 0) if bias is None else (bias.data_ptr(), bias.data_ptr() + 2 * width * bias.element_size())


def _split(frames: Sequence[Tensor], first: int) -> Sequence[Tensor]:
    if len(frames) == 3:
        return frames
    query, key, value = frames[0].permute(2, 0, 3, 1, 4).unbind()
    return query[:, :, first:], key, value
