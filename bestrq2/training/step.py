"""Totals of a step or of several steps, as sums that add up over micro-batches, ranks and steps."""

import math
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from bestrq2.config import Config
from bestrq2.data import Batch, CropDataset
from bestrq2.errors import TrainingError
from bestrq2.layers.masking import MaskPlan
from bestrq2.models import BestRQ, BestRQ2

from .distributed import Ranks, shared


@dataclass
class StepTotals:
    """
    Attributes:
        loss, accuracy: sums over targets.
        clip_loss: likewise, of the target for whole clips.
        touching: targets with a seen token beside them; counted on steps that are logged.
        targets: predicted tokens.
        tokens: masked and seen ones.
        masked: tokens, predicted or not.
        audio_seconds, padded_seconds: of the batch, without and with its padding.
        waited: seconds that the loop waited for data.
        flops: matrix-product operations.
        skipped_files: files that could not be read.
        stops: ranks that were asked to stop.
        overdue: positive when the first rank wants to save because of the time.
        failures: ranks that cannot have their next batch.
    """

    loss: float = 0.0
    accuracy: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    audio_seconds: float = 0.0
    padded_seconds: float = 0.0
    waited: float = 0.0
    flops: float = 0.0
    skipped_files: float = 0.0
    stops: float = 0.0
    overdue: float = 0.0
    failures: float = 0.0
    clip_loss: float = 0.0
    touching: float = 0.0
    masked: float = 0.0

    @classmethod
    def of(cls, batch: Batch, sampling_rate: float, waited: float, stop: bool, overdue: bool) -> "StepTotals":
        return cls(
            audio_seconds=float(batch.lengths.sum()) / sampling_rate,
            padded_seconds=batch.waveform.shape[0] * batch.waveform.shape[1] / sampling_rate,
            waited=waited,
            skipped_files=len(batch.skips),
            stops=float(stop),
            overdue=float(overdue),
        )

    def add_plan(self, plan: MaskPlan, flops: float) -> None:
        masked = int(plan.masked_lengths.sum())
        self.masked += masked
        self.tokens += masked + int(plan.seen_lengths.sum())
        self.flops += flops

    def add(self, other: "StepTotals") -> None:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))

    def summed(self, ranks: Ranks) -> "StepTotals":
        """Over all ranks; the same on each of them (a collective call)."""
        return StepTotals(*ranks.sum(astuple(self)))

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1.0, self.targets)

    @property
    def mean_accuracy(self) -> float:
        return self.accuracy / max(1.0, self.targets)

    @property
    def mean_clip_loss(self) -> float:
        return self.clip_loss / max(1.0, self.targets)

    @property
    def touching_share(self) -> float:
        return self.touching / max(1.0, self.targets)

    @property
    def realised_ratio(self) -> float:
        return self.masked / max(1.0, self.tokens)

    @property
    def padding_share(self) -> float:
        return 1 - self.audio_seconds / self.padded_seconds if self.padded_seconds else 0.0


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """Cut a batch into ``count`` parts of nearly equal size (fewer if it has fewer clips), each padded to its own
    longest clip. Skips stay with the whole."""
    size, parts, begin = len(batch), min(count, len(batch)), 0
    if parts == 1:
        return [batch]
    result = []
    for number in range(parts):
        end = begin + size // parts + (number < size % parts)
        result.append(batch.part(begin, end))
        begin = end
    return result


def check_batch(config: Config, dataset: Any, size: int) -> None:
    """
    Raises:
        TrainingError: for a batch that ``size`` ranks and their micro-batches cannot share.
    """
    settings = config.train
    share = size * settings.accumulate
    if settings.batch_size % size or settings.batch_size < share:
        raise shared(
            TrainingError(
                f"train.batch_size: expected a multiple of {size} ranks, and at least {share} for "
                f"train.accumulate={settings.accumulate}, got {settings.batch_size}"
            )
        )
    if config.model.mixing.share and settings.batch_size % (2 * share):
        raise shared(
            TrainingError(
                f"train.batch_size: expected pairs of clips for model.mixing.share, a multiple of {2 * share} with "
                f"{size} ranks and train.accumulate={settings.accumulate}, got {settings.batch_size}"
            )
        )
    # Ranks that cut a step into different numbers of micro-batches would wait for each other forever.
    if (rows := dataset.plan(settings.batch_size).min_rows) < share:
        raise shared(
            TrainingError(
                f"data.batch_seconds: expected room for {share} clips of full length ({size} ranks times "
                f"train.accumulate={settings.accumulate}), got room for {rows}"
            )
        )


def check_targets(model: BestRQ2 | BestRQ, dataset: CropDataset, name: str = "data") -> None:
    """
    Raises:
        TrainingError: if nothing is masked even in the longest clip, since a clip keeps at least one patch: every loss
            would be 0.
    """
    longest = dataset.crop_samples
    if not dataset.join_short:
        seconds = max(math.inf if item.duration is None else item.duration for item in dataset.files)
        longest = min(longest, math.ceil(seconds * dataset.sampling_rate)) if seconds < math.inf else longest
    if model.num_predicted(torch.tensor([longest]), 0) == 0:
        raise shared(
            TrainingError(
                f"{name}: no clip is longer than {longest / dataset.sampling_rate:g} s, which is a single patch, and a "
                "clip of one patch has nothing to predict: use longer clips (data.crop_seconds, data.join_short=true) "
                "or smaller patches"
            )
        )
