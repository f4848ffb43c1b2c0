"""Masking: the patches that the encoder sees and those to predict. It does not depend on the audio."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.hashing import mix, uniform

from .counter_random import random_keys


@dataclass(frozen=True)
class MaskPlan:
    """Seen and predicted tokens of a batch: the object that travels from the masking to encoder, predictor and loss.

    Clips of equal length have equal counts, so the batch stays rectangular; a shorter clip has proportionally fewer of
    both, followed by fillers (repeats of a valid index) that the lengths exclude everywhere.

    Attributes:
        seen: ``(B, Ns)`` int64 token indices on the device, ascending.
        predicted: ``(B, Np)`` likewise.
        seen_lengths, predicted_lengths: ``(B,)`` int64 on the CPU.
    """

    seen: Tensor
    predicted: Tensor
    seen_lengths: Tensor
    predicted_lengths: Tensor

    @property
    def masked_lengths(self) -> Tensor:
        """``(B,)`` int64 on the CPU: masked tokens of each clip, predicted or not; see :func:`.thinning.thin`."""
        return self.predicted_lengths

    @property
    def realised_ratio(self) -> float:
        """Predicted share of all valid tokens."""
        predicted, seen = int(self.predicted_lengths.sum()), int(self.seen_lengths.sum())
        return predicted / max(1, predicted + seen)

    def predicted_valid(self) -> Tensor | None:
        """``(B, Np)`` bool on the device, or None when every entry is valid."""
        return valid_mask(self.predicted_lengths, self.predicted.shape[1], self.predicted.device)


def valid_mask(lengths: Tensor, size: int, device: torch.device) -> Tensor | None:
    """``(B, size)`` bool marking the first ``lengths[b]`` entries, or None when that is all of them."""
    if bool((lengths == size).all()):
        return None
    return torch.arange(size, device=device) < lengths.to(device, non_blocking=True)[:, None]


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (B, M)`` of ``values (B, N, D)`` -> ``(B, M, D)``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class RandomMasking:
    """Random patches or spans of them, a fresh choice for every clip (published: one choice per batch).

    The masked share r is drawn from U(low, high) once per step; a clip with n valid tokens has floor(r n) of them
    predicted, at least 1 and at most n - 1 (a single token is only seen). Everything is a pure function of
    (seed, step, index of the clip in the training order), so ranks and resumed runs agree.

    With ``span_length`` L > 1 the predicted tokens are spans of L: starts (up to L - 1 tokens before the clip, so that
    its edges are masked as often as its middle) are taken in random order until the count is reached, which cuts the
    last span short. Spans may overlap or touch.

    Args:
        ratio: ``(low, high)`` share of the valid tokens to predict, 0 < low <= high < 1. Published: (0.4, 0.6).
        seed: of the masks alone.
        shared_per_batch: use one choice for the whole batch, as published. Needs clips of equal length.
        span_length: tokens per span; 1 masks single tokens.

    Raises:
        ValueError: for a ratio outside (0, 1), a span_length below 1, or ``shared_per_batch`` with clips of different
            lengths.
    """

    def __init__(
        self,
        ratio: Sequence[float] = (0.4, 0.6),
        seed: int = 0,
        shared_per_batch: bool = False,
        span_length: int = 1,
    ) -> None:
        low, high = ratio
        if not 0 < low <= high < 1:
            raise ValueError(f"expected a mask ratio range with 0 < low <= high < 1, got ({low}, {high})")
        if span_length < 1:
            raise ValueError(f"span_length must be at least 1 token, got {span_length}")
        self.ratio, self.seed, self.shared_per_batch, self.span_length = (
            (low, high),
            seed,
            shared_per_batch,
            span_length,
        )

    def num_predicted(self, lengths: Tensor, step: int) -> Tensor:
        """``(B,)`` how many of ``lengths (B,)`` valid tokens each clip has to predict at this step."""
        low, high = self.ratio
        ratio = low + (high - low) * uniform(self.seed, step, 0)
        return (lengths * ratio).long().clamp(min=1).minimum(lengths - 1)

    def plan(self, lengths: Tensor, step: int, index: Tensor, device: torch.device | str) -> MaskPlan:
        """Draw the plan of one batch.

        Args:
            lengths: ``(B,)`` int64 valid tokens per clip, on the CPU.
            step: training step; with ``seed`` it fixes the ratio.
            index: ``(B,)`` int64 global index of each clip in the training order.
            device: where the plan is used; the choice is made there, without synchronisation.
        """
        num_predicted = self.num_predicted(lengths, step)
        num_seen = lengths - num_predicted
        size, max_predicted, max_seen = int(lengths.max()), int(num_predicted.max()), int(num_seen.max())
        if self.shared_per_batch:
            if bool((lengths != size).any()):
                raise ValueError(
                    f"shared_per_batch masks need clips of equal length, got {sorted(set(lengths.tolist()))} tokens"
                )
            index = torch.zeros_like(index)
        starts = random_keys(
            mix(self.seed, step), index.to(device, torch.int64, non_blocking=True), size + self.span_length - 1
        )
        # A token's key is the smallest of the L spans that cover it; tokens of one span tie and stay together.
        keys = starts.unfold(1, self.span_length, 1).amin(-1) if self.span_length > 1 else starts
        column = torch.arange(size, device=keys.device)
        lengths_d = lengths.to(keys.device, non_blocking=True)[:, None]
        order = torch.where(column < lengths_d, keys, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        cut = num_predicted.to(keys.device, non_blocking=True)[:, None]
        # order = [predicted | seen | padding]; sort each part so that tokens stay in time order.
        predicted = self._ascending(order[:, :max_predicted], column[:max_predicted] < cut, size)
        take = cut + column[:max_seen]
        seen = self._ascending(order.gather(1, take.clamp(max=size - 1)), take < lengths_d, size)
        return MaskPlan(seen, predicted, num_seen, num_predicted)

    @staticmethod
    def _ascending(tokens: Tensor, valid: Tensor, size: int) -> Tensor:
        ordered = torch.where(valid, tokens, size).sort(dim=1).values
        # Fillers behind the valid entries must be legal indices for gather; which one they name does not matter.
        return ordered.clamp(max=size - 1)
