"""Softmax attention over few keys on GPUs, at most 256: a clip and head has all its keys and values in one tile.

    forward    a program for every clip, head and tile of queries; keeps the log-sum-exp of every row
    backward   a program for every clip and head: dq, dk and dv in one pass over the tiles of queries, without atomics

The gradient of a score is ``p (dp - sum(p dp))``. Whole rows of p and dp are in the tile, so the output is not read.
The backward tile is transposed, keys by queries: the products for dk and dv take p and ds as they lie in registers.

Bytes of a clip and head in bf16: forward 8 N d (q, k, v, out), backward 14 N d (q, k, v, do; dq, dk, dv). 256 clips, 12
heads, N = 64, d = 64: 101 and 176 MB, 30 and 53 us at 3.35 TB/s.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import CompileCase, leaves
from .chunked_attention.launch import in_units, unit_stride
from .chunked_attention.records import Frames, Strides
from .chunked_attention.window import item_pointer, load_rows, store_rows
from .integers import ceil_div, power_of_2
from .tuning import load_configs, shipped

TILES = (16, 32, 64, 128, 256)  # keys of a tile: only so many variants of a kernel, whatever the lengths
RUNTIME = ["H", "Nq", "Nk", "scale"]  # no variant of a kernel for each value

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    f"{kernel}/{dim}/{keys}": [
        {"BM": rows, "num_warps": warps, "num_stages": stages}
        for rows in TILES
        for warps in (2, 4, 8)
        for stages in (1, 2)
        if rows <= min(keys, 128) and (stages == 1 or (kernel == "backward" and rows < keys))
    ]
    for kernel in ("forward", "backward")
    for dim in (64, 128)
    for keys in (16, 32, 64, 128)
}
"""Candidates of benchmarks/tune.py. More stages are for several tiles of queries in a loop."""


class Gradients(NamedTuple):
    """Gradients of the output and of the inputs, or, as ``strides``, the :class:`Strides` of each."""

    out: Any  # (B, H, Nq, D)
    q: Any
    k: Any
    v: Any


@triton.jit
def valid_ends(lengths_ptr, i_b, Nq, Nk, SELF: tl.constexpr):
    """Numbers of queries and keys of a clip. With SELF the queries are the last Nq of Nk tokens and end with them."""
    if lengths_ptr is not None:
        key_end = tl.minimum(tl.load(lengths_ptr + i_b), Nk).to(tl.int32)
        query_end = Nq
        if SELF:
            query_end = key_end - (Nk - Nq)
    else:
        key_end = Nk
        query_end = Nq
    return query_end, key_end


@triton.jit(do_not_specialize=RUNTIME)
def short_attention_forward_kernel(
    frames, lse_ptr, lengths_ptr, strides,  # Frames; (B, H, Nq) fp32; (B,) or None; Frames of Strides
    H, Nq, Nk, scale,
    SELF: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    # The tiles of a clip and head are neighbours: all but the first find keys and values in the second cache level.
    tiles = tl.cdiv(Nq, BM)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    query_end, key_end = valid_ends(lengths_ptr, i_b, Nq, Nk, SELF)
    first = tl.program_id(0) % tiles * BM
    o_m = first + tl.arange(0, BM)
    in_range = o_m < Nq
    lse_ptr += i_bh * Nq
    out_ptr = item_pointer(frames.out, i_b, i_h, strides.out, UNIT)
    if first >= query_end:  # padding alone: zero, and nothing is read
        tl.store(lse_ptr + o_m, tl.zeros((BM,), tl.float32), mask=in_range)
        store_rows(out_ptr, o_m, strides.out, tl.zeros((BM, BD), tl.float32), in_range, UNIT, D, BD)
    else:
        o_n = tl.arange(0, BN)
        m_row, m_key = o_m < query_end, o_n < key_end
        q = load_rows(item_pointer(frames.q, i_b, i_h, strides.q, UNIT), o_m, strides.q, m_row, UNIT, D, BD)
        k = load_rows(item_pointer(frames.k, i_b, i_h, strides.k, UNIT), o_n, strides.k, m_key, UNIT, D, BD)
        v = load_rows(item_pointer(frames.v, i_b, i_h, strides.v, UNIT), o_n, strides.v, m_key, UNIT, D, BD)
        s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        s = tl.where(m_key[None, :], s, float("-inf"))
        largest = tl.max(s, axis=1)
        p = tl.exp2(s - largest[:, None])
        total = tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v) / total[:, None]
        out = tl.where(m_row[:, None], out, 0.0)  # zero in padding
        tl.store(lse_ptr + o_m, (largest + tl.log2(total)) * 0.6931471805599453, mask=in_range)
        store_rows(out_ptr, o_m, strides.out, out, in_range, UNIT, D, BD)


@triton.jit
def _backward_of_queries(
    frames, gradients, lse_ptr, strides, gradient_strides, i_b, i_h, first, query_end, key_end, Nq, scale, k, v, dk, dv,
    UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the queries from ``first`` on; return dk / scale and dv with their share: [BN, BD]."""
    o_m = first + tl.arange(0, BM)
    m_row, m_key = o_m < query_end, tl.arange(0, BN) < key_end
    q = load_rows(item_pointer(frames.q, i_b, i_h, strides.q, UNIT), o_m, strides.q, m_row, UNIT, D, BD)
    do_ptr = item_pointer(gradients.out, i_b, i_h, gradient_strides.out, UNIT)
    do = load_rows(do_ptr, o_m, gradient_strides.out, m_row, UNIT, D, BD)
    lse = tl.load(lse_ptr + o_m, mask=m_row, other=0.0) * 1.4426950408889634
    s = tl.dot(k, tl.trans(q)) * (scale * 1.4426950408889634)  # [BN, BM]
    p = tl.exp2(tl.where(m_key[:, None], s - lse[None, :], float("-inf")))
    dp = tl.dot(v, tl.trans(do))
    delta = tl.sum(p * dp, axis=0)
    ds = (p * (dp - delta[None, :])).to(k.dtype)
    dv = tl.dot(p.to(v.dtype), do, dv)
    dk = tl.dot(ds, q, dk)
    dq = tl.dot(tl.trans(ds), k) * scale
    dq_ptr = item_pointer(gradients.q, i_b, i_h, gradient_strides.q, UNIT)
    store_rows(dq_ptr, o_m, gradient_strides.q, dq, o_m < Nq, UNIT, D, BD)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def short_attention_backward_kernel(
    frames, gradients, lse_ptr, lengths_ptr,  # Frames without output; Gradients; (B, H, Nq) fp32; (B,) or None
    strides, gradient_strides,  # Frames and Gradients of Strides
    H, Nq, Nk, scale,
    SELF: tl.constexpr, ONE_TILE: tl.constexpr,  # of queries
    UNIT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    query_end, key_end = valid_ends(lengths_ptr, i_b, Nq, Nk, SELF)
    o_n = tl.arange(0, BN)
    k = load_rows(item_pointer(frames.k, i_b, i_h, strides.k, UNIT), o_n, strides.k, o_n < key_end, UNIT, D, BD)
    v = load_rows(item_pointer(frames.v, i_b, i_h, strides.v, UNIT), o_n, strides.v, o_n < key_end, UNIT, D, BD)
    lse_ptr += i_bh * Nq
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    if ONE_TILE:  # its loads are not behind a loop
        dk, dv = _backward_of_queries(
            frames, gradients, lse_ptr, strides, gradient_strides, i_b, i_h, 0, query_end, key_end, Nq, scale, k, v,
            dk, dv, UNIT, D, BD, BM, BN,
        )  # fmt: skip
    else:
        for first in range(0, tl.minimum(query_end, Nq), BM):
            dk, dv = _backward_of_queries(
                frames, gradients, lse_ptr, strides, gradient_strides, i_b, i_h, first, query_end, key_end, Nq, scale,
                k, v, dk, dv, UNIT, D, BD, BM, BN,
            )  # fmt: skip
        dq_ptr = item_pointer(gradients.q, i_b, i_h, gradient_strides.q, UNIT)
        zeros = tl.zeros((BM, BD), tl.float32)
        for first in range(tl.cdiv(tl.maximum(query_end, 0), BM) * BM, Nq, BM):  # padding alone
            o_m = first + tl.arange(0, BM)
            store_rows(dq_ptr, o_m, gradient_strides.q, zeros, o_m < Nq, UNIT, D, BD)
    dk_ptr = item_pointer(gradients.k, i_b, i_h, gradient_strides.k, UNIT)
    store_rows(dk_ptr, o_n, gradient_strides.k, dk * scale, o_n < Nk, UNIT, D, BD)
    dv_ptr = item_pointer(gradients.v, i_b, i_h, gradient_strides.v, UNIT)
    store_rows(dv_ptr, o_n, gradient_strides.v, dv, o_n < Nk, UNIT, D, BD)


@cache
def config_key(kernel: str, head_dim: int, keys: int) -> tuple[str, dict[str, int]]:
    """Name of a configuration: kernel, head size rounded up to 64 or 128, keys rounded up to one of TILES; and the
    constants that follow from the sizes alone."""
    tile = next((size for size in TILES if keys <= size), keys)
    sizes = {"D": head_dim, "BD": max(16, power_of_2(head_dim)), "BN": tile}
    return f"{kernel}/{64 if head_dim <= 64 else 128}/{tile}", sizes


def constants(kernel: str, query: Tensor, keys: int) -> dict[str, Any]:
    """Constants and launch options of a call."""
    dim = query.shape[-1]
    key, sizes = config_key(kernel, dim, keys)
    config = load_configs("short_attention", query.device).get(key)
    if config is None:
        raise ValueError(f"key: expected fewer than {keys} keys of {dim} channels, no tile {key} fits this GPU")
    return {**sizes, **config}


def forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, lengths: Tensor | None, of_self: bool
) -> None:
    """Write ``out (B, H, Nq, d)`` and ``logsumexp (B, H, Nq)`` fp32, which is contiguous.

    Args:
        query: ``(B, H, Nq, d)`` bf16 or fp16, as views with any strides.
        key, value: ``(B, H, Nk, d)``, Nk at most 256 (128 where d > 64, and on sm_80): more spills registers.
        lengths: ``(B,)`` int64 valid keys, contiguous, or None.
        of_self: the queries are the last Nq of the Nk tokens, and those behind ``lengths`` give zero.
    """
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    batch, heads, queries, dim = query.shape
    config = constants("forward", query, key.shape[2])
    unit, strides = in_units(query, key, value, out)
    with torch.cuda.device(query.device if query.device.type == "cuda" else -1):
        short_attention_forward_kernel[(batch * heads * ceil_div(queries, config["BM"]),)](
            Frames(query, key, value, out), logsumexp, lengths, Frames(*strides),
            heads, queries, key.shape[2], dim**-0.5, SELF=of_self, UNIT=unit, **config,
        )  # fmt: skip


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    lengths: Tensor | None,
    of_self: bool,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients of query, key and value into views of any strides; ``grad (B, H, Nq, d)`` is the output's."""
    query, key, value, grad = unit_stride(query), unit_stride(key), unit_stride(value), unit_stride(grad)
    batch, heads, queries, dim = query.shape
    config = constants("backward", query, key.shape[2])
    unit, (of_query, of_key, of_value, *of_gradients) = in_units(query, key, value, grad, *gradients)
    with torch.cuda.device(query.device if query.device.type == "cuda" else -1):
        short_attention_backward_kernel[(batch * heads,)](
            Frames(query, key, value, None), Gradients(grad, *gradients), logsumexp, lengths,
            Frames(of_query, of_key, of_value, None), Gradients(*of_gradients),
            heads, queries, key.shape[2], dim**-0.5, SELF=of_self, ONE_TILE=queries <= config["BM"], UNIT=unit,
            **config,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Both kernels at every shipped configuration, ahead of time, with lengths; one query tile where that is usual."""
    cases = []
    for file in shipped("short_attention"):
        for key in file.keys:
            name, dim, keys = key.split("/")
            case = compile_case(f"{file.name}-{key}", name, int(dim), int(keys), file.configs[key])
            cases.append(replace(case, architectures=file.serves(key)))
    return cases


def compile_case(name: str, kernel: str, dim: int, keys: int, config: dict[str, Any]) -> CompileCase:
    """One kernel of self-attention over ``keys`` tokens."""
    config = dict(config)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    constexprs = {"SELF": True, "UNIT": 1, "D": dim, "BD": dim, "BN": keys, **config}
    strides = Strides("i32", "i32", "i32")
    frame = "*bf16"
    signature: dict[str, Any] = {
        **dict.fromkeys(("H", "Nq", "Nk"), "i32"), "scale": "fp32", "lse_ptr": "*fp32", "lengths_ptr": "*i64",
    }  # fmt: skip
    if kernel == "forward":
        function = short_attention_forward_kernel
        signature |= {
            "frames": Frames(frame, frame, frame, frame),
            "strides": Frames(strides, strides, strides, strides),
        }
    else:
        function = short_attention_backward_kernel
        constexprs["ONE_TILE"] = keys <= config["BM"]
        signature |= {
            "frames": Frames(frame, frame, frame, None),
            "gradients": Gradients(*[frame] * 4),
            "strides": Frames(strides, strides, strides, None),
            "gradient_strides": Gradients(*[strides] * 4),
        }
    members = leaves({name: signature[name] for name in function.arg_names if name in signature})
    divisible = tuple(name for name, _, kind in members if kind and (kind.startswith("*") or "strides" in name))
    return CompileCase(name, function, signature, constexprs, divisible_by_16=divisible, **options)
