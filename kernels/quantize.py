"""Random projection and nearest code on GPUs: one kernel, nothing of size rows x codes.

Each program takes BM rows and one codebook.

1. Projection, y (BM, d): fp32 FMAs over BK features at a time; the partial sums are added with their rounding errors
   (raw decibels share an offset of several deviations, which cancels here). Layer norm needs only the mean: the
   variance scales y, and no scale of y changes the argmax. y is then scaled by a power of two.
2. Search: y = yh + yl and c = ch + cl in fp16, scores yl.ch + yh.cl + yh.ch in fp32 (22 bits of every factor). Codes
   pass in tiles of BN. GROUP codes of a tile, STEP apart, lie in the registers of one thread and share a lane: it keeps
   the two largest maxima of a group, with the number of the tile in their lowest bits. That is 1.4 operations a score,
   without exchange between threads.
3. Winner: the lane that holds the row's maximum; which code of the group it was is settled by scoring all again.
4. Certainty: an error bound of every score, from the sizes of the row, the projection and the codebook, leaves one code
   or several. Where it leaves several, the row is computed once more in float64, as the definition does.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import CompileCase
from .integers import ceil_div, power_of_2
from .quantize_certainty import EXACT_CODES, EXACT_FEATURES, exact_code, is_zero, magnitude, margin
from .tuning import load_configs, shipped

GROUP, STEP = tl.constexpr(8), tl.constexpr(8)  # 8 codes, 8 apart, share a running maximum
FEW_ROWS = 65536  # rows x codebooks: below, tiles of fewer rows occupy the whole GPU
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a configuration; the rest are compile-time constants


def _tile(rows: int, columns: int, warps: int, stages: int, peel: int) -> dict[str, Any]:
    return {"BM": rows, "BN": columns, "BK": 16, "PEEL": peel, "num_warps": warps, "num_stages": stages}


CANDIDATES = {
    "quantize/16": [
        {**_tile(rows, columns, warps, stages, peel), "maxnreg": registers}
        for rows, columns, warps, registers, peel, all_stages in (
            (256, 64, 8, 128, 0, (3,)),
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
    lost = tl.zeros((BM,), tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        inside = (o_k < D)[None, :]
        x = tl.load(x_ptrs[:, None] + o_k.to(tl.int64)[None, :] * x_feature_stride, mask=inside, other=0.0)
        x = x.to(tl.float32)
        total, lost = _add(total, lost, tl.sum(tl.where(inside, x - first[:, None], 0.0), axis=1))
    return first, (total + lost) / D


@triton.jit
def _add(total, lost, part):
    """The sum, and the exact rounding errors of such sums so far (Knuth)."""
    now = total + part
    taken = now - total
    return now, lost + ((total - (now - taken)) + (part - taken))


@triton.jit
def _inverse_power(bits):
    """A power of two that takes a number of this magnitude to [1, 8), a subnormal one below 1: an exact factor."""
    exponent = tl.minimum(bits & 0x7F800000, 0x7E000000)
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True)  # inverts the exponent's bits


@triton.jit
def _rescore(yh, yl, high_ptr, low_ptr, code, o_d, BD: tl.constexpr):
    """fp32 score of one code per row."""
    y = yh.to(tl.float32) + yl.to(tl.float32)
    offset = code.to(tl.int64)[:, None] * BD + o_d[None, :]  # [BM, BD]
    c = tl.load(high_ptr + offset).to(tl.float32)
    c += tl.load(low_ptr + offset).to(tl.float32)
    return tl.sum(y * c, axis=1)


@triton.jit
def _group_scores(
    yh, yl, tile, number_bits, high_ptr, low_ptr, o_n, o_d, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """The largest score of each group of a tile, its lowest bits replaced by the tile's number: [BM, BN // GROUP]."""
    offset = (tile * BN + o_n).to(tl.int64)[None, :] * BD + o_d[:, None]  # [BD, BN]
    ch = tl.load(high_ptr + offset)
    cl = tl.load(low_ptr + offset)
    score = tl.dot(yh, ch, tl.dot(yh, cl, tl.dot(yl, ch)))  # [BM, BN], small terms first
    score = tl.max(tl.reshape(score, [BM, BN // (GROUP * STEP), GROUP, STEP]), axis=2)  # within registers
    bits = tl.reshape(score, [BM, BN // GROUP]).to(tl.int32, bitcast=True)
    return ((bits & ~number_bits) | tile).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x_ptr, x_row_stride, x_feature_stride,  # (rows, D)
    projection_ptr, projection_step,  # (G, D, BD) fp32 contiguous; step 0: one for all codebooks, else 1
    high_ptr, low_ptr,  # (G, V rounded up to BN, BD) fp16 contiguous, times a power of two
    codebook_ptr, reach_ptr, codebook_step,  # (G, V, BD) and (G,) fp32: largest |high + low|; step as above
    selected_ptr, count_ptr,  # row numbers, how many of them; None: every row
    out_ptr,  # (rows, G), int64
    rows, D, V, number_bits,
    LAYER_NORM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PEEL: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    i_g = tl.program_id(1).to(tl.int64)
    count = rows
    if count_ptr is not None:
        count = tl.load(count_ptr)
    if i_m * BM >= count:
        return
    # A block that is not full repeats the last row: all its threads store the same code.
    last = tl.minimum(count - 1 - i_m * BM, BM - 1).to(tl.int32)
    o_m = i_m * BM + tl.minimum(tl.arange(0, BM), last)
    if selected_ptr is not None:
        o_m = tl.load(selected_ptr + o_m)
    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    tiles = tl.cdiv(V, BN)
    x_ptrs = x_ptr + o_m * x_row_stride
    i_c = i_g * codebook_step
    projection_ptr += i_g * projection_step * D * BD
    high_ptr += i_c * tiles * (BN * BD)
    low_ptr += i_c * tiles * (BN * BD)

    # 1. projection
    shift = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM,), tl.float32)
    if LAYER_NORM:
        shift, mean = _centre(x_ptrs, x_feature_stride, D, BM, BK)
    y = tl.zeros((BM, BD), tl.float32)
    lost = tl.zeros((BM, BD), tl.float32)
    size2 = tl.zeros((BM,), tl.float32)
    projection2 = tl.zeros((BK, BD), tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        inside = (o_k < D)[None, :]
        x = tl.load(x_ptrs[:, None] + o_k.to(tl.int64)[None, :] * x_feature_stride, mask=inside, other=0.0)
        x = x.to(tl.float32)  # [BM, BK]
        if LAYER_NORM:
            x = tl.where(inside, (x - shift[:, None]) - mean[:, None], 0.0)
        p = tl.load(projection_ptr + o_k[:, None] * BD + o_d[None, :], mask=(o_k < D)[:, None], other=0.0)  # [BK, BD]
        size2 += tl.sum(x * x, axis=1)
        projection2 += p * p
        y, lost = _add(y, lost, tl.dot(x, p, input_precision="ieee"))
    y += lost
    scale = _inverse_power(tl.max(magnitude(y), axis=1))  # for the range of fp16
    projection2 = tl.sum(tl.sum(projection2, axis=1), axis=0)
    reach = tl.load(reach_ptr + i_c)
    bound = margin(size2, mean, projection2, y, scale, reach, D, number_bits, LAYER_NORM, BD, BK)
    y *= scale[:, None]

    # 2. search
    yh = y.to(tl.float16)
    yl = (y - yh.to(tl.float32)).to(tl.float16)
    best = tl.full((BM, BN // GROUP), float("-inf"), tl.float32)
    second = tl.full((BM, BN // GROUP), float("-inf"), tl.float32)
    if (
        PEEL
    ):  # with a second use outside the loop, Triton keeps yh and yl in registers instead of loading them every time
        best = _group_scores(yh, yl, 0, number_bits, high_ptr, low_ptr, o_n, o_d, BM, BN, BD)
    for tile in range(PEEL, tiles):
        score = _group_scores(yh, yl, tile, number_bits, high_ptr, low_ptr, o_n, o_d, BM, BN, BD)
        second = tl.maximum(second, tl.minimum(best, score))
        best = tl.maximum(best, score)

    # 3. winner: the code of the best group, unless another score is so close that rounding may have chosen
    o_w = tl.arange(0, BN // GROUP)[None, :]
    top = tl.max(best, axis=1)
    column = tl.min(tl.where(best == top[:, None], o_w, BN // GROUP - 1), axis=1)
    rival = tl.max(tl.maximum(second, tl.where(o_w == column[:, None], float("-inf"), best)), axis=1)
    close = ~(rival < top - bound)
    tile = tl.minimum(top.to(tl.int32, bitcast=True) & number_bits, tiles - 1)
    first = tile * BN + column // STEP * (GROUP * STEP) + column % STEP
    code = first
    top = tl.full((BM,), float("-inf"), tl.float32)
    rival = tl.full((BM,), float("-inf"), tl.float32)
    for member in range(0, GROUP):
        candidate = first + member * STEP
        score = _rescore(yh, yl, high_ptr, low_ptr, candidate, o_d, BD)
        code = tl.where(score > top, candidate, code)
        rival = tl.maximum(rival, tl.minimum(top, score))
        top = tl.maximum(top, score)
    close = close | ~(rival < top - bound)

    # 4. close rows as the definition has them
    doubtful = bound == float("inf")
    if tl.max(doubtful.to(tl.int32), axis=0) > 0:
        zero = is_zero(doubtful, x_ptrs, x_feature_stride, D, LAYER_NORM)
        code = tl.where(zero, 0, code)
        close = close & ~zero
    codebook_ptr += i_c * V * BD
    while tl.max(close.to(tl.int32), axis=0) > 0:
        row = tl.min(tl.where(close, o_m, 9223372036854775807), axis=0)
        exact = exact_code(
            x_ptr + row * x_row_stride, x_feature_stride, projection_ptr, codebook_ptr, D, V,
            LAYER_NORM, BD, EXACT_FEATURES, EXACT_CODES,
        )  # fmt: skip
        code = tl.where(o_m == row, exact, code)
        close = close & (o_m != row)
    tl.store(out_ptr + o_m * tl.num_programs(1) + i_g, code.to(tl.int64))


def split_codebook(codebook: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return fp16 ``high`` and ``low`` (G, codes, BD) with codebook * 2^n = high + low to 22 bits, zero padded to BD.

    The power of two keeps both in the range of fp16 and does not change the argmax. The codes are padded to a
    multiple with copies of code 0, which never win: of equal scores the lowest code does.
    """
    codebook = padded(codebook)
    missing = -codebook.shape[-2] % multiple
    if missing:
        codebook = torch.cat([codebook, codebook[:, :1].expand(-1, missing, -1)], dim=1)
    _, exponent = torch.frexp(codebook.abs().amax(dim=(-2, -1), keepdim=True))
    scaled = torch.ldexp(codebook, -exponent)
    high = scaled.half()
    return high.contiguous(), (scaled - high.float()).half().contiguous()


@dataclass(frozen=True)
class SplitCodebook:
    """A codebook as the kernel reads it; G is 1 where all codebooks share it."""

    codes: Tensor  # (G, V, BD) fp32, contiguous
    high: Tensor  # (G, V rounded up, BD) fp16
    low: Tensor
    reach: Tensor  # (G,) fp32: the largest norm of a code of high + low


def prepare(codebook: Tensor, multiple: int) -> SplitCodebook:
    """Split a codebook and measure its longest code, rounded upwards."""
    high, low = split_codebook(codebook, multiple)
    reach = (high.double() + low.double()).norm(dim=-1).amax(dim=-1) * (1 + 2**-20)
    return SplitCodebook(padded(codebook.detach()), high, low, reach.float())


@dataclass
class _Kept:
    codebook: Tensor  # kept alive, so that no other takes its place in memory
    split: SplitCodebook
    computed: Any  # event behind the computation; None on a CPU
    streams: set[int]  # whose later work comes behind it


_PREPARED: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
_MOST_PREPARED = 8
_PREPARING = Lock()


def cached_split(codebook: Tensor, multiple: int) -> SplitCodebook:
    """:func:`prepare`, computed once for a codebook that stays as it is: 17 launches fewer a call.

    Known again by its memory and version counter. Nothing is kept of a codebook without a version (of inference mode).
    A CUDA graph is given none and has the computation in it: it reads the codebook as it is at every replay, and no
    memory that may be freed before.
    """
    on_gpu = codebook.device.type == "cuda"
    if codebook.is_inference() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return prepare(codebook, multiple)
    place = (codebook.data_ptr(), codebook._version, codebook.device, codebook.dtype)
    key = (*place, tuple(codebook.shape), codebook.stride(), multiple)
    stream = torch.cuda.current_stream(codebook.device) if on_gpu else None
    with _PREPARING:
        if key not in _PREPARED:
            split = prepare(codebook, multiple)
            computed = None if stream is None else stream.record_event()
            _PREPARED[key] = _Kept(codebook.detach(), split, computed, {0 if stream is None else stream.cuda_stream})
            while len(_PREPARED) > _MOST_PREPARED:
                _PREPARED.popitem(last=False)
            return split
        _PREPARED.move_to_end(key)
        kept = _PREPARED[key]
        if stream is not None and stream.cuda_stream not in kept.streams:
            _wait_for(kept, stream)
        return kept.split


def _wait_for(kept: _Kept, stream: Any) -> None:
    """Let another stream wait for the computation, and keep the memory until that stream is done with it."""
    stream.wait_event(kept.computed)
    for tensor in vars(kept.split).values():
        tensor.record_stream(stream)
    kept.streams.add(stream.cuda_stream)


def padded_dims(dims: int) -> int:
    return max(16, power_of_2(dims))


def padded(matrices: Tensor) -> Tensor:
    """fp32, contiguous, with columns of zeros up to BD: rows that begin anywhere in memory would make kernels spill."""
    missing = padded_dims(matrices.shape[-1]) - matrices.shape[-1]
    matrices = matrices.float()
    return (torch.nn.functional.pad(matrices, (0, missing)) if missing else matrices).contiguous()


def config_for(configs: Mapping[str, Any], dims: int, rows: int) -> dict[str, Any]:
    """The configuration of a launch: by the padded number of dimensions of a code, and for few rows its own.

    A row's code depends on neither: it is the best one in exact arithmetic.
    """
    key = f"quantize/{padded_dims(dims)}"
    return dict(configs.get(f"{key}/few", configs[key]) if rows < FEW_ROWS else configs[key])


def quantize(x: Tensor, projection: Tensor, codebook: Tensor, mask: Tensor | None, layer_norm: bool) -> Tensor:
    """Codes (rows, G) of ``x`` (rows, D); projection (G or 1, D, d), codebook (G or 1, V, d), mask (rows,) or None."""
    rows, features = x.shape
    books = max(projection.shape[0], codebook.shape[0])
    selected = count = None
    if mask is None:
        out = torch.empty(rows, books, dtype=torch.int64, device=x.device)
    else:
        out = torch.full((rows, books), -1, dtype=torch.int64, device=x.device)
        selected = torch.argsort(mask, descending=True, stable=True)  # the chosen rows first, without asking how many
        count = mask.sum()
    if rows == 0:
        return out
    dims = codebook.shape[-1]
    config = config_for(load_configs("quantize", x.device), dims, rows * books)
    projection = padded(projection)
    split = cached_split(codebook, config["BN"])
    grid = (ceil_div(rows, config["BM"]), books)
    with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
        quantize_kernel[grid](
            x, x.stride(0), x.stride(1), projection, int(len(projection) > 1),
            split.high, split.low, split.codes, split.reach, int(len(codebook) > 1),
            selected, count, out, rows, features, codebook.shape[1], number_bits(split.high.shape[1], config),
            LAYER_NORM=layer_norm, BD=padded_dims(dims), **config, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def number_bits(codes: int, config: Mapping[str, Any]) -> int:
    """The bits of a score that hold the number of its tile."""
    return power_of_2(ceil_div(codes, config["BN"])) - 1


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
    """One kernel; sizes and strides divisible by 16, as those of a launch are with such D and V."""
    flags = {"layer_norm": layer_norm, "select": select}
    constants = {name: value for name, value in config.items() if name not in LAUNCH_OPTIONS}
    if not select:
        constants |= {"selected_ptr": None, "count_ptr": None}
    pointers = {"x_ptr": f"*{dtype}", "projection_ptr": "*fp32", "high_ptr": "*fp16", "low_ptr": "*fp16"}
    pointers |= {"codebook_ptr": "*fp32", "reach_ptr": "*fp32"}
    integers = {"x_row_stride": "i32", **dict.fromkeys(("rows", "D", "V", "number_bits"), "i32")}
    rows = {"selected_ptr": "*i64", "count_ptr": "*i64"} if select else {}
    return CompileCase(
        "-".join([name, dtype, *(flag for flag, value in flags.items() if value)]),
        quantize_kernel,
        {**pointers, **rows, "out_ptr": "*i64", "projection_step": "i32", "codebook_step": "i32", **integers},
        {"x_feature_stride": 1, "LAYER_NORM": layer_norm, "BD": dims, **constants},
        config["num_warps"],
        config["num_stages"],
        (*pointers, "x_row_stride", "D", "V"),
        config.get("maxnreg"),
    )
