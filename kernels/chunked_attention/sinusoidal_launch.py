"""Launches the kernels of ``ops.chunked_attention_sinusoidal``: no band, so no segments."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..tuning import load_configs
from .launch import as_read, choose_config, padded_dim, unit_stride, window_sizes
from .sinusoidal_backward import (
    chunked_attention_sinusoidal_backward_key_kernel,
    chunked_attention_sinusoidal_backward_query_kernel,
)
from .sinusoidal_forward import chunked_attention_sinusoidal_forward_kernel

KERNELS = ("forward", "backward_query", "backward_key")
FREQUENCIES = (32, 64, 96, 128)
MORE_ROWS = 128  # of a table, behind its period, so that the rows of a tile follow each other: the largest BM and BN


def config_key(kernel: str, head_dim: int, frequencies: int, dtype: torch.dtype) -> str:
    """Name of a configuration: kernel, padded head size and number of frequencies, and ``/fp32`` for fp32."""
    sizes = f"{max(64, padded_dim(head_dim))}x{frequencies}"
    return f"sinusoidal_{kernel}/{sizes}{'/fp32' if dtype == torch.float32 else ''}"


def padded_frequencies(head_dim: int, frequencies: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """The next larger number of frequencies that the device's configurations have; None where there is none."""
    configs = load_configs("chunked_attention", device)
    for padded in FREQUENCIES:
        keys = (config_key(kernel, head_dim, padded, dtype) for kernel in KERNELS)
        if padded >= frequencies and all(key in configs for key in keys):
            return padded
    return None


class _Call:
    """What every launch of a call has in common."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, series: dict[str, Any], options: dict[str, Any]):
        self.query, self.key, self.value = (unit_stride(x) for x in (query, key, value))
        self.batch, self.heads, self.frames, self.head_dim = query.shape
        self.keys = key.shape[2]
        names = ("content_bias", "position_bias", "lengths", "starts", "key_mask")
        self.given = {name: as_read(options[name]) for name in names}
        self.scale = options["scale"]
        self.window, self.offset = window_sizes(options), options["query_offset"]
        self.onto, self.turns, self.basis = series["onto"].contiguous(), series["turns"], series["basis"]
        self.period, self.frequencies = series["period"], series["onto"].shape[2] // 2

    @property
    def strides(self) -> list[int]:
        return [size for x in (self.query, self.key, self.value) for size in x.stride()[:3]]

    def pointers(self, *names: str) -> tuple[Tensor, ...]:
        """Optional inputs; absent ones as any pointer, which their kernels never read."""
        given = (self.given[name] for name in names)
        return tuple(self.query if x is None else x for x in given)

    def sizes(self) -> tuple[int, ...]:
        """The integer arguments from B to period."""
        return (
            *(self.batch, self.heads, self.frames, self.keys, self.head_dim),
            *(*self.window, self.offset, self.period),
        )

    def constants(self, kernel: str) -> dict[str, Any]:
        configs = load_configs("chunked_attention", self.query.device)
        key = config_key(kernel, self.head_dim, self.frequencies, self.query.dtype)
        config = choose_config(configs, key, self.given["key_mask"] is not None)
        has = {
            "HAS_CONTENT": "content_bias",
            "HAS_POSITION": "position_bias",
            "HAS_LENGTHS": "lengths",
            "HAS_STARTS": "starts",
            "HAS_KEY_MASK": "key_mask",
        }
        if kernel == "backward_key":
            del has["HAS_POSITION"]
        return {
            **{constant: self.given[name] is not None for constant, name in has.items()},
            "PRECISION": "tf32x3" if self.query.dtype == torch.float32 else "tf32",  # read for fp32 only
            "BD": padded_dim(self.head_dim),
            "NB": self.frequencies // config["BK"],
            **config,
        }

    def grid(self, frames: int, block: int) -> tuple[int, int]:
        return triton.cdiv(frames, block), self.batch * self.heads


def forward(
    query: Tensor, key: Tensor, value: Tensor, series: dict[str, Any], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the output, in query's memory order, and the log-sum-exp of the scaled scores (B, H, Tq) in fp32.

    ``series``: ``onto`` (H, d, 2K), ``period``, ``turns`` (P + MORE_ROWS, 2K) fp32 and ``basis``, the same in query's
    dtype, with K one of padded_frequencies().
    """
    result = torch.empty_like(query)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if not query.numel():
        return result, lse
    call, out = _Call(query, key, value, series, options), _writable(result)
    constants = call.constants("forward")
    with torch.cuda.device(query.device if query.device.type == "cuda" else -1):
        chunked_attention_sinusoidal_forward_kernel[call.grid(call.frames, constants["BM"])](
            call.query, call.key, call.value, out, lse, call.onto, call.turns, call.basis,
            *call.pointers("content_bias", "position_bias", "lengths", "starts", "key_mask"),
            *call.strides, *out.stride()[:3], *call.sizes(), call.scale, **constants,
        )  # fmt: skip
    return result if out is result else result.copy_(out), lse


