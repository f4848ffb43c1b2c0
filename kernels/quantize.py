"""Random projection and nearest code on GPUs: one kernel, nothing of size rows x codes.

Each program takes BM rows and one codebook.

1. Projection, y (BM, d): fp32 FMAs over BK features at a time; the partial sums are added with their rounding errors
   (raw decibels share an offset of several deviations, which cancels here). Layer norm needs only the mean: the
   variance scales y, and no scale of y changes the argmax. y is then scaled by a power of two.
2. Search: y = yh + yl and c = ch + cl in fp16, scores yl.ch + yh.cl + yh.ch in fp32 (22 bits of every factor). Codes
   pass in tiles of BN. GROUP codes of a tile, STEP apart, lie in the registers of one thread and share a lane: it keeps
   the largest score it has seen and the number of that tile. That is 1.25 operations a score, without exchange between
   threads. The groups do not depend on the tile, so neither do the codes.
3. Winner: the lanes that hold the row's maximum; which code of the group it was is settled by scoring all again.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import CompileCase
from .tuning import load_configs, shipped

GROUP, STEP = tl.constexpr(8), tl.constexpr(8)  # 8 codes, 8 apart, share a running maximum
# Bits of fp32 numbers: infinity; y below 2^-100, a row below 2^-60 and one above 2^60.
INFINITE, TINY = tl.constexpr(0x7F800000), tl.constexpr(0x0D800000)
SMALL_ROW, LARGE_ROW = tl.constexpr(0x21800000), tl.constexpr(0x5D800000)
FEW_ROWS = 65536  # rows x codebooks: below, tiles of fewer rows occupy the whole GPU
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a configuration; the rest are compile-time constants


def _tile(rows: int, columns: int, warps: int, stages: int, peel: int) -> dict[str, Any]:
    return {"BM": rows, "BN": columns, "BK": 16, "PEEL": peel, "num_warps": warps, "num_stages": stages}


CANDIDATES = {
    "quantize/16": [
        {**_tile(rows, columns, warps, stages, peel), "maxnreg": registers}
        for rows, columns, warps, registers, peel, all_stages in (
            (256, 64, 8, 128, 0, (3,)),
            (256, 64, 8, 128, 1, (3,)),
            (128, 128, 8, 128, 0, (2, 3, 4)),
            (128, 128, 8, 128, 1, (2, 3, 4)),
            (256, 128, 16, 128, 0, (2, 3)),
            (256, 128, 16, 128, 1, (2, 3)),
            (128, 64, 4, None, 0, (2, 3, 4)),
            (128, 64, 8, None, 0, (2, 3, 4)),
            (64, 64, 4, None, 0, (2, 3, 4)),
        )
        for stages in all_stages
    ],
    **{
        f"quantize/{key}": [_tile(*tile, stages, peel) for tile in tiles for stages in (2, 3, 4) for peel in peels]
        for key, tiles, peels in (
            ("16/few", ((64, 64, 4), (64, 128, 4), (64, 128, 8), (32, 64, 4), (32, 128, 8)), (0, 1)),
            ("32", ((64, 64, 8), (128, 64, 8)), (0,)),
            ("64", ((32, 64, 8), (64, 64, 8)), (0,)),
        )
    },
}
"""What benchmarks/tune.py tries; none spills inside its loops on sm_90, none more than 16 bytes."""


@triton.jit
def _centre(x_ptrs, x_feature_stride, D, BM: tl.constexpr, BK: tl.constexpr):
    """First value of each row and the mean of the differences from it: a constant row gives exactly (x, 0)."""
    first = tl.load(x_ptrs).to(tl.float32)  # [BM]
    total = tl.zeros((BM,), tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        inside = (o_k < D)[None, :]
        x = tl.load(x_ptrs[:, None] + o_k.to(tl.int64)[None, :] * x_feature_stride, mask=inside, other=0.0)
        x = x.to(tl.float32)
        total += tl.sum(tl.where(inside, x - first[:, None], 0.0), axis=1)
    return first, total / D


@triton.jit
def _add(total, lost, part):
    """The sum, and the exact rounding errors of such sums so far (Knuth)."""
    now = total + part
    taken = now - total
    return now, lost + ((total - (now - taken)) + (part - taken))


@triton.jit
def _magnitude(x):
    """The bits of |x|: integers in the order of the numbers, infinity and NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _inverse_power(magnitude):
    """A power of two that takes a number of this magnitude to [1, 8), a subnormal one below 1: an exact factor."""
    exponent = tl.minimum(magnitude & 0x7F800000, 0x7E000000)
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # inverts the exponent's bits


