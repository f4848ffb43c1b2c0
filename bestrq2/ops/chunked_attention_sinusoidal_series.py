"""The Fourier series that stands for projected sinusoids within a window, and its tables on a device."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Period over the number of offsets, and how many frequencies lie beyond 1 rad per frame: sinusoids up to 1 rad are then
# reproduced to about 1e-8 with coefficients of about 1, so that rounding is not magnified.
_STRETCH, _BEYOND, _CUTOFF = 1.3, 8, 1e-9


@lru_cache(maxsize=64)
def fourier_series(width: int, lowest: int, highest: int, base: float = 10000.0) -> tuple[int, np.ndarray, float]:
    """A period P and coefficients (channels, width) such that, for every integer n in [lowest, highest],

        phi(n) = sum over k >= 0 of coefficients[k] cos(2 pi k n / P) + those that follow, sin(2 pi k n / P) for k >= 1

    and the largest error of it. Least squares in float64, truncated so that coefficients stay small.
    """
    offsets = np.arange(lowest, highest + 1)
    frequencies = base ** (-np.arange(0, width, 2) / width)
    angles = offsets[:, None] * frequencies
    wanted = np.stack((np.sin(angles), np.cos(angles)), axis=-1).reshape(len(offsets), -1)
    period, count = series_size(len(offsets))
    turns = 2 * np.pi * (offsets[:, None] * np.arange(count + 1) % period) / period
    basis = np.concatenate((np.cos(turns), np.sin(turns[:, 1:])), axis=1)
    coefficients = np.linalg.lstsq(basis, wanted, rcond=_CUTOFF)[0]
    return period, coefficients, float(np.abs(basis @ coefficients - wanted).max())


def series_size(offsets: int) -> tuple[int, int]:
    """The period and the number of frequencies above 0 of the series for so many offsets."""
    period = int(np.ceil(_STRETCH * offsets))
    return period, min(int(np.ceil(period / (2 * np.pi))) + _BEYOND, (period - 1) // 2)


@lru_cache(maxsize=64)
def device_tables(
    width: int, lowest: int, highest: int, base: float, padded: int, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, Tensor, Tensor, Tensor]:
    """The period; coefficients (2 padded, width) in fp32, those of cosines first, zero behind the last frequency; cos
    and sin of ``2 pi k n / P`` (P + rows, 2 padded) in fp32, n in the rows; the same in ``dtype``.

    Angles are reduced in integers and rounded once. Computed on the host and copied, so that they are complete on every
    stream when this returns.
    """
    period, coefficients, _ = fourier_series(width, lowest, highest, base)
    count = len(coefficients) // 2
    series, turns = np.zeros((2, padded, width)), np.zeros((period + rows, 2, padded))
    series[0, : count + 1], series[1, 1 : count + 1] = coefficients[: count + 1], coefficients[count + 1 :]
    angles = 2 * np.pi * (np.arange(period + rows)[:, None] * np.arange(count + 1) % period) / period
    turns[:, 0, : count + 1], turns[:, 1, : count + 1] = np.cos(angles), np.sin(angles)
    table = torch.from_numpy(turns.reshape(period + rows, -1))
    return (
        period,
        torch.from_numpy(series.reshape(2 * padded, width)).float().to(device),
        table.float().to(device),
        table.to(dtype).to(device),
    )
