"""Clips at their own length in batches of similar durations: little padding, and every step still a pure function."""

from collections.abc import Mapping, Sequence
from math import floor

import numpy as np

from bestrq2.data.cache import SampleCache
from bestrq2.data.dataset import CropDataset
from bestrq2.data.domains import apportion
from bestrq2.data.files import AudioFile
from bestrq2.data.order import permute
from bestrq2.hashing import mix

__all__ = ["BucketDataset", "BucketSteps"]

_PLACE, _ORDER = 5, 6  # domains of the hash; 1 to 4 are in dataset.py
_STEEPNESS = 12  # the next shorter bucket ends a twelfth lower, so about 4 % of a full bucket is padding
_REPEATS = 1 << 20  # indices of an epoch that are kept for repeats


class BucketDataset(CropDataset):
    """Clips up to the crop length taken whole, longer ones cropped, in steps of a bounded number of padded seconds.

    The slots of an epoch (see ``CropDataset``) are sorted into buckets of similar length, and bucket after bucket cut
    into batches. Which places of a bucket make up a batch is fixed; which clips stand in these places is permuted anew
    in every epoch, and so is the order of the batches: any sample is found in constant time, and resuming at step k
    costs as much as starting. Places left over in a bucket are the first of the next longer one; the last batch is
    padded with repeats (other crops, if clips are longer than the crop) to as many rows as a batch of the
    longest clips has.

    A step of ``batch_size`` has as many rows as fit into ``batch_size * row_seconds`` seconds, at least one, where the
    padding to the longest clip counts. Every sample is cut to the longest planned length of its bucket, so a duration
    that a manifest states too short never breaks this bound.

    With ``domain_weights``, the shares hold over an epoch, whose length is chosen so that they are exact and every clip
    is heard at least once; they count samples, and batches of one duration may mix the domains differently. A domain
    that is heard several times in an epoch comes in random order, not each clip once before any comes again.

    Args:
        files, crop_seconds, sampling_rate, seed, min_seconds, max_attempts, domain_weights, cache: as for
            ``CropDataset``.
        row_seconds: padded seconds of a batch per unit of its ``batch_size``; None: ``crop_seconds``, so that a step
            holds as much as one of equal crops.

    A clip that cannot be read is replaced by one of its bucket and domain, then of the nearest buckets.

    ``samples_per_epoch`` counts the samples of an epoch without repeats.
    """

    def __init__(
        self,
        files: Sequence[AudioFile],
        crop_seconds: float = 10.0,
        sampling_rate: int = 16000,
        seed: int = 0,
        min_seconds: float = 0.0,
        max_attempts: int = 16,
        domain_weights: Mapping[str, float] | None = None,
        row_seconds: float | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        self.row_seconds = crop_seconds if row_seconds is None else row_seconds
        if not self.row_seconds > 0:
            raise ValueError(f"row_seconds must be positive, got {row_seconds}")
        super().__init__(
            files, crop_seconds, sampling_rate, seed, False, min_seconds, max_attempts, domain_weights, cache
        )
        self._count_places()
        self._plans: dict[int, BucketSteps] = {}

    def _stratify(self) -> np.ndarray:
        """Strata are the domains of each bucket, from short to long."""
        # Rounded up, for nothing of a clip should be cut off; a hundredth of a sample is rounding of the duration.
        lengths = np.ceil(self._durations * self.sampling_rate - 0.01).clip(1, self.crop_samples).astype(np.int64)
        edges = [self.crop_samples]
        while edges[-1] > 1:
            edges.append(edges[-1] - max(1, edges[-1] // _STEEPNESS if len(edges) > 1 else 1))  # whole crops apart
        bucket = np.searchsorted(np.array(edges[::-1]), lengths)
        count = 1 if self.schedule is None else len(self.schedule.names)
        cells, strata = np.unique(bucket * count + self._unit_domains(), return_inverse=True)
        present, self._bucket_of = np.unique(cells // count, return_inverse=True)
        self._domain_of = cells % count
        self.bucket_samples = np.zeros(len(present), np.int64)  # the longest length of each bucket
        np.maximum.at(self.bucket_samples, self._bucket_of[strata], lengths)
        return strata

    def _count_places(self) -> None:
        """Give every stratum its places in an epoch: its slots, or its domain's share by slots."""
        slots = [stratum.order.num_items for stratum in self._strata]
        if self.schedule is not None:
            quotas = self.schedule.quotas
            members = [np.flatnonzero(self._domain_of == domain).tolist() for domain in range(len(quotas))]
            totals = [sum(slots[i] for i in cells) for cells in members]
            periods = max(-(-total // quota) for total, quota in zip(totals, quotas))
            for quota, cells in zip(quotas, members):
                for cell, share in zip(cells, apportion(periods * quota, [slots[i] for i in cells])):
                    slots[cell] = share
        self._cell_places = np.array(slots, np.int64)
        self._cell_ends = np.cumsum(self._cell_places)
        last_cells = np.flatnonzero(np.diff(self._bucket_of, append=-1))
        self.bucket_ends = self._cell_ends[last_cells]
        self.samples_per_epoch = int(self.bucket_ends[-1])

    def _draw(self, global_index: int) -> tuple[int, int]:
        epoch, place = divmod(global_index, self.samples_per_epoch + _REPEATS)
        if place >= self.samples_per_epoch:  # a repeat: the front of the last bucket, for its end is in the same batch
            start = int(self.bucket_ends[-2]) if len(self.bucket_ends) > 1 else 0
            place = start + (place - self.samples_per_epoch) % (self.samples_per_epoch - start)
        bucket = int(np.searchsorted(self.bucket_ends, place, side="right"))
        start = int(self.bucket_ends[bucket - 1]) if bucket else 0
        size = int(self.bucket_ends[bucket]) - start
        drawn = start + permute(place - start, size, self.seed, _PLACE, epoch, bucket)
        cell = int(np.searchsorted(self._cell_ends, drawn, side="right"))
        inside = drawn - int(self._cell_ends[cell] - self._cell_places[cell])
        return cell, epoch * int(self._cell_places[cell]) + inside

    def _longest(self, stratum: int) -> int:
        return int(self.bucket_samples[self._bucket_of[stratum]])

    def _substitutes(self, stratum: int) -> list[int]:
        own, domain = self._bucket_of[stratum], self._domain_of[stratum]
        others = [i for i in range(len(self._strata)) if i != stratum and self._domain_of[i] == domain]
        return sorted(others, key=lambda i: (abs(int(self._bucket_of[i]) - int(own)), i))

    def plan(self, batch_size: int) -> "BucketSteps":
        """The samples of each step of ``batch_size * row_seconds`` padded seconds."""
        if batch_size not in self._plans:
            self._plans[batch_size] = BucketSteps(self, batch_size)
        return self._plans[batch_size]

    @property
    def identity(self) -> tuple:
        return (*super().identity, "buckets", self.row_seconds)


class BucketSteps:
    """The steps of a :class:`BucketDataset` for one batch size; ``steps_per_epoch`` is the same in all epochs."""

    def __init__(self, dataset: BucketDataset, batch_size: int) -> None:
        longest = int(dataset.bucket_samples[-1])
        # Never less than one of the longest clips: a first look may ask for a small part of a step.
        budget = max(longest, floor(batch_size * dataset.row_seconds * dataset.sampling_rate + 0.5))
        self.min_rows = budget // longest
        # Kept by bucket, whose batches have equal numbers of rows: an epoch of billions of places costs nothing.
        starts, rows, counts = [], [], []
        position = 0
        for end, samples in zip(dataset.bucket_ends.tolist(), dataset.bucket_samples.tolist()):
            starts.append(position)
            rows.append(min(budget // samples, _REPEATS))
            counts.append((end - position) // rows[-1])
            position += rows[-1] * counts[-1]
        if position < dataset.samples_per_epoch:
            counts[-1] += 1  # padded with repeats
        self._starts, self._rows = starts, rows
        self._batches = np.cumsum(counts)  # up to the end of each bucket
        self.steps_per_epoch = int(self._batches[-1])
        self._seed = dataset.seed
        self._stride = dataset.samples_per_epoch + _REPEATS

    def samples(self, step: int) -> range:
        epoch, position = divmod(step, self.steps_per_epoch)
        batch = permute(position, self.steps_per_epoch, mix(self._seed, _ORDER), epoch)
        bucket = int(np.searchsorted(self._batches, batch, side="right"))
        inside = batch - (int(self._batches[bucket - 1]) if bucket else 0)
        first = epoch * self._stride + self._starts[bucket] + inside * self._rows[bucket]
        return range(first, first + self._rows[bucket])
