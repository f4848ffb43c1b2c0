"""Constants of a log-mel front end: mel filters and tables of the fused kernels, made once per setting on the CPU."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """See ``csrc/log_mel/log_mel.h`` for the use of each; all are contiguous CPU tensors, int64 or float64.

    Attributes:
        window: ``(W)`` of even length; a zero is appended to a window of odd length.
        radices, twiddles, places, half_turns: the complex FFT of ``n_fft / 2`` points.
        bins, offsets, weights: of the filters; the weights contain ``1 / (4 sum(window^2))``.
    """

    window: Tensor
    radices: Tensor
    twiddles: Tensor
    places: Tensor
    half_turns: Tensor
    bins: Tensor
    offsets: Tensor
    weights: Tensor

    def on(self, device: torch.device, bands: int, bins: int) -> tuple[Tensor, Tensor, Tensor]:
        """Window and :meth:`blocks` on a device, copied there once."""
        return _copied(self, device, bands, bins)

    def blocks(self, bands: int, bins: int) -> tuple[Tensor, Tensor]:
        """The filters for kernels that compute blocks of ``bands`` neighbouring bands, ``bins`` bins at a time.

        Returns:
            filters: ``(n_fft / 2 + 1 + bins, blocks * bands)`` float64, dense, ``1 / sum(window^2)`` in them. The rows
                and columns that are added are zero.
            edges: ``(blocks, 2)`` int32, the first bin of a block with a weight and the one after the last.
        """
        counts = self.offsets.diff()
        num_blocks = -(-len(counts) // bands)
        filters = torch.zeros(len(self.places) + 1 + bins, num_blocks * bands, dtype=torch.float64, device="cpu")
        edges = torch.zeros(num_blocks, 2, dtype=torch.int32, device="cpu")
        for band, (first, count, offset) in enumerate(zip(self.bins.tolist(), counts.tolist(), self.offsets.tolist())):
            filters[first : first + count, band] = 4 * self.weights[offset : offset + count]
        for block, columns in enumerate(filters.split(bands, dim=1)):
            used = columns.any(dim=1).nonzero().flatten().tolist()
            if used:
                edges[block, 0], edges[block, 1] = used[0], used[-1] + 1
        return filters, edges


@cache
def _copied(constants: Tables, device: torch.device, bands: int, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        return tuple(t.to(device) for t in (constants.window, *constants.blocks(bands, bins)))  # type: ignore[return-value]


def hertz_to_mel(hertz: float) -> float:
    """HTK mel scale: ``2595 log10(1 + f / 700)``."""
    return 2595.0 * math.log10(1.0 + hertz / 700.0)


def mel_filters(n_fft: int, num_mels: int, sampling_rate: int, f_min: float, f_max: float) -> Tensor:
    """Triangular HTK filters without area normalisation.

    Computed in float32 because the published transform is: both then agree to rounding, including on filter edges.

    Returns:
        ``(n_fft // 2 + 1, num_mels)`` float32 weights.
    """
    bins = torch.linspace(0, sampling_rate // 2, n_fft // 2 + 1, device="cpu", dtype=torch.float32)
    mels = torch.linspace(hertz_to_mel(f_min), hertz_to_mel(f_max), num_mels + 2, device="cpu", dtype=torch.float32)
    edges = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    widths = edges[1:] - edges[:-1]
    distance = edges[None, :] - bins[:, None]  # (bins, mels + 2)
    rising = -distance[:, :-2] / widths[:-1]
    falling = distance[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp(min=0.0)


def exact_constants(
    n_fft: int, win_length: int, num_mels: int, sampling_rate: int, f_min: float, f_max: float
) -> tuple[Tensor, Tensor]:
    """Hann window ``(win_length,)`` and mel filters ``(n_fft // 2 + 1, num_mels)``, float64 on the CPU; copy them."""
    found = _exact_constants(n_fft, win_length, num_mels, sampling_rate, f_min, f_max)
    if type(found[0]) is not Tensor:  # made without values, under a FakeTensorMode, and of no use behind it
        _exact_constants.cache_clear()
    return found


@cache
def _exact_constants(
    n_fft: int, win_length: int, num_mels: int, sampling_rate: int, f_min: float, f_max: float
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        window = torch.hann_window(win_length, dtype=torch.float64, device="cpu")
        return window, mel_filters(n_fft, num_mels, sampling_rate, f_min, f_max).double()


def passes(points: int) -> tuple[int, ...] | None:
    """Radices whose product is ``points``, largest first, or None where it has other prime factors than 2, 3 and 5.

    A power of two is split into as few passes as possible, 8 before 4: 512 = 8 * 8 * 8, 1024 = 8 * 8 * 4 * 4.
    """
    radices = []
    twos = (points & -points).bit_length() - 1 if points > 0 else 0
    rest = points >> twos
    while twos:
        step = 3 if twos == 3 or twos > 4 else min(twos, 2)
        radices.append(2**step)
        twos -= step
    for prime in (5, 3):
        while rest % prime == 0 and rest > 1:
            radices.append(prime)
            rest //= prime
    return tuple(radices) if rest == 1 and radices else None


def roots(count: int, numerators: Tensor) -> Tensor:
    """``exp(-2 pi i k / count)`` for int64 ``k`` of any shape -> ``(..., 2)`` float64."""
    angles = (numerators % count).double() * (2 * torch.pi / count)
    return torch.stack((angles.cos(), -angles.sin()), dim=-1)


def sparse(filters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Non-zero stretch of every column of ``(bins, bands)``: first bins ``(F)``, offsets ``(F + 1)``, weights."""
    bins, parts = [], []
    for column in filters.T:
        present = column.nonzero().flatten()
        first, last = (int(present[0]), int(present[-1])) if len(present) else (0, -1)
        bins.append(first)
        parts.append(column[first : last + 1])
    counts = torch.tensor([len(part) for part in parts], device="cpu")
    return (
        torch.tensor(bins, device="cpu"),
        torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0))),
        torch.cat(parts),
    )


def fft_tables(points: int, radices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Twiddles of the passes, one after the other, and the place of every output point.

    The last of several passes needs no twiddles.
    """
    twiddles, places, block = (
        [torch.zeros(0, dtype=torch.float64, device="cpu")],
        torch.zeros(points, dtype=torch.int64, device="cpu"),
        points,
    )
    rest = torch.arange(points, device="cpu")
    for radix in radices:
        m = block // radix
        places += (rest % radix) * m
        rest = rest // radix
        if m > 1 or block == points:  # the first pass multiplies even by ones
            turns = torch.outer(torch.arange(m, device="cpu"), torch.arange(1, radix, device="cpu"))
            twiddles.append(roots(block, turns).flatten())
        block = m
    return torch.cat(twiddles).contiguous(), places


@cache
def tables(n_fft: int, win_length: int, num_mels: int, sampling_rate: int, f_min: float, f_max: float) -> Tables | None:
    """Tables of one setting, or None where the kernels have no FFT of this size."""
    radices = passes(n_fft // 2)
    if n_fft % 2 or radices is None:
        return None
    with torch.device("cpu"):
        window = torch.hann_window(win_length, dtype=torch.float64, device="cpu")
        filters = mel_filters(n_fft, num_mels, sampling_rate, f_min, f_max).double()
        bins, offsets, weights = sparse(filters)
        weights = weights / (4 * window.square().sum())
        twiddles, places = fft_tables(n_fft // 2, radices)
        return Tables(
            window=torch.nn.functional.pad(window, (0, win_length % 2)),
            radices=torch.tensor(radices, device="cpu"),
            twiddles=twiddles,
            places=places,
            half_turns=roots(n_fft, torch.arange(n_fft // 4 + 1, device="cpu")).contiguous(),
            bins=bins,
            offsets=offsets,
            weights=weights.contiguous(),
        )
