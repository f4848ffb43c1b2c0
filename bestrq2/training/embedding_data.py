"""Cached embeddings as training data: batches of windows in the order of the seed."""

from collections.abc import Generator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bestrq2.config import Config
from bestrq2.data import Batch, CropDataset, SampleOrder
from bestrq2.data.steps import EqualSteps, StepPlan, rank_share

from .embedding_cache import EmbeddingCache


@dataclass(frozen=True)
class EmbeddingBatch(Batch):
    """Windows padded with zeros: embeddings ``(B, T, D)`` in the place of the waveform, lengths in target columns.

    Attributes:
        codes: ``(B, T, G)`` int64 targets of every column.
    """

    codes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.waveform, self.codes, self.lengths

    def part(self, begin: int, end: int) -> "EmbeddingBatch":
        part = super().part(begin, end)
        assert isinstance(part, EmbeddingBatch)
        return replace(part, codes=self.codes[begin:end, : part.waveform.shape[1]])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EmbeddingBatch":
        waveform, codes = (t.to(device, non_blocking=non_blocking) for t in (self.waveform, self.codes))
        return replace(self, waveform=waveform, codes=codes)


class EmbeddingDataset:
    """The windows of a cache, each epoch in another order.

    Args:
        cache: embeddings and codes.
        source: the audio that they were made of; a run may only go on with the same.
        config: of the run.

    Attributes:
        sampling_rate: target columns per second.
    """

    def __init__(self, cache: EmbeddingCache, source: CropDataset, config: Config) -> None:
        front = config.model.front_end
        self.cache, self.source = cache, source
        self.sampling_rate = front.sampling_rate / (config.model.encoder.patch_width * front.hop_length)
        self.order = SampleOrder(len(cache), config.train.seed)

    def __len__(self) -> int:
        return len(self.cache)

    def plan(self, batch_size: int) -> StepPlan:
        return EqualSteps(batch_size)

    def batch(self, indices: range) -> EmbeddingBatch:
        """The samples with these global indices."""
        windows = [self.cache[self.order.item(index)[1]] for index in indices]
        return EmbeddingBatch(
            waveform=nn.utils.rnn.pad_sequence([window.context for window in windows], batch_first=True),
            lengths=torch.tensor([len(window.codes) for window in windows]),
            index=torch.tensor(indices),
            domains=[""] * len(windows),
            codes=nn.utils.rnn.pad_sequence([window.codes for window in windows], batch_first=True),
        )

    def batches(
        self, batch_size: int, start_step: int, num_steps: int, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """The share of one rank of steps ``start_step`` ... ``start_step + num_steps - 1``."""
        plan = self.plan(batch_size)
        for step in range(start_step, start_step + num_steps):
            yield self.batch(rank_share(plan.samples(step), rank, world_size))
