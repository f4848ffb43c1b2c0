"""Masking: the patches that the encoder sees and those to predict.

It does not depend on the audio, with one exception: weights of the tokens, which a caller may derive from it and which
change nothing but the odds of a draw.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.errors import BestRQWarning
from bestrq2.hashing import mix, uniform
from bestrq2.ops.common.devices import exact_device

from .counter_random import random_keys
from .padding import valid_mask
from .pytrees import tree_of_tensors

SMALLEST_WEIGHT = 1e-6  # of a patch without any variation: it is taken last, but may be taken


@tree_of_tensors()
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
        """Masked share of all valid tokens."""
        masked, seen = int(self.masked_lengths.sum()), int(self.seen_lengths.sum())
        return masked / max(1, masked + seen)

    def predicted_valid(self) -> Tensor | None:
        """``(B, Np)`` bool on the device, or None when every entry is valid."""
        return valid_mask(self.predicted_lengths, self.predicted.shape[1], self.predicted.device)


def whole_share(counts: Tensor, share: float) -> Tensor:
    """``floor(share n)`` of ``counts`` n, int64, for the share as it is written: 53 of 100 at 0.53.

    In float32 the product is 52.99999; in float64 it is off by a few units in the last place, which the factor covers.
    """
    return (counts.double() * (share * (1 + 2.0**-50))).long()


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (B, M)`` of ``values (B, N, D)`` -> ``(B, M, D)``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def touching_share(plan: MaskPlan, num_tokens: int, rows: int) -> Tensor:
    """Share of the predicted tokens with a seen token beside them in time or frequency, 0-d float32 in 0..1.

    A masked token that touches a visible one can often be guessed by interpolation.

    Args:
        plan: the mask.
        num_tokens: N, columns times rows.
        rows: frequency rows of the grid.
    """
    valid = valid_mask(plan.seen_lengths, plan.seen.shape[1], plan.seen.device)
    target = plan.seen if valid is None else torch.where(valid, plan.seen, num_tokens)
    seen = torch.zeros(len(target), num_tokens + 1, dtype=torch.bool, device=target.device).scatter_(1, target, True)
    grid = seen[:, :num_tokens].unflatten(1, (-1, rows))
    beside = torch.zeros_like(grid)
    beside[:, 1:] |= grid[:, :-1]
    beside[:, :-1] |= grid[:, 1:]
    beside[:, :, 1:] |= grid[:, :, :-1]
    beside[:, :, :-1] |= grid[:, :, 1:]
    touching = beside.flatten(1).gather(1, plan.predicted).float()
    counted = plan.predicted_valid()
    if counted is None:
        return touching.mean() if touching.numel() else touching.new_zeros(())
    return (touching * counted).sum() / counted.sum().clamp(min=1)


class RandomMasking:
    """Random patches, spans or blocks of them, a fresh choice for every clip (published: one choice per batch).

    The masked share r is drawn from U(low, high) once per step; a clip with n valid tokens has floor(r n) of them
    predicted, at least 1 and at most n - 1 (a single token is only seen). Everything is a pure function of
    (seed, step, index of the clip in the training order) and, with ``dispersion``, of the clip, so ranks, resumed runs
    and batches of other clips agree.

    Blocks of ``block_rows`` x ``block_columns`` tokens (frequency x time) are taken in random order until the count is
    reached, which cuts the last one short. They may overlap or touch, and start up to a block's size before the first
    row and column, so that edges are taken as often as the middle. With ``kept`` the blocks are the tokens that the
    encoder sees, and the rest is predicted (inverse block masking, EAT, Chen et al. 2024).

    With ``dispersion`` a > 0 a token's odds to be predicted grow with the number given for it, w^a: tokens are drawn
    without replacement in proportion to w^a (Efraimidis and Spirakis 2006), blocks by the mean over their tokens.

    Args:
        ratio: ``(low, high)`` share of the valid tokens to predict, 0 < low <= high < 1. Published: (0.4, 0.6).
        seed: of the masks alone.
        shared_per_batch: use one choice for the whole batch, as published. Needs clips of equal length.
        span_length: tokens per masked span in token order, which is time for strips; 1 masks single tokens.
        block_rows: frequency rows of a block. None: all rows, so that blocks are spans in time on any grid.
        block_columns: time columns of a block.
        kept: spans or blocks are kept instead of masked.
        dispersion: exponent a of the weights; 0: every token alike.

    Raises:
        ValueError: for a ratio outside (0, 1), a size below 1, both spans and blocks, a negative ``dispersion``, or
            ``shared_per_batch`` with ``dispersion`` or with clips of different lengths.
    """

    def __init__(
        self,
        ratio: Sequence[float] = (0.4, 0.6),
        seed: int = 0,
        shared_per_batch: bool = False,
        span_length: int = 1,
        *,
        block_rows: int | None = 1,
        block_columns: int = 1,
        kept: bool = False,
        dispersion: float = 0.0,
    ) -> None:
        try:
            low, high = ratio
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected a mask ratio range (low, high), got {ratio!r}") from error
        if not 0 < low <= high < 1:
            raise ValueError(f"expected a mask ratio range with 0 < low <= high < 1, got ({low}, {high})")
        if span_length < 1:
            raise ValueError(f"span_length must be at least 1 token, got {span_length}")
        if block_columns < 1 or (block_rows is not None and block_rows < 1):
            raise ValueError(
                f"block_rows and block_columns must be at least 1 token, got {block_rows} x {block_columns}"
            )
        if span_length > 1 and (block_rows, block_columns) != (1, 1):
            raise ValueError(
                f"expected spans or blocks, got span_length {span_length} and blocks of {block_rows} x {block_columns}"
            )
        if not 0 <= dispersion < float("inf"):
            raise ValueError(f"dispersion must be a number of at least 0, got {dispersion}")
        if dispersion and shared_per_batch:
            raise ValueError("dispersion differs from clip to clip: it cannot be used with shared_per_batch")
        self.ratio, self.seed, self.shared_per_batch, self.span_length = (
            (low, high),
            seed,
            shared_per_batch,
            span_length,
        )
        self.block_rows, self.block_columns, self.kept, self.dispersion = block_rows, block_columns, kept, dispersion

    def num_predicted(self, lengths: Tensor, step: int) -> Tensor:
        """``(B,)`` how many of ``lengths (B,)`` valid tokens each clip has to predict at this step; 0 of 0 or 1."""
        low, high = self.ratio
        ratio = low + (high - low) * uniform(self.seed, step, 0)
        return whole_share(lengths, ratio).clamp(min=1).minimum((lengths - 1).clamp(min=0))

    def plan(
        self,
        lengths: Tensor,
        step: int,
        index: Tensor,
        device: torch.device | str,
        rows: int = 1,
        weights: Tensor | None = None,
    ) -> MaskPlan:
        """Draw the plan of one batch.

        Args:
            lengths: ``(B,)`` int64 valid tokens per clip, on the CPU.
            step: training step; with ``seed`` it fixes the ratio.
            index: ``(B,)`` int64 global index of each clip in the training order.
            device: where the plan is used; the choice is made there, without synchronisation.
            rows: frequency rows of the token grid: token ``t * rows + f`` is row f of column t.
            weights: ``(B, N)`` non-negative, N at least the longest clip: what the odds grow with. Needed with
                ``dispersion``, unused without it.

        Raises:
            ValueError: without clips, for clips without tokens, for lengths that are no whole columns, or missing or
                wrongly shaped weights.
        """
        if not len(lengths):
            raise ValueError("expected at least one clip to mask, got none")
        if bool((lengths < 1).any()):
            raise ValueError(
                f"expected at least one token in every clip, got lengths {lengths.tolist()}: leave out shorter clips, "
                "as collect(source, min_seconds=...) does"
            )
        num_predicted = self.num_predicted(lengths, step)
        num_seen = lengths - num_predicted
        size = int(lengths.max())
        if bool((lengths % rows != 0).any()):
            raise ValueError(f"expected lengths in whole columns of {rows} rows, got {lengths.tolist()}")
        if self.shared_per_batch:
            if bool((lengths != size).any()):
                raise ValueError(
                    f"shared_per_batch masks need clips of equal length, got {sorted(set(lengths.tolist()))} tokens"
                )
            index = torch.zeros_like(index)
        device = torch.device(device)
        place = exact_device(device) if self.dispersion else device
        index = index.to(place, torch.int64, non_blocking=True)
        column = torch.arange(size, device=index.device)
        lengths_d = lengths.to(index.device, non_blocking=True)[:, None]
        inside = column < lengths_d
        if self.dispersion and (weights is None or weights.dim() != 2 or weights.shape[1] < size):
            shape = None if weights is None else tuple(weights.shape)
            raise ValueError(f"dispersion needs weights of ({len(lengths)}, {size} or more) tokens, got {shape}")
        used = weights[:, :size].detach().to(place) if self.dispersion and weights is not None else None
        keys = self._token_keys(step, index, inside, rows, used)
        last = float("inf") if keys.is_floating_point() else torch.iinfo(torch.int64).max
        order = torch.where(inside, keys, last).argsort(dim=1, stable=True)
        # order = [taken | rest | padding]; sort each part so that tokens stay in time order.
        num_taken, num_rest = (num_seen, num_predicted) if self.kept else (num_predicted, num_seen)
        if not bool(num_predicted.any()):
            warnings.warn(
                "nothing to predict: every clip of this batch is a single patch, which is only seen. Its loss is 0.",
                category=BestRQWarning,
                stacklevel=2,
            )
        max_taken, max_rest = int(num_taken.max()), int(num_rest.max())
        cut = num_taken.to(index.device, non_blocking=True)[:, None]
        taken = self._ascending(order[:, :max_taken], column[:max_taken] < cut, size)
        position = cut + column[:max_rest]
        rest = self._ascending(order.gather(1, position.clamp(max=size - 1)), position < lengths_d, size)
        seen, predicted = (taken, rest) if self.kept else (rest, taken)
        return MaskPlan(seen.to(device), predicted.to(device), num_seen, num_predicted)

    def _token_keys(self, step: int, index: Tensor, inside: Tensor, rows: int, weights: Tensor | None) -> Tensor:
        """``(B, N)``: tokens are taken in the order of their keys; tokens of one block tie and stay together."""
        num_clips, size = inside.shape
        height, width = self.block_rows, self.block_columns
        repeat = 1
        if self.span_length > 1:
            rows, height, width = 1, 1, self.span_length
        elif height is None:
            rows, height, repeat = 1, 1, rows  # one draw for all rows of a column
        columns = size // (rows * repeat)
        shape = (columns + width - 1, rows + height - 1)  # a block may start before the first row or column
        starts = random_keys(mix(self.seed, step), index, shape[0] * shape[1]).view(num_clips, *shape)
        if weights is not None:
            grid = torch.where(inside, weights.double(), 0.0).view(num_clips, columns, rows, repeat)
            valid = inside.view(num_clips, columns, rows, repeat).double()
            total, count = (self._blocks(part.sum(-1), height, width).sum((-1, -2)) for part in (grid, valid))
            odds = (total / count.clamp(min=1)).clamp(min=SMALLEST_WEIGHT) ** self.dispersion
            # Exponential numbers, scaled by the odds: the smallest is number i with a probability in proportion to it.
            share = ((starts >> 9) + 1).double() * 2.0**-53  # in (0, 1]
            starts = -share.log() * odds if self.kept else -share.log() / odds
        if height > 1 or width > 1:
            starts = starts.unfold(1, width, 1).unfold(2, height, 1).amin((-1, -2))
        return starts.flatten(1).repeat_interleave(repeat, 1)

    @staticmethod
    def _blocks(grid: Tensor, height: int, width: int) -> Tensor:
        """The tokens of every block that overlaps the grid ``(B, C, R)``, zeros outside:
        ``(B, C + width - 1, R + height - 1, width, height)``."""
        padded = torch.nn.functional.pad(grid, (height - 1, height - 1, width - 1, width - 1))
        return padded.unfold(1, width, 1).unfold(2, height, 1)

    @staticmethod
    def _ascending(tokens: Tensor, valid: Tensor, size: int) -> Tensor:
        ordered = torch.where(valid, tokens, size).sort(dim=1).values
        # Fillers behind the valid entries must be legal indices for gather; which one they name does not matter.
        return ordered.clamp(max=size - 1)
