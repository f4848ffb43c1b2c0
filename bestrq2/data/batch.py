"""Batches of training samples: batch k of a run is a pure function of (dataset, batch size, k)."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bestrq2.data.dataset import Sample
from bestrq2.data.steps import EqualSteps, StepPlan, plan_of, rank_share
from bestrq2.data.workers import decoded_ahead
from bestrq2.errors import Skip

__all__ = ["Batch", "batches", "collate"]


@dataclass(frozen=True)
class Batch:
    """Samples padded with zeros to the longest: ``waveform`` (B, S) float32, ``lengths`` and ``index`` (B,) int64.

    On its way from a cache the waveform is int16, half as many bytes; :meth:`as_float` makes it float32.

    ``lengths`` counts the samples before the padding and stays on the CPU; ``index`` is the global sample index (CPU);
    ``skips`` are the files that could not be read on the way; ``domains`` has the domain of every sample; ``prepared``
    is what the model computed of the whole batch ahead of its step, or None.
    """

    waveform: Tensor
    lengths: Tensor
    index: Tensor
    skips: list[Skip] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    prepared: Any = None

    def __len__(self) -> int:
        return self.waveform.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of a pretraining model, besides step and index: waveform and lengths."""
        return self.waveform, self.lengths

    def part(self, begin: int, end: int) -> "Batch":
        """Samples ``begin`` ... ``end - 1``, padded to the longest of them, without the skips."""
        lengths = self.lengths[begin:end]
        waveform = self.waveform[begin:end, : int(lengths.max())]
        return replace(
            self,
            waveform=waveform,
            lengths=lengths,
            index=self.index[begin:end],
            skips=[],
            domains=self.domains[begin:end],
            prepared=None,
        )

    def as_float(self) -> "Batch":
        """The same batch with a float32 waveform: int16 over 32768, which is exact."""
        if self.waveform.dtype != torch.int16:
            return self
        return replace(self, waveform=self.waveform.float().mul_(1 / 32768))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its waveform on ``device``."""
        return replace(self, waveform=self.waveform.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch with its waveform in page-locked memory, from where a copy to a GPU can run alongside."""
        return replace(self, waveform=self.waveform.pin_memory())


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples into one zero-padded batch, in the given order; int16 if all of them are.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    lengths = [len(sample.waveform) for sample in samples]
    integers = all(sample.waveform.dtype == np.int16 for sample in samples)
    waveform = np.zeros((len(samples), max(lengths)), np.int16 if integers else np.float32)
    for row, sample in zip(waveform, samples):
        row[: len(sample.waveform)] = sample.waveform
    return Batch(
        waveform=torch.from_numpy(waveform),
        lengths=torch.tensor(lengths),
        index=torch.tensor([sample.index for sample in samples]),
        skips=[skip for sample in samples for skip in sample.skips],
        domains=[sample.domain for sample in samples],
    )


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    prefetch: int = 4,
    start_method: str | None = None,
    as_float: bool = True,
) -> Generator[Batch, None, None]:
    """Deliver the batches of steps ``start_step`` ... ``start_step + num_steps - 1``.

    Step k of all ranks together holds the samples of ``dataset.plan(batch_size).samples(k)``, for a ``CropDataset``
    those with global index k * batch_size ... (k + 1) * batch_size - 1, and rank r its contiguous share, so the audio
    of a step depends neither on ``workers`` nor on ``world_size``, and a run may resume at any step with other values
    of both. Every rank has at least one sample in every step. Epochs pass without a pause.

    Args:
        dataset: a map from global index to :class:`Sample`, such as ``CropDataset``; picklable if ``workers`` > 0.
        batch_size: samples of a step over all ranks; a multiple of ``world_size``. A ``BucketDataset`` multiplies it by
            its seconds per row, takes as many samples as fit, and needs no multiple, only as many samples as ranks.
        start_step: first step.
        num_steps: None for no end.
        workers: processes that decode ahead; 0 decodes in this one, when asked. Each uses one thread.
        rank, world_size: this process's place among those that share every step.
        pin_memory: deliver waveforms in page-locked memory (only useful with a GPU).
        prefetch: batches each worker prepares ahead.
        start_method: of the workers: "forkserver" (default where it exists), "spawn" or "fork". The default never
            copies a process in which CUDA or threads are active. Only a script that defines its own ``dataset`` class
            must be guarded by ``if __name__ == "__main__":``.
        as_float: deliver float32; False leaves int16 samples of a cache as they are, for a copy to a GPU.

    The workers end with the generator: exhaust it or ``close()`` it.

    Raises:
        ValueError: an argument out of range.
        DataError: a sample could not be made, or a worker was killed.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size and world_size must be positive, got {batch_size} and {world_size}")
    plan = plan_of(dataset, batch_size)
    if isinstance(plan, EqualSteps) and batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of world_size, got {batch_size} and {world_size}")
    if plan.min_rows < world_size:
        raise ValueError(
            f"world_size must be at most {plan.min_rows}, the samples of the smallest step, got {world_size}: "
            "raise the seconds of a batch, or shorten the crops"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size = {world_size}), got {rank}")
    if start_step < 0 or workers < 0 or prefetch < 1 or (num_steps is not None and num_steps < 0):
        raise ValueError(
            "start_step, num_steps and workers must be >= 0 and prefetch >= 1, "
            f"got {start_step}, {num_steps}, {workers}, {prefetch}"
        )
    steps = _Steps(plan, start_step, num_steps, rank, world_size)
    # Checked above at the call, not at the first batch: that is why the generator is another function.
    return _deliver(dataset, steps, workers, pin_memory, prefetch, start_method, as_float)


def _deliver(
    dataset: Dataset,
    steps: "_Steps",
    workers: int,
    pin_memory: bool,
    prefetch: int,
    start_method: str | None,
    as_float: bool,
) -> Generator[Batch, None, None]:
    with closing(decoded_ahead(dataset, steps, collate, workers, pin_memory, prefetch, start_method)) as stream:
        for batch in stream:
            yield batch.as_float() if as_float else batch


class _Steps:
    """The batch sampler: this rank's share of the global sample indices, step by step."""

    def __init__(self, plan: StepPlan, start_step: int, num_steps: int | None, rank: int, world_size: int) -> None:
        self.plan, self.start_step, self.num_steps = plan, start_step, num_steps
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        steps = (
            count(self.start_step)
            if self.num_steps is None
            else range(self.start_step, self.start_step + self.num_steps)
        )
        for step in steps:
            yield list(rank_share(self.plan.samples(step), self.rank, self.world_size))
