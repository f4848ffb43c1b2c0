"""Iterations of each loop of the kernels at a reference shape, which turn counts per iteration into a bound.

A loop is recognised by what it holds, because compilers reorder and unroll; how often it runs follows from the work
that one iteration holds, so an unrolled loop runs less often. Loops that no phase claims are not on that path
(the branch of a row of weight zero) and count as never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.machine_code import rates
from benchmarks.machine_code.sass import LANES, Code, Counts, Loop

Trips = Callable[[Counts], float]


@dataclass(frozen=True)
class Phase:
    name: str
    claims: Callable[[Loop], bool]
    trips: Trips  # iterations of a warp, from the counts of one iteration


@dataclass(frozen=True)
class Workload:
    case: str  # name of the compile case
    shape: str
    unit: str
    blocks: float
    num_warps: int
    units: float  # in all blocks
    phases: tuple[Phase, ...]
    hbm_bytes: float


@dataclass(frozen=True)
class Bound:
    """Arithmetic from the machine code, not a measurement."""

    busy: Mapping[str, float]  # seconds that each part is busy
    hot: str  # name of the phase that issues most
    per_unit: Mapping[str, float]  # instructions of one lane per unit of work, by class, in the hot phase
    instructions: int  # of one iteration of the hot phase
    matrix: Mapping[str, int]
    trips: float
    missing: tuple[str, ...]  # phases without a loop: the bound lacks them

    @property
    def limit(self) -> str:
        return max(self.busy, key=lambda part: self.busy[part])

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.busy[self.limit]


def bound(code: Code, workload: Workload) -> Bound:
    """Time of the busiest part of an H100; every part works alone and never waits."""
    free, warps = list(code.loops), workload.blocks * workload.num_warps
    pieces: list[tuple[str, Counts, float]] = [("outside loops", code.outside, 1.0)]
    missing = []
    for phase in workload.phases:
        claimed = [loop for loop in free if phase.claims(loop)]
        free = [loop for loop in free if loop not in claimed]
        # A second loop of a kind is the remainder of an unrolled one: the largest does the work.
        largest = max(claimed, key=lambda loop: loop.counts.instructions, default=None)
        if largest is None:
            missing.append(phase.name)
        else:
            pieces.append((phase.name, largest.counts, phase.trips(largest.counts)))
    busy: dict[str, float] = {}
    for _, counts, trips in pieces:
        for part, seconds in rates.h100_seconds(counts, trips * warps).items():
            busy[part] = busy.get(part, 0.0) + seconds
    busy["HBM"] = workload.hbm_bytes / rates.HBM_BYTES
    name, counts, trips = max(pieces[1:] or pieces, key=lambda piece: piece[1].instructions * piece[2])
    scale = trips * warps * LANES / workload.units
    per_unit = {kind: number * scale for kind, number in counts.classes.items()}
    return Bound(busy, name, per_unit, counts.instructions, counts.matrix, trips, tuple(missing))


def _has_mma(loop: Loop) -> bool:
    return loop.counts.fmas > 0


def _matrix_phase(name: str, fmas: float) -> Phase:
    """The loop of a matrix product with ``fmas`` multiply-adds a warp."""
    return Phase(name, _has_mma, lambda counts: fmas / counts.fmas)


def _quantize(constants: Mapping[str, Any], num_warps: int) -> Workload:
    rows, features, width, codes = 1_000_000, 256, 16, 8192
    tile = constants["BM"]
    fmas = 3.0 * tile * codes * width / num_warps
    return Workload(
        "default.json-quantize/16-fp32",
        "1000000x256->16x8192",
        "score",
        rows / tile,
        num_warps,
        float(rows) * codes,
        (
            _matrix_phase("search", fmas),
            Phase("projection", lambda loop: loop.counts.classes["fp32"] >= 64, lambda _: features / constants["BK"]),
            Phase("rescoring", lambda loop: loop.innermost and loop.counts.read_bytes > 0, lambda _: 8.0),
        ),
        rows * (features * 4.0 + 8.0),
    )


def _cross_entropy(kernel: str, constants: Mapping[str, Any], num_warps: int) -> Workload:
    rows, features, classes = 16384, 768, 8192
    inputs = 2.0 * features * (rows + classes)  # bf16
    shape, unit = "16384x768->8192 bf16", "row, class"
    case = f"{kernel}-default.json-bf16"
    if kernel == "softmax_gradient":

        def trips(counts: Counts) -> float:
            return 2.0 * classes / num_warps / counts.read_bytes

        if constants["WHOLE"]:  # the row stays in registers: no loop
            return Workload(f"{case}-gradient-whole", shape, unit, rows, num_warps, rows * classes, (), 0.0)
        phases: tuple[Phase, ...] = (
            Phase("gradient", lambda loop: bool(loop.counts.classes["stg"] and loop.counts.read_bytes), trips),
            Phase("statistics", lambda loop: loop.counts.classes["special"] > 0, trips),
        )
        case += "-gradient"
        return Workload(case, shape, unit, rows, num_warps, rows * classes, phases, 0.0)  # the logits stay in the L2
    blocks = {
        "logits": rows / constants["BM"] * classes / constants["BN"],
        "hidden_gradient": rows / constants["BM"] * features / constants["BN"],
        "weight_gradient": classes / constants["BM"] * features / constants["BN"] * rows / 1536,  # once a chunk
        "loss": 2 * rates.SMS,  # enough shares for two blocks on every multiprocessor
    }[kernel]
    fmas = float(rows) * features * classes / blocks / num_warps
    output = {"hidden_gradient": 2.0 * rows * features, "weight_gradient": 8.0 * classes * features * rows / 1536}
    phases = (_matrix_phase("product", fmas),)
    if kernel == "loss":  # the product's loop lies inside that over the classes
        tiles = rows * classes / constants["BM"] / constants["BN"] / blocks
        phases += (Phase("softmax", lambda loop: loop.counts.classes["special"] > 0, lambda _: tiles),)
    hbm = inputs + output.get(kernel, 0.0)
    return Workload(case, shape, unit, blocks, num_warps, float(rows) * classes, phases, hbm)


def _attention(constants: Mapping[str, Any], num_warps: int) -> Workload:
    batch, heads, frames, chunk, left, size = 16, 8, 1500, 64, 256, 64
    rows, columns = constants["BM"], constants["BN"]
    tiles = pairs = 0
    for begin in range(0, frames, rows):
        end = min(begin + rows, frames)
        low, high = max(begin // chunk * chunk - left, 0), min((end - 1) // chunk * chunk + chunk, frames)
        tiles += -(-high // columns) - low // columns
    for begin in range(0, frames, chunk):
        end = min(begin + chunk, frames)
        pairs += (end - begin) * (end - max(begin - left, 0))
    query_tiles = -(-frames // rows)
    fmas = 2.0 * rows * columns * size / num_warps
    band_row = (chunk + left + chunk - 1 + 14 + 15) // 16 * 16 + 1
    tensors = 4.0 * batch * heads * frames * size * 2 + batch * heads * frames * band_row * 2
    return Workload(
        "default.json-forward/64",
        "B16 H8 T1500 d64, chunk 64, 256 frames left, bf16",
        "visible (query, key)",
        float(batch * heads * query_tiles),
        num_warps,
        float(batch * heads * pairs),
        (_matrix_phase("keys", fmas * tiles / query_tiles),),
        tensors,
    )


def workload_of(op: str, case: Any) -> Workload | None:
    """Work of ``case`` at its reference shape, or None if it is another variant."""
    constants, warps = case.constexprs, case.num_warps
    if op == "quantize":
        found: Workload | None = _quantize(constants, warps)
    elif op == "masked_cross_entropy":
        kernel = case.kernel.__name__.removesuffix("_kernel")
        if kernel == "merge":
            return None
        found = _cross_entropy(kernel, constants, warps)
    elif op == "chunked_attention":
        found = _attention(constants, warps) if case.name.startswith("default.json-forward/64") else None
    else:
        found = None
    return found if found and found.case == case.name else None
