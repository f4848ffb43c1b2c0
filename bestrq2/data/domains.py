"""Shares of domains: which domain the n-th training sample is from, exact at every n and found in constant time."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isfinite, lcm

import numpy as np

from bestrq2.data.files import AudioFile
from bestrq2.errors import DataError

__all__ = ["DomainSchedule", "apportion", "select_domains"]

LARGEST_PERIOD = 1 << 16  # shares that need a longer period are rounded to 1 / LARGEST_PERIOD


class DomainSchedule:
    """A periodic sequence of domains in which every domain's count stays within one of its exact share.

    After n draws, for every n and every domain d, ``|count_d(n) - n * share_d| < 1`` (Tijdeman 1980, "The chairman
    assignment problem": the bound is 1 - 1 / (2 k - 2) for k domains). One period is computed here; after each the
    counts are exact, so any draw is found at once.

    Args:
        weights: a positive number for every domain, in any unit; shares are ``weight / sum(weights)``. Weights whose
            common denominator exceeds 2^16 are rounded to that, at least 1 for each domain.

    ``names`` are the domains in sorted order, ``quotas`` their draws in a period of ``period`` draws.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise ValueError("domain weights: expected at least one domain")
        for name, weight in weights.items():
            if isinstance(weight, bool) or not (isfinite(weight) and weight > 0):
                raise ValueError(f"domain weights: expected a positive number for {name!r}, got {weight!r}")
        self.names = tuple(sorted(weights))
        exact = [Fraction(str(weights[name])) for name in self.names]
        shares = [weight / sum(exact) for weight in exact]
        self.period = lcm(*(share.denominator for share in shares))
        if self.period > LARGEST_PERIOD:
            self.period = LARGEST_PERIOD
            self.quotas = [1 + part for part in apportion(self.period - len(shares), shares)]
        else:
            self.quotas = [int(share * self.period) for share in shares]
        self._domains = _tijdeman(self.quotas)
        counts = np.zeros(len(self.names), np.int64)
        self._before = np.zeros(self.period, np.int64)  # earlier draws of the same domain in the period
        for place, domain in enumerate(self._domains):
            self._before[place] = counts[domain]
            counts[domain] += 1

    def draw(self, index: int) -> tuple[int, int]:
        """Draw ``index``: (position of its domain in ``names``, how many draws that domain had before)."""
        cycle, place = divmod(index, self.period)
        domain = int(self._domains[place])
        return domain, cycle * self.quotas[domain] + int(self._before[place])


def _tijdeman(quotas: Sequence[int]) -> np.ndarray:
    """(sum of quotas,) domain of every draw of a period, by Tijdeman's rule in integers.

    Among the domains whose lag n * share - count would reach 1 / (2 k - 2), the one that must be drawn first.
    """
    period, count = sum(quotas), len(quotas)
    domains = np.zeros(period, np.int64)
    if count == 1:
        return domains
    scale = 2 * count - 2
    drawn = [0] * count
    for place in range(period):
        best, best_room, best_quota = -1, 0, 1
        for domain, quota in enumerate(quotas):
            lag = scale * ((place + 1) * quota - period * drawn[domain])  # in units of 1 / (scale * period)
            room = scale * period - period - lag
            if lag >= period and (best < 0 or room * best_quota < best_room * quota):
                best, best_room, best_quota = domain, room, quota
        domains[place] = best
        drawn[best] += 1
    return domains


def apportion(total: int, weights: Sequence[int] | Sequence[Fraction]) -> list[int]:
    """Split ``total`` into integers proportional to ``weights`` by largest remainders; equal remainders: first one."""
    whole = sum(weights)
    exact = [Fraction(weight) * total / whole for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def select_domains(files: Sequence[AudioFile], weights: Mapping[str, float]) -> tuple[list[AudioFile], DomainSchedule]:
    """The files of the domains with a positive weight, and the schedule of these domains.

    Raises:
        DataError: a weight for a domain that no file has, or a domain without a weight.
        ValueError: a weight that is negative or not a number, or no positive one.
    """
    found: dict[str, int] = {}
    for item in files:
        found[item.domain] = found.get(item.domain, 0) + 1
    quoted_nothing = '""'  # as it is written in a recipe and on the command line
    listed = ", ".join(f"{name or quoted_nothing} ({number} files)" for name, number in sorted(found.items()))
    for name, weight in weights.items():
        if isinstance(weight, bool) or not (isfinite(weight) and weight >= 0):
            raise ValueError(f"domain weights: expected a number >= 0 for {name!r}, got {weight!r}")
        if name not in found:
            raise DataError(f"domain weights name {name!r}, which no file has; domains of the data: {listed}")
    for name in found:
        if name not in weights:
            first = next(item.path for item in files if item.domain == name)
            what = f"domain {name!r} has" if name else f"files without a domain, whose name is {quoted_nothing}, have"
            raise DataError(
                f"{what} no weight (such as {first}): give it one, or 0 to leave it out; "
                f"expected weights for the domains of the data: {listed}"
            )
    positive = {name: weight for name, weight in weights.items() if weight > 0}
    if not positive:
        raise ValueError("domain weights: expected a positive weight for at least one domain, all are 0")
    return [item for item in files if item.domain in positive], DomainSchedule(positive)
