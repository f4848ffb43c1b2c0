"""Predict a share of the masked tokens: the loss of a part estimates that of all, for a part of the cost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.hashing import mix

from .counter_random import random_keys
from .masking import MaskPlan, whole_share
from .padding import length_mask
from .pytrees import tree_of_tensors


@tree_of_tensors()
@dataclass(frozen=True)
class ThinnedPlan(MaskPlan):
    """A plan that predicts a part of the masked tokens.

    Attributes:
        masked: ``(B,)`` int64 on the CPU, masked tokens of each clip.
    """

    masked: Tensor

    @property
    def masked_lengths(self) -> Tensor:
        return self.masked


def num_kept(masked: Tensor, share: float) -> Tensor:
    """``(B,)`` tokens to predict of ``masked (B,)`` ones: floor(share n), at least 1 of any."""
    if share == 1.0:
        return masked
    return whole_share(masked, share).clamp(min=1).minimum(masked)


def thin(plan: MaskPlan, share: float, seed: int, step: int, index: Tensor) -> MaskPlan:
    """Keep a random ``share`` of the predicted tokens of every clip, a pure function of (seed, step, clip).

    Args:
        plan: from the masking.
        share: in (0, 1].
        seed, step: of the choice.
        index: ``(B,)`` global index of each clip in the training order.
    """
    if share == 1.0:
        return plan
    kept = num_kept(plan.predicted_lengths, share)
    predicted, device = plan.predicted, plan.predicted.device
    most, size = int(kept.max()), predicted.shape[1]
    keys = random_keys(mix(seed, step, 2), index.to(device, torch.int64, non_blocking=True), size)
    valid = plan.predicted_valid()
    if valid is not None:
        keys = torch.where(valid, keys, torch.iinfo(torch.int64).max)
    place = keys.argsort(dim=1, stable=True)[:, :most]
    counted = length_mask(kept, most, device)
    place = torch.where(counted, place, size).sort(dim=1).values.clamp(max=size - 1)  # fillers last, legal indices
    return ThinnedPlan(plan.seen, predicted.gather(1, place), plan.seen_lengths, kept, plan.predicted_lengths)
