"""Targets fitted to a sample of patches before training: principal axes, centroids, and how evenly codes are used."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bestrq2 import ops

ROWS_AT_ONCE = 8192  # of the sample, converted to float64 together


def fit_axes(sample: Tensor, count: int, whiten: int, rotation_seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and strongest principal axes of a sample.

    Args:
        sample: ``(S, D)`` float32 on the CPU.
        count: number of axes K.
        whiten: how many of the K columns, the last ones, are whitened: scaled so that the sample has unit deviation
            along each axis. The axes of the others have length 1.
        rotation_seed: mix the axes by a random rotation, so that any K / G of them carry a like share; None: leave them
            in falling order. Plain and whitened axes are mixed by the same rotation.

    Returns:
        mean ``(D,)`` and axes ``(D, K)``, float32.

    Raises:
        ValueError: if the sample varies in fewer than K directions.
    """
    size, dim = sample.shape
    if size <= count:
        raise ValueError(f"expected a sample of more than {count} patches for {count} principal axes, got {size}")
    parts = sample.split(ROWS_AT_ONCE)
    mean = sum((part.double().sum(0) for part in parts), torch.zeros(dim, dtype=torch.float64, device="cpu")) / size
    moments = torch.zeros(dim, dim, dtype=torch.float64, device="cpu")
    for part in parts:
        centred = part.double() - mean
        moments += centred.T @ centred
    values, vectors = torch.linalg.eigh(moments / size)
    values, axes = values.flip(0)[:count], vectors.flip(1)[:, :count]
    # Values below the rounding of float32 patches are noise, and whitening would blow them up.
    if not bool(values[-1] > 1e-10 * values[0].clamp(min=1e-30)):
        varying = int((values > 1e-10 * values[0].clamp(min=1e-30)).sum())
        raise ValueError(f"expected a sample that varies along {count} axes, got one that varies along {varying}")
    # An eigenvector is known up to its sign: its largest entry is made positive.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    whitened = axes / values.sqrt()
    if rotation_seed is not None:
        generator = torch.Generator("cpu").manual_seed(rotation_seed)
        gaussian = torch.randn(count, count, generator=generator, dtype=torch.float64, device="cpu")
        rotation, triangle = torch.linalg.qr(gaussian)
        rotation = rotation * triangle.diagonal().sign()
        axes, whitened = axes @ rotation, whitened @ rotation
    return mean.float(), torch.cat((axes[:, : count - whiten], whitened[:, count - whiten :]), 1).float()


def move_to_centroids(vectors: Tensor, codes: Tensor, steps: int, seed: int) -> Tensor:
    """Spherical k-means (Dhillon and Modha 2001) from ``codes``, a few steps of Lloyd's algorithm.

    A step gives every vector to the code of largest cosine and moves the code to the normalised mean of the unit
    vectors that it got. A code that got none is put on a vector of the sample drawn at random; after the last step it
    stays where it is.

    Shapes: vectors ``(S, d)`` float32 and codes ``(V, d)`` unit rows, on the CPU -> ``(V, d)`` float32 unit rows.
    """
    unit = normalize(vectors.double(), dim=-1).float()
    unit = unit[unit.square().sum(-1) > 0.5]  # zero vectors have no direction
    identity = torch.eye(codes.shape[1], dtype=torch.float32, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    codes = codes.clone()
    for step in range(steps):
        nearest = ops.quantize(unit, identity, codes)
        sums = torch.zeros(codes.shape, dtype=torch.float64, device="cpu").index_add_(0, nearest, unit.double())
        length = sums.norm(dim=-1, keepdim=True)
        found = (torch.bincount(nearest, minlength=len(codes)) > 0) & (length[:, 0] > 1e-6)
        codes = torch.where(found[:, None], (sums / length.clamp(min=1e-30)).float(), codes)
        dead = torch.nonzero(~found)[:, 0]
        if step < steps - 1 and len(dead):
            drawn = torch.randperm(len(unit), generator=generator, device="cpu")[: len(dead)]
            codes[dead[: len(drawn)]] = unit[drawn]
    return normalize(codes.double(), dim=-1).float()


def code_entropy(codes: Tensor, codebook_size: int) -> float:
    """Entropy in bits of the distribution of ``codes (..., G)`` over ``codebook_size`` codes, mean over codebooks."""
    entropies = []
    for book in codes.flatten(0, -2).T:
        share = torch.bincount(book, minlength=codebook_size).double() / max(1, book.numel())
        entropies.append(-float((share * share.clamp(min=1e-300).log()).sum()) / math.log(2))
    return sum(entropies) / len(entropies)