@triton.jit
def _project_scaled(
    y, doubtful, x_ptrs, x_feature_stride, projection_ptr, D, d, LAYER_NORM: tl.constexpr, BD: tl.constexpr
):
    """y of the doubtful rows again, if they are of extreme size, scaled by powers of two. Slow and rare."""
    largest = _magnitude(tl.load(x_ptrs, mask=doubtful, other=0.0).to(tl.float32))
    p_x = x_ptrs
    for _ in tl.range(1, D, num_stages=1):
        p_x += x_feature_stride
        largest = tl.maximum(largest, _magnitude(tl.load(p_x, mask=doubtful, other=0.0).to(tl.float32)))
    extreme = (largest > 0) & ((largest < SMALL_ROW) | (largest > LARGE_ROW))
    if tl.max(extreme.to(tl.int32), axis=0) > 0:
        scale = _inverse_power(largest)
        first = tl.zeros_like(scale)
        mean = tl.zeros_like(scale)
        if LAYER_NORM:
            first = tl.load(x_ptrs, mask=extreme, other=0.0).to(tl.float32) * scale
            p_x = x_ptrs
            lost_mean = tl.zeros_like(scale)
            for _ in tl.range(1, D, num_stages=1):
                p_x += x_feature_stride
                x = tl.load(p_x, mask=extreme, other=0.0).to(tl.float32) * scale
                mean, lost_mean = _add(mean, lost_mean, x - first)
            mean = (mean + lost_mean) / D
        o_d = tl.arange(0, BD)
        total = tl.zeros_like(y)
        lost = tl.zeros_like(y)
        for k in tl.range(0, D, num_stages=1):
            x = tl.load(x_ptrs, mask=extreme, other=0.0).to(tl.float32) * scale  # [BM]
            p = tl.load(projection_ptr + k * d + o_d, mask=o_d < d, other=0.0)  # [BD]
            total, lost = _add(total, lost, ((x - first) - mean)[:, None] * p[None, :])
            x_ptrs += x_feature_stride
        y = tl.where(extreme[:, None], total + lost, y)
    return y


@triton.jit
def _rescore(yh, yl, high_ptr, low_ptr, code, exists, o_d, BD: tl.constexpr):
    """fp32 score of one code per row."""
    y = yh.to(tl.float32) + yl.to(tl.float32)
    offset = code.to(tl.int64)[:, None] * BD + o_d[None, :]  # [BM, BD]
    c = tl.load(high_ptr + offset, mask=exists[:, None], other=0.0).to(tl.float32)
    c += tl.load(low_ptr + offset, mask=exists[:, None], other=0.0).to(tl.float32)
    return tl.where(exists, tl.sum(y * c, axis=1), float("-inf"))


