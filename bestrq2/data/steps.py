"""The samples of each step, the same for any number of workers and ranks."""

from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["EqualSteps", "StepPlan", "plan_of", "rank_share"]


class StepPlan(Protocol):
    """Step k of a run as a range of global sample indices; no two steps share an index."""

    @property
    def min_rows(self) -> int:
        """Samples of the smallest step: no more ranks than this can share every step."""
        ...

    def samples(self, step: int) -> range:
        """The global sample indices of a step, over all ranks."""
        ...


@dataclass(frozen=True)
class EqualSteps:
    """Steps of ``batch_size`` consecutive indices; epochs pass inside of a step."""

    batch_size: int

    @property
    def min_rows(self) -> int:
        return self.batch_size

    def samples(self, step: int) -> range:
        return range(step * self.batch_size, (step + 1) * self.batch_size)


def plan_of(dataset: Any, batch_size: int) -> StepPlan:
    """The dataset's own plan of its steps, equal steps for one that has none."""
    return dataset.plan(batch_size) if hasattr(dataset, "plan") else EqualSteps(batch_size)


def rank_share(samples: range, rank: int, world_size: int) -> range:
    """The contiguous share of one rank; the shares differ by at most one sample and none is empty if there are enough.

    >>> [list(rank_share(range(5), rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return samples[len(samples) * rank // world_size : len(samples) * (rank + 1) // world_size]
