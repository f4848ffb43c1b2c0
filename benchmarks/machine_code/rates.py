"""Capacities and rates of a multiprocessor, for arithmetic on machine code.

Sources. Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Rates:
the same guide, "Throughput of Native Arithmetic Instructions", compute capability 9.0, results per clock and
multiprocessor: fp32 add, multiply, FMA 128; compare, minimum, maximum 64; integer add, logic, shift 64; 32-bit integer
multiply-add 64; conversions 64; exponential and other special functions 16; shuffles 32. A warp on one of the four
sub-cores holds such a pipe for 32 / (rate / 4) clocks. (Rates written from memory of the guide; selects are not in it
and taken as compares.) Clock, multiprocessors, L2 and copy bandwidth, matrix rate: as in benchmarks/machine.py and the
project's notes (132 at about 1.75 GHz, 5.5 TB/s, 3.0 TB/s, 800 TFLOP/s), themselves not measured here. That
``mma.sync`` reaches about 0.63 of Hopper's dense rate is from arXiv 2402.13499, from memory too.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.machine_code.sass import Counts


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    shared: int = 228 * 1024
    reserved: int = 1024  # shared memory that each block takes beside its own


LIMITS = {80: Limits(shared=164 * 1024), 90: Limits(), 100: Limits()}


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    limited_by: str


def occupancy(architecture: int, registers: int, shared: int, num_warps: int) -> Occupancy:
    """Blocks and warps that a multiprocessor holds. Registers are given to warps in units of 256."""
    limits = LIMITS[architecture]
    per_warp = -(-registers * 32 // 256) * 256
    fits = {
        "registers": limits.registers // per_warp // num_warps,
        "shared memory": limits.shared // (shared + limits.reserved),
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
    }
    by = min(fits, key=lambda name: fits[name])
    return Occupancy(fits[by], fits[by] * num_warps, by)


SMS, SUBCORES, CLOCK = 132, 4, 1.75e9
SHARED_BYTES_PER_CLOCK = 128
L2_BYTES, HBM_BYTES = 5.5e12, 3.0e12  # per second
WARPGROUP_FMAS = 400e12  # per second, dense 16-bit: 800 TFLOP/s
WARP_FMAS = 0.63 * SMS * SUBCORES * 512 * CLOCK  # mma.sync

# pipe -> class of instruction -> clocks that a warp holds it on its sub-core
PIPES = {
    "issue": {},  # one clock for every instruction
    "fma pipe": {"fp32": 1, "half": 1, "imad": 2},
    "alu pipe": {"compare": 2, "integer": 2, "convert": 2},
    "special functions": {"special": 8},
    "shuffles": {"shuffle": 4},
}


def h100_seconds(counts: Counts, times: float) -> dict[str, float]:
    """Seconds that each part of an H100 is busy with ``times`` executions of this code by a warp, all SMs sharing."""
    per_clock = SMS * CLOCK
    seconds = {
        pipe: times * sum(clocks * counts.classes[kind] for kind, clocks in classes.items()) / (SUBCORES * per_clock)
        for pipe, classes in PIPES.items()
        if classes
    }
    seconds["issue"] = times * counts.instructions / (SUBCORES * per_clock)
    warpgroup = any(shape.split(".")[0].endswith("GMMA") for shape in counts.matrix)
    seconds["mma"] = times * counts.fmas / (WARPGROUP_FMAS if warpgroup else WARP_FMAS)
    seconds["shared memory"] = times * counts.shared_bytes / SHARED_BYTES_PER_CLOCK / per_clock
    seconds["L2"] = times * counts.global_bytes / L2_BYTES
    return seconds
