"""Mixtures of two clips of a batch as input, with the code of whichever is louder as target."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq2.hashing import mix, uniform
from bestrq2.ops.common.devices import exact_device

from .padding import length_mask
from .patches import Patches

FLOOR = 1e-10  # mel power, -100 dB: the least that is divided by
FLOOR_DB = -100.0  # of the published front end: silence
DRAWN = (torch.int64, torch.float32, torch.int64, torch.int64)  # partner, level, begin, end
LARGEST_GAIN = 1e3  # of power, 30 dB: silence is not blown up to the level of a clip


@dataclass(frozen=True)
class Mixture:
    """Patches with parts of other clips added, and who is heard where.

    Attributes:
        patches: what the encoder gets.
        partner: ``(B,)`` int64 row of the clip that was added (its own row where none was), on the device.
        is_own: ``(B, N)`` bool: the clip's own patch has at least as much power as the one that was added.
    """

    patches: Patches
    partner: Tensor
    is_own: Tensor

    def codes(self, codes: Tensor) -> Tensor:
        """Codes of the mixture from those of the single clips ``(B, N, G)``: per token, the code of the louder one."""
        return torch.where(self.is_own[..., None], codes, codes[self.partner])


class PairMixing:
    """Adds to a share of the clips a part of their neighbour in the training order.

    Clips 2k and 2k + 1 of the training order are a pair; each is mixed with the other with probability ``share``.
    Mel *powers* are added, element by element, which is what the sum of two unrelated waveforms has on average. The
    other clip is first scaled so that its mean power over the clip is that of the clip, times a level drawn from
    ``level_db`` (the factor is kept within 30 dB), and added over a random stretch of time columns, at its own times.

    Target of a token is the code of the louder source: the mean mel power of the clip's own patch against that of the
    scaled patch that was added. (Mixing the ids by power, as SPEAR does per clip, is the same decision per token.)

    Who is mixed, level and stretch are pure functions of (seed, index of the clip), so steps are the same for any
    number of ranks or micro-batches as long as these do not part a pair; a clip whose neighbour is not in the batch is
    left as it is.

    Args:
        share: of the clips that are mixed, 0..1.
        level_db: ``(low, high)`` range of the added clip's level against the clip's, in dB.
        span: ``(low, high)`` range of the stretch as a share of the time that both clips have, 0 < low <= high <= 1.
        seed: of all draws.

    Raises:
        ValueError: for values out of range.
    """

    def __init__(
        self,
        share: float,
        level_db: Sequence[float] = (-5.0, 5.0),
        span: Sequence[float] = (0.3, 1.0),
        seed: int = 0,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"mixing share must lie in [0, 1], got {share}")
        if len(level_db) != 2 or not -100 <= level_db[0] <= level_db[1] <= 100:
            raise ValueError(f"mixing level_db must be a range [low, high] within -100..100 dB, got {list(level_db)}")
        if len(span) != 2 or not 0 < span[0] <= span[1] <= 1:
            raise ValueError(f"mixing span must be a range [low, high] within (0, 1], got {list(span)}")
        self.share, self.level_db, self.span, self.seed = share, tuple(level_db), tuple(span), seed

    def mix(
        self,
        patches: Patches,
        index: Tensor,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        floor_db: float = FLOOR_DB,
    ) -> Mixture:
        """Mix a batch.

        Args:
            patches: of the single clips, in dB or standardised dB.
            index: ``(B,)`` int64 global index of each clip in the training order, on the CPU.
            mean, std: what undoes the standardisation: ``dB = values * std + mean``.
            floor_db: of the front end: a level that stands for silence, which adds nothing.
        """
        values = patches.values
        partner, levels, begin, end = self._draw(patches, index)
        device = values.device
        partner = partner.to(device, non_blocking=True)
        column = torch.arange(values.shape[1], device=device) // patches.rows
        begin, end = (bound.to(device, non_blocking=True)[:, None] for bound in (begin, end))
        stretch = (column >= begin) & (column < end)
        power = 10 ** ((values * std + mean) / 10)
        other = (power - 10 ** (floor_db / 10)).clamp(min=0)[partner] * self._gains(power, patches, partner, levels)
        added = torch.where(stretch[..., None], other, 0)
        mixed = (10 * (power + added).log10() - mean) / std
        values = torch.where(stretch[..., None], mixed, values)
        is_own = ~stretch | (power.sum(-1) >= other.sum(-1))
        return Mixture(patches.replaced(values), partner, is_own)

    def _draw(self, patches: Patches, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Partner row, level in dB, first and behind-the-last column of the stretch, ``(B,)`` each."""
        rows = {number: row for row, number in enumerate(index.tolist())}
        columns = (patches.lengths // patches.rows).tolist()
        drawn = []
        for row, number in enumerate(index.tolist()):
            neighbour = rows.get(number ^ 1)
            own = mix(self.seed, number)
            if neighbour is None or uniform(own, 0) >= self.share:
                drawn.append((row, 0.0, 0, 0))
                continue
            level = self.level_db[0] + (self.level_db[1] - self.level_db[0]) * uniform(own, 1)
            common = min(columns[row], columns[neighbour])
            share = self.span[0] + (self.span[1] - self.span[0]) * uniform(own, 2)
            length = max(1, round(share * common))
            begin = int(uniform(own, 3) * (common - length + 1))
            drawn.append((neighbour, level, begin, begin + length))
        partner, levels, begins, ends = zip(*drawn)
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, dtype=dtype, device="cpu")
            for values, dtype in zip((partner, levels, begins, ends), DRAWN)
        )

    @staticmethod
    def _gains(power: Tensor, patches: Patches, partner: Tensor, levels: Tensor) -> Tensor:
        """Factor on the power of the added clip, ``(B, 1, 1)`` float32."""
        # float64 sums, rounded to float32: the same whatever padding the batch has.
        device = power.device
        power, partner = power.to(exact_device(device)), partner.to(exact_device(device))
        inside = length_mask(patches.lengths, power.shape[1], power.device)
        sums = torch.where(inside, power.sum(-1, dtype=torch.float64), 0.0).sum(1)
        means = sums / (patches.lengths.to(power.device, non_blocking=True) * power.shape[2])
        level = 10 ** (levels.to(power.device, torch.float64, non_blocking=True) / 10)
        gains = (means / means[partner].clamp(min=FLOOR) * level).clamp(1 / LARGEST_GAIN, LARGEST_GAIN)
        return gains.float()[:, None, None].to(device)
