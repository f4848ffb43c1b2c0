"""CPU backend of ``chunked_attention``: addresses, strides and sizes for the C++ kernels (csrc/chunked_attention/)."""

from typing import Any

import torch
from torch import Tensor

from ..common import native

__all__ = ["backward", "forward", "obstacle"]

MAX_HEAD_DIM = 256


def obstacle(query: Tensor) -> str | None:
    """Reason why the C++ kernels cannot take a call with this query, or None."""
    if query.device.type != "cpu":
        return f"it needs CPU tensors, got {query.device.type!r}"
    if query.dtype == torch.float64:
        return "float64 runs on the reference backend only"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head size {query.shape[-1]} exceeds {MAX_HEAD_DIM}"
    return native.extension_obstacle()


def multiplies_bf16(dtype: torch.dtype) -> bool:
    """Return True if matrix products take bf16 operands (AMX, or AVX-512 BF16 where it is faster); otherwise fp32."""
    return dtype == torch.bfloat16 and native.extension().bf16_dot_beats_fma()


def forward(query: Tensor, key: Tensor, value: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Return the output, in query's memory order, and the log-sum-exp of the scaled scores (B, H, Tq) in fp32."""
    out = torch.empty_like(query)
    logsumexp = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
    call = _Call(query, key, value, options)
    call.frames("out", out, writable=True)
    call.pointers["logsumexp"] = logsumexp.data_ptr()
    if query.numel():
        native.extension().chunked_attention_forward(call.pointers)
    return call.finished("out", out), logsumexp


def backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, options: Any
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, position, content_bias and position_bias (None where absent)."""
    call = _Call(query, key, value, options)
    call.frames("grad", grad.to(query.dtype))
    call.frames("out", out)
    call.pointers["logsumexp"] = logsumexp.data_ptr()
    grad_query = torch.empty_like(query)
    call.frames("grad_query", grad_query, writable=True)
    # With bf16 products the kernels fill gradients in the dtypes of their inputs, otherwise they add to fp32 sums.
    grad_key, grad_value = (call.key_gradient(name, x) for name, x in (("grad_key", key), ("grad_value", value)))
    tables: list[Tensor | None] = []
    for name in ("position", "content_bias", "position_bias"):
        given = call.keep.get(name)
        table = None if given is None else torch.zeros(given.shape, dtype=given.dtype, device="cpu")
        call.pointers[f"grad_{name}"] = 0 if table is None else table.data_ptr()
        tables.append(table)
    if query.numel():
        native.extension().chunked_attention_backward(call.pointers)
    frames = [call.finished("grad_query", grad_query)]
    for name, sums, like in (("grad_key", grad_key, key), ("grad_value", grad_value, value)):
        sums = call.finished(name, sums)[..., : key.shape[-1]]
        frames.append(sums if _same_layout(sums, like) else torch.empty_like(like).copy_(sums))
    return (*frames, *(None if x is None else x.to(query.dtype) for x in tables))


def _same_layout(sums: Tensor, like: Tensor) -> bool:
    return sums.dtype == like.dtype and sums.stride() == torch.empty_like(like, device="meta").stride()


class _Call:
    """The arguments of one C++ call as addresses, strides and sizes; keeps alive what the addresses point to."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: Any) -> None:
        self.keep: dict[str, Tensor] = {}
        batch, heads, query_length, head_dim = query.shape
        self.pointers: dict[str, Any] = {
            "type": str(query.dtype).removeprefix("torch."),
            "batch": batch,
            "heads": heads,
            "query_length": query_length,
            "key_length": key.shape[2],
            "head_dim": head_dim,
            "table_rows": 0 if options.position is None else options.position.shape[1],
            "threads": torch.get_num_threads(),
            "bf16_products": multiplies_bf16(query.dtype),
        }
        for name in ("chunk_size", "left_context", "right_context", "query_offset", "position_zero", "scale"):
            self.pointers[name] = getattr(options, name)
        self.flat("position", options.position, query.dtype if self.pointers["bf16_products"] else torch.float32)
        self.flat("content_bias", options.content_bias, torch.float32)
        self.flat("position_bias", options.position_bias, torch.float32)
        self.flat("lengths", options.lengths, torch.int64)
        self.flat("starts", options.starts, torch.int64)
        self.flat("key_mask", options.key_mask, torch.uint8)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self.frames(name, tensor)

    def flat(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        if tensor is not None:
            self.keep[name] = tensor.detach().to(dtype).contiguous()
        self.pointers[name] = 0 if tensor is None else self.keep[name].data_ptr()

    def frames(self, name: str, tensor: Tensor, *, writable: bool = False) -> None:
        """Pass (B, H, T, d) as it lies in memory; copied only if the last dimension is not contiguous."""
        direct = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        if writable and not direct:
            self.keep[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            self.keep[name] = tensor if direct else tensor.contiguous()
        self.pointers[name] = (self.keep[name].data_ptr(), *self.keep[name].stride()[:3])

    def finished(self, name: str, tensor: Tensor) -> Tensor:
        """The written tensor, moved to its memory order where the kernel had to write elsewhere."""
        return tensor if self.keep[name] is tensor else tensor.copy_(self.keep[name])

    def key_gradient(self, name: str, like: Tensor) -> Tensor:
        """Target of a gradient of keys or values: the gradient itself, or zeroed fp32 sums in whole vectors."""
        if self.pointers["bf16_products"]:
            tensor = torch.empty_like(like) if self.pointers["query_length"] else torch.zeros_like(like)
            self.frames(name, tensor, writable=True)
            return tensor
        batch, heads, length, head_dim = like.shape
        padded = (head_dim + 15) // 16 * 16
        # Frame by frame when the input is a transposed (B, T, H, d), so that the sums can be the gradient itself.
        if like.stride(1) < like.stride(2):
            tensor = torch.zeros(batch, length, heads, padded, dtype=torch.float32, device="cpu").transpose(1, 2)
        else:
            tensor = torch.zeros(batch, heads, length, padded, dtype=torch.float32, device="cpu")
        self.frames(name, tensor)
        return tensor