def _writable(x: Tensor) -> Tensor:
    """``x``, or where its last stride is not 1 a tensor to write in its place."""
    return x if x.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    series: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, onto (fp32), content_bias and position_bias (None where absent)."""
    biases = {name: options[name] for name in ("content_bias", "position_bias")}
    if not query.numel() or not key.numel():
        return (
            *(torch.zeros_like(x) for x in (query, key, value)),
            torch.zeros(series["onto"].shape, dtype=torch.float32, device=query.device),
            *(None if x is None else torch.zeros_like(x) for x in biases.values()),
        )
    call = _Call(query, key, value, series, options)
    grad, out, device = unit_stride(grad.to(query.dtype)), unit_stride(out), query.device
    constants = call.constants("backward_query")
    tiles, pairs = call.grid(call.frames, constants["BM"])
    rows, width = tiles * constants["BM"], 2 * call.frequencies
    dq, dk = _writable(torch.empty_like(query)), _writable(torch.empty_like(key))
    dv = torch.empty_like(dk)
    delta = torch.empty_like(lse)
    with_position = query.new_empty(call.heads, call.batch * rows, call.head_dim)
    dseries = query.new_empty(call.heads, call.batch * rows, width)
    features = query.new_empty(pairs * rows + MORE_ROWS, width)  # the last tile of the key kernel may reach further
    partial = torch.empty(2, call.batch, call.heads, tiles, call.head_dim, dtype=torch.float32, device=device)
    with torch.cuda.device(device if device.type == "cuda" else -1):
        chunked_attention_sinusoidal_backward_query_kernel[tiles, pairs](
            call.query, call.key, call.value, out, grad, lse, dq, delta, with_position, features, dseries, partial,
            call.onto, call.turns, call.basis,
            *call.pointers("content_bias", "position_bias", "lengths", "starts", "key_mask"),
            *call.strides, *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3],
            *call.sizes(), call.scale, **constants,
        )  # fmt: skip
        constants = call.constants("backward_key")
        chunked_attention_sinusoidal_backward_key_kernel[call.grid(call.keys, constants["BN"])](
            call.query, call.key, call.value, grad, lse, delta, dk, dv, features, call.basis,
            *call.pointers("content_bias", "lengths", "starts", "key_mask"),
            *call.strides, *grad.stride()[:3], *dk.stride()[:3], *call.sizes(), rows, call.scale, **constants,
        )  # fmt: skip
    onto = torch.bmm(with_position.transpose(1, 2), dseries).float() * call.scale
    sums = (
        None if bias is None else (part.sum((0, 2)) * call.scale).to(bias.dtype)
        for part, bias in zip(partial, biases.values())
    )
    return (dq, dk, dv, onto, *sums)
