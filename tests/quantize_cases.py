"""Inputs, a float64 brute force and the backends for the tests of ``ops.quantize``."""

from contextlib import contextmanager

import torch
from torch.nn.functional import normalize as unit

from bestrq2 import ops
from bestrq2.ops.common import native

BAND = 2.0**-21  # the contract: another code is allowed only if its cosine is this close to the best


def backends():
    names = [name for name in ops.available_backends() if name in ("reference", "cpu")]
    isas = []
    if "cpu" in names:
        best = native.extension().isa()
        isas = [isa for isa in ("portable", "avx2", "avx512", "avx512_vnni") if native.extension().force_isa(isa)]
        native.extension().force_isa(best)
    return ["reference", *(f"cpu-{isa}" for isa in isas)]


@contextmanager
def forced(choice):
    """Force the instruction set of one of ``backends()`` for a block; gives the backend's name."""
    name, _, isa = choice.partition("-")
    if isa:
        best = native.extension().isa()
        assert native.extension().force_isa(isa)
    try:
        yield name
    finally:
        if isa:
            native.extension().force_isa(best)


def problem(rows, features=64, dims=16, codes=512, books=None, offset=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lead = () if books is None else (books,)
    x = torch.randn(rows, features, generator=generator) * scale + offset
    projection = torch.randn(*lead, features, dims, generator=generator) * (6 / (features + dims)) ** 0.5
    return x, projection, unit(torch.randn(*lead, codes, dims, generator=generator), dim=-1)


def near_ties(rows, features, dims, codes, spread, offset=0.0, seed=0):
    """A problem with rivals of every code, about ``spread`` away: next to it, 8 and 64 codes further, and elsewhere.

    Columns of the projection add up to zero, so that ``offset`` cancels and only its rounding errors stay.
    """
    x, projection, codebook = problem(rows, features, dims, codes, offset=offset, seed=seed)
    projection = (projection.double() - projection.double().mean(0)).float()
    generator = torch.Generator().manual_seed(seed)
    bases = unit(torch.randn(8, dims, generator=generator, dtype=torch.float64), dim=-1)
    number = torch.arange(codes)
    base = (number // 2 + number // 8 * 3 + number // 64 * 5) % 8
    return x, projection, unit(bases[base] + spread * codebook, dim=-1).float()


def rows_of_extreme_size(rows, features=64):
    """Pairs: rows whose sums would overflow or whose products lose bits, and the same rows of ordinary size."""
    x = problem(rows, features)[0]
    one_huge = x.clone()
    one_huge[:, 5], one_huge[::2, 6] = 3.4e38, -3.4e38
    yield one_huge, one_huge.double() * 2.0**-120
    smallest = x.sign() * 2.0**-149
    yield smallest, smallest.double() * 2.0**149
    for dtype, tiny in ((torch.float32, 2.0**-140), (torch.bfloat16, 2.0**-125), (torch.float16, 2.0**-14)):
        for scale in (tiny, torch.finfo(dtype).max / x.abs().max().item() * 0.99):
            scaled = (x.double() * scale).to(dtype)
            yield scaled, scaled.double() / scale
    for scale in (2.0**-1020, 2.0**1021):
        yield x.double() * scale, x.double()


def cosines(x, projection, codebook, layer_norm=False):
    """Brute force in float64, written without anything from the library: (rows, codes)."""
    x = x.double()
    if layer_norm:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = x @ projection.double()
    return (y / y.norm(dim=1, keepdim=True).clamp_min(1e-300)) @ codebook.double().T


def count_wrong(codes, x, projection, codebook, layer_norm=False):
    """Rows whose code is not within the band of the float64 maximum, and rows inside the band that differ."""
    wrong = near = 0
    for rows, chosen in zip(x.split(4096), codes.split(4096)):
        gold = cosines(rows, projection, codebook, layer_norm)
        best, index = gold.max(1)
        gap = best - gold.gather(1, chosen[:, None]).squeeze(1)
        wrong += int((gap >= BAND).sum())
        near += int(((chosen != index) & (gap < BAND)).sum())
    return wrong, near