@triton.jit
def _group_scores(yh, yl, tile, high_ptr, low_ptr, o_n, o_d, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """The largest score of each group of a tile of codes: [BM, BN // GROUP], reduced within registers."""
    offset = (tile * BN + o_n).to(tl.int64)[None, :] * BD + o_d[:, None]  # [BD, BN]
    ch = tl.load(high_ptr + offset)
    cl = tl.load(low_ptr + offset)
    score = tl.dot(yh, ch, tl.dot(yh, cl, tl.dot(yl, ch)))  # [BM, BN], small terms first
    score = tl.max(tl.reshape(score, [BM, BN // (GROUP * STEP), GROUP, STEP]), axis=2)
    return tl.reshape(score, [BM, BN // GROUP])


@triton.jit
def quantize_kernel(
    x_ptr, x_row_stride, x_feature_stride,  # (rows, D)
    projection_ptr, projection_stride,  # (G or 1, D, d), fp32 contiguous
    high_ptr, low_ptr, codebook_stride,  # (G or 1, V, BD), fp16 contiguous
    selected_ptr, count_ptr,  # row numbers, how many of them; unused without SELECT
    out_ptr,  # (rows, G), int64
    rows, books, D, d, V,
    LAYER_NORM: tl.constexpr, SELECT: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    count = rows
    if SELECT:
        count = tl.load(count_ptr)
    if i_m * BM >= count:
        return
    # A block that is not full repeats the last row: all its threads store the same code.
    last = tl.minimum(count - 1 - i_m * BM, BM - 1).to(tl.int32)
    o_m = i_m * BM + tl.minimum(tl.arange(0, BM), last)
    if SELECT:
        o_m = tl.load(selected_ptr + o_m)
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    x_ptrs = x_ptr + o_m * x_row_stride
    projection_ptr += i_g * projection_stride
    high_ptr += i_g * codebook_stride
    low_ptr += i_g * codebook_stride

    # 1. projection
    shift = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM,), tl.float32)
    if LAYER_NORM:
        shift, mean = _centre(x_ptrs, x_feature_stride, D, BM, BK)
    y = tl.zeros((BM, BD), tl.float32)
    lost = tl.zeros((BM, BD), tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        inside = (o_k < D)[None, :]
        x = tl.load(x_ptrs[:, None] + o_k.to(tl.int64)[None, :] * x_feature_stride, mask=inside, other=0.0)
        x = x.to(tl.float32)  # [BM, BK]
        if LAYER_NORM:
            x = tl.where(inside, (x - shift[:, None]) - mean[:, None], 0.0)
        p = tl.load(
            projection_ptr + o_k[:, None] * d + o_d[None, :], mask=(o_k < D)[:, None] & (o_d < d)[None, :], other=0.0
        )  # [BK, BD]
        y, lost = _add(y, lost, tl.dot(x, p, input_precision="ieee"))
    y += lost
    largest = tl.max(_magnitude(y), axis=1)
    # Sums of a row near the end of fp32 may have overflowed, products of a tiny one may have lost bits.
    doubtful = (largest >= INFINITE) | (largest < TINY)
    if tl.max(doubtful.to(tl.int32), axis=0) > 0:
        y = _project_scaled(y, doubtful, x_ptrs, x_feature_stride, projection_ptr, D, d, LAYER_NORM, BD)
        largest = tl.max(_magnitude(y), axis=1)
    # NaN and infinity in x reach y, whatever the projection (infinity times zero is NaN), and every score of the row,
    # since yl = infinity - infinity: NaN is never better, so such a row finds no code.
    y *= _inverse_power(largest)[:, None]  # for the range of fp16

    # 2. search
    yh = y.to(tl.float16)
    yl = (y - yh.to(tl.float32)).to(tl.float16)
    best = tl.full((BM, BN // GROUP), float("-inf"), tl.float32)
    best_tile = tl.zeros((BM, BN // GROUP), tl.int32)
    if (
        PEEL
    ):  # with a second use outside the loop, Triton keeps yh and yl in registers instead of loading them every time
        best = _group_scores(yh, yl, 0, high_ptr, low_ptr, o_n, o_d, BM, BN, BD)
    for tile in range(PEEL, V // BN):
        score = _group_scores(yh, yl, tile, high_ptr, low_ptr, o_n, o_d, BM, BN, BD)
        better = score > best
        best = tl.where(better, score, best)
        best_tile = tl.where(better, tile, best_tile)

    # 3. winner: the lowest tile that holds the maximum, then the lowest code of that tile
    o_w = tl.arange(0, BN // GROUP)
    open_lanes = best == tl.max(best, axis=1)[:, None]
    winner_tile = tl.min(tl.where(open_lanes, best_tile, 2147483647), axis=1)
    open_lanes = open_lanes & (best_tile == winner_tile[:, None])
    code = tl.full((BM,), 2147483647, tl.int32)
    while tl.max(tl.max(open_lanes.to(tl.int32), axis=1), axis=0) > 0:  # twice only where codes tie
        column = tl.min(tl.where(open_lanes, o_w[None, :], BN), axis=1)
        found = column < BN
        first = winner_tile * BN + column // STEP * (GROUP * STEP) + column % STEP
        top = tl.full((BM,), float("-inf"), tl.float32)
        chosen = first
        for member in range(0, GROUP):
            candidate = first + member * STEP
            score = _rescore(yh, yl, high_ptr, low_ptr, candidate, found, o_d, BD)
            chosen = tl.where(score > top, candidate, chosen)
            top = tl.maximum(score, top)
        code = tl.where(found & (top > float("-inf")), tl.minimum(code, chosen), code)
        open_lanes = open_lanes & (o_w[None, :] > column[:, None]) & (chosen != first)[:, None]
    tl.store(out_ptr + o_m * books + i_g, tl.where(code < 2147483647, code, -1).to(tl.int64))


def split_codebook(codebook: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return fp16 ``high`` and ``low`` (G, codes, BD) with codebook * 2^n = high + low to 22 bits, zero padded to BD.

    The power of two keeps both in the range of fp16 and does not change the argmax. The codes are padded to a
    multiple with copies of code 0, which never win: of equal scores the lowest code does.
    """
    codebook = codebook.float()
    missing = -codebook.shape[-2] % multiple
    if missing:
        codebook = torch.cat([codebook, codebook[:, :1].expand(-1, missing, -1)], dim=1)
    _, exponent = torch.frexp(codebook.abs().amax(dim=(-2, -1), keepdim=True))
    scaled = torch.ldexp(codebook, -exponent)
    scaled = torch.nn.functional.pad(scaled, (0, padded_dims(codebook.shape[-1]) - codebook.shape[-1]))
    high = scaled.half()
    return high.contiguous(), (scaled - high.float()).half().contiguous()


_SPLIT: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor, Tensor]] = OrderedDict()
_MOST_SPLIT = 8


def cached_split(codebook: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """:func:`split_codebook`, computed once for a codebook that stays as it is: 11 launches fewer a call.

    Known again by its memory and version counter; the codebook is kept alive, so that no other takes its place. Not
    kept: codebooks without a version (of inference mode), and what is computed while a CUDA graph is captured, whose
    memory belongs to the graph.
    """
    capturing = codebook.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key: tuple[Any, ...] = ()
    if not codebook.is_inference():
        place = (codebook.data_ptr(), codebook._version, codebook.device, codebook.dtype)
        key = (*place, tuple(codebook.shape), codebook.stride(), multiple)
    if key in _SPLIT:
        _SPLIT.move_to_end(key)
        return _SPLIT[key][1:]
    high, low = split_codebook(codebook, multiple)
    if key and not capturing:
        _SPLIT[key] = (codebook.detach(), high, low)
        while len(_SPLIT) > _MOST_SPLIT:
            _SPLIT.popitem(last=False)
    return high, low


def padded_dims(dims: int) -> int:
    return max(16, triton.next_power_of_2(dims))


def config_for(configs: Mapping[str, Any], dims: int, rows: int) -> dict[str, Any]:
    """The configuration of a launch: by the padded number of dimensions of a code, and for few rows its own.

    Both have the same BN and GROUP, so that a row's code does not depend on the number of rows.
    """
    key = f"quantize/{padded_dims(dims)}"
    return dict(configs.get(f"{key}/few", configs[key]) if rows < FEW_ROWS else configs[key])


def quantize(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, layer_norm: bool) -> Tensor:
    """Codes (rows, G) of ``x`` (rows, D); projection (G or 1, D, d), codebook (G or 1, V, d), mask (rows,) or None."""
    rows, features = x.shape
    books = max(projection.shape[0], codebook.shape[0])
    if mask is None:
        out = torch.empty(rows, books, dtype=torch.int64, device=x.device)
        selected = count = out
    else:
        out = torch.full((rows, books), -1, dtype=torch.int64, device=x.device)
        selected = torch.argsort(mask, descending=True, stable=True)  # the chosen rows first, without asking how many
        count = mask.sum()
    if rows == 0:
        return out
    dims = codebook.shape[-1]
    config = config_for(load_configs("quantize", x.device), dims, rows * books)
    projection = projection.float().contiguous()
    high, low = cached_split(codebook, config["BN"])
    grid = (triton.cdiv(rows, config["BM"]), books)
    with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
        quantize_kernel[grid](
            x, x.stride(0), x.stride(1),
            projection, 0 if projection.shape[0] == 1 else projection.stride(0),
            high, low, 0 if high.shape[0] == 1 else high.stride(0),
            selected, count, out, rows, books, features, dims, high.shape[1],
            LAYER_NORM=layer_norm, SELECT=mask is not None, BD=padded_dims(dims), **config, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """The kernel of every shipped configuration, ahead of time: with everything, bare, and bf16 rows with a mask."""
    return [
        replace(
            compile_case(f"{file.name}-{key}", file.configs[key], dtype, int(key.split("/")[1]), layer_norm, select),
            architectures=file.serves(key),
        )
        for file in shipped("quantize")
        for key in file.keys
        for dtype, layer_norm, select in (("fp32", True, True), ("fp32", False, False), ("bf16", False, True))
    ]


def compile_case(
    name: str, config: Mapping[str, Any], dtype: str, dims: int, layer_norm: bool, select: bool
) -> CompileCase:
    """One kernel; sizes and strides divisible by 16, as those of a launch are with such D, d and V."""
    flags = {"LAYER_NORM": layer_norm, "SELECT": select}
    constants = {name: value for name, value in config.items() if name not in LAUNCH_OPTIONS}
    integers = ("x_row_stride", "projection_stride", "codebook_stride", "rows", "books", "D", "d", "V")
    pointers = {"x_ptr": f"*{dtype}", "projection_ptr": "*fp32", "high_ptr": "*fp16", "low_ptr": "*fp16"}
    return CompileCase(
        "-".join([name, dtype, *(flag.lower() for flag, value in flags.items() if value)]),
        quantize_kernel,
        {
            **pointers,
            **dict.fromkeys(("selected_ptr", "count_ptr", "out_ptr"), "*i64"),
            **dict.fromkeys(integers, "i32"),
        },
        {"x_feature_stride": 1, **flags, "BD": dims, **constants},
        config["num_warps"],
        config["num_stages"],
        (*pointers, "x_row_stride", "projection_stride", "codebook_stride", "D", "d", "V"),
        config.get("maxnreg"),
    )
