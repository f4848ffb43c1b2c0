"""Crops of audio files by global sample index: which file, which part, what replaces it if it cannot be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from bestrq2.data.audio import audio_info
from bestrq2.data.cache import SampleCache
from bestrq2.data.domains import DomainSchedule, select_domains
from bestrq2.data.file_table import FileTable
from bestrq2.data.files import AudioFile
from bestrq2.data.order import SampleOrder, permute
from bestrq2.data.parts import clip_duration, load_clip
from bestrq2.data.steps import EqualSteps, StepPlan
from bestrq2.errors import AudioError, DataError, Skip
from bestrq2.hashing import mix, uniform

__all__ = ["CropDataset", "DataError", "Sample"]

# Domains of the hash: what is drawn must not be correlated with what else is drawn from the same seed and index.
_CROP, _REPLACEMENT, _JOIN, _STRATUM = 1, 2, 3, 4


@dataclass(frozen=True)
class Sample:
    """One training sample: ``waveform`` (S,) float32, its global ``index``, and the files skipped on the way to it.

    From a cache the waveform is int16 and must not be written into.

    ``domain`` is that of its file or, of joined files, of the first.
    """

    waveform: np.ndarray
    index: int
    skips: tuple[Skip, ...] = field(default=())
    domain: str = ""


class _Stratum(NamedTuple):
    """Units ``first`` ... ``last - 1`` in the order of the dataset; their slots begin at ``start``."""

    first: int
    last: int
    start: int
    order: SampleOrder


class CropDataset(Dataset):
    """Map from a global sample index, counted from the beginning of training, to a :class:`Sample`.

    An epoch has slots, in an order given by :class:`SampleOrder`. A file of duration d has ``max(1, round(d / crop))``
    slots, so a long file is heard as much as its share of the audio. Slot j of m takes its random crop from the j-th of
    m equal parts of the possible starts. Files up to the crop length are taken whole.

    With ``join_short``, the files shorter than the crop are put end to end within their group (domain, else folder),
    in an order drawn for every epoch, and have ``max(1, round(total / crop))`` slots together: slot j begins at the
    j-th of m equally spaced files of that order and takes the files that follow until the crop is full, so a sample
    crosses file borders and every file is heard about once an epoch. A group with less audio than one
    crop gives all it has.

    With ``domain_weights``, sample n is from a domain drawn by share (see :class:`DomainSchedule`), and every domain
    passes through epochs of its own, shorter ones more often. Domains of weight 0 are left out.

    A file that cannot be read is replaced by another (with weights, of the same domain), drawn from (seed, index,
    attempt); the sample then carries a :class:`Skip` for it. So the result depends on (files, seed, index) alone, never
    on workers, ranks or earlier calls.

    Args:
        files: usable files; durations that are None are read from the headers now.
        crop_seconds: longest sample.
        sampling_rate: of the waveforms, in Hz.
        seed: of the order and of every crop.
        join_short: fill short files as described; otherwise they are returned at their own length.
        min_seconds: a file that turns out shorter when read is skipped as "too short".
        max_attempts: different unreadable files (or groups) drawn for one sample until a :class:`DataError`.
        domain_weights: weight of every domain, 0 to leave it out; None or empty: every second of audio counts alike.
        cache: decoded audio of the files, read instead of them.

    ``num_slots`` is the length of an epoch in samples, ``seconds`` the audio in the files. With weights, ``num_slots``
    counts the epochs of all domains together. ``left_out`` may hold the skips of the scan that found the files.

    Raises:
        DataError: no files, or weights that do not fit the domains of the files.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        files: Sequence[AudioFile],
        crop_seconds: float = 10.0,
        sampling_rate: int = 16000,
        seed: int = 0,
        join_short: bool = False,
        min_seconds: float = 0.0,
        max_attempts: int = 16,
        domain_weights: Mapping[str, float] | None = None,
        cache: SampleCache | None = None,
    ) -> None:
        if not files:
            raise DataError("no files to train on")
        if sampling_rate <= 0:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
        if not crop_seconds * sampling_rate >= 1:
            raise ValueError(f"crop_seconds must cover at least one sample, got {crop_seconds}")
        if not 0 <= min_seconds <= crop_seconds:
            raise ValueError(f"min_seconds must be in [0, crop_seconds = {crop_seconds}], got {min_seconds}")
        if max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {max_attempts}")
        self.files: Sequence[AudioFile] = list(files)
        self.left_out: list[Skip] = []
        self.schedule: DomainSchedule | None = None
        if domain_weights:
            self.files, self.schedule = select_domains(self.files, domain_weights)
        self.sampling_rate = sampling_rate
        self.crop_samples = round(crop_seconds * sampling_rate)
        self.seed = seed
        self.join_short = join_short
        self.min_seconds = min_seconds
        self.max_attempts = max_attempts
        self.cache = cache
        self._durations = np.array([_duration(item) for item in self.files])
        self.seconds = float(self._durations.sum())
        # 1001 samples at 16 kHz are 0.0625625 s, and that times 16,000 is 1000.9999999999999.
        self._num_samples = np.floor(self._durations * sampling_rate + 0.01).astype(np.int64)

        slots = np.maximum(1, np.rint(self._durations / crop_seconds)).astype(np.int64)
        self._groups: list[np.ndarray] = []  # the short files of each group, as indices into files
        group_slots: list[int] = []
        if join_short:
            short = self._num_samples < self.crop_samples
            members: dict[str, list[int]] = {}
            for index in np.flatnonzero(short):
                members.setdefault(self.files[index].group, []).append(int(index))
            for indices in members.values():
                self._groups.append(np.array(indices))
                group_slots.append(max(1, round(float(self._durations[indices].sum()) / crop_seconds)))
            slots[short] = 0
        # A unit is a file or a group of short ones. Units of one stratum, from which a sample may be replaced, stand
        # together; slots are counted through them.
        slots = np.concatenate([slots, np.array(group_slots, dtype=np.int64)])
        strata = self._stratify()
        self._units = np.argsort(strata, kind="stable")
        self._slots = slots[self._units]
        self._ends = np.cumsum(self._slots)
        self.num_slots = int(self._ends[-1])
        borders = [0, *(np.flatnonzero(np.diff(strata[self._units])) + 1).tolist(), len(self._units)]
        self._strata: list[_Stratum] = []
        for number, (first, last) in enumerate(pairwise(borders)):
            start, end = int(self._ends[first] - self._slots[first]), int(self._ends[last - 1])
            key = seed if len(borders) == 2 else mix(seed, _STRATUM, number)
            self._strata.append(_Stratum(first, last, start, SampleOrder(end - start, key)))

    def __getstate__(self) -> dict[str, Any]:
        """For data workers, which each get a copy: millions of files are to fit into the memory of all of them."""
        return vars(self) | {"files": FileTable(self.files)}

    def __len__(self) -> int:
        """Samples in an epoch; a global index may go beyond, into the epochs that follow."""
        return self.num_slots

    def _unit_domains(self) -> np.ndarray:
        """(units,) position of each unit's domain in the schedule, all 0 without one."""
        if self.schedule is None:
            return np.zeros(len(self.files) + len(self._groups), np.int64)
        number = {name: position for position, name in enumerate(self.schedule.names)}
        heads = [*range(len(self.files)), *(int(group[0]) for group in self._groups)]
        return np.array([number[self.files[head].domain] for head in heads])

    def _stratify(self) -> np.ndarray:
        """(units,) the stratum of each unit, files before groups, counted from 0 without gaps."""
        return self._unit_domains()

    def _draw(self, global_index: int) -> tuple[int, int]:
        """The stratum of a sample, and how many samples of that stratum come before it."""
        return (0, global_index) if self.schedule is None else self.schedule.draw(global_index)

    def _longest(self, stratum: int) -> int:
        """Samples that a sample of this stratum may have."""
        return self.crop_samples

    def plan(self, batch_size: int) -> StepPlan:
        """The samples of each step of ``batch_size``."""
        return EqualSteps(batch_size)

    @property
    def identity(self) -> tuple:
        """The settings that decide which samples come when, beside the files: equal ones give an equal training."""
        settings: tuple = (self.crop_samples, self.sampling_rate, self.seed, self.join_short, self.min_seconds)
        if self.cache is not None and not self.cache.exact:
            settings += ("int16",)
        if self.schedule is not None:
            settings += ("domains", *zip(self.schedule.names, self.schedule.quotas))
        return settings

    def _substitutes(self, stratum: int) -> list[int]:
        """Other strata that may replace a sample of this one once all its units have failed."""
        return []

    def __getitem__(self, global_index: int) -> Sample:
        stratum, number = self._draw(global_index)
        longest = self._longest(stratum)
        waiting: list[int] | None = None
        skips: list[Skip] = []
        failed: set[int] = set()
        for attempt in range(self.max_attempts):
            first, last, start, order = self._strata[stratum]
            while failed and sum(first <= place < last for place in failed) >= np.count_nonzero(
                self._slots[first:last]
            ):
                waiting = self._substitutes(stratum) if waiting is None else waiting
                if not waiting:
                    raise self._given_up(global_index, skips)
                stratum = waiting.pop(0)
                first, last, start, order = self._strata[stratum]
            if attempt == 0:
                epoch, slot = order.item(number)
                slot += start
            else:
                slot = start + mix(self.seed, _REPLACEMENT, global_index, attempt) % order.num_items
            place = int(np.searchsorted(self._ends, slot, side="right"))
            inside = slot - int(self._ends[place] - self._slots[place])  # which slot of the unit
            while place in failed or not self._slots[place]:  # one long broken file must not be drawn over and over
                place = first + (place + 1 - first) % (last - first)
                inside = slot % max(1, int(self._slots[place]))
            unit = int(self._units[place])
            try:
                if unit < len(self.files):
                    domain = self.files[unit].domain
                    waveform = self._crop(unit, inside, int(self._slots[place]), global_index, longest)
                else:
                    members = self._groups[unit - len(self.files)]
                    domain = self.files[members[0]].domain
                    waveform = self._join(members, unit, inside, int(self._slots[place]), epoch, skips)
                return Sample(waveform, global_index, tuple(skips), domain)
            except AudioError as error:
                skips.append(error.skip)
                failed.add(place)
        raise self._given_up(global_index, skips)

    @staticmethod
    def _given_up(global_index: int, skips: list[Skip]) -> DataError:
        listed = "\n  ".join(str(skip) for skip in dict.fromkeys(skips))
        return DataError(
            f"gave up on training sample {global_index}: {len(dict.fromkeys(skips))} files drawn one after the other "
            f"could not be read:\n  {listed}"
        )

    def _load(self, item: AudioFile, sampling_rate: int, *, start: float = 0.0, duration: float) -> np.ndarray:
        load = load_clip if self.cache is None else self.cache.load
        return load(item, sampling_rate, start=start, duration=duration)

    def _crop(self, index: int, place: int, slots: int, global_index: int, longest: int) -> np.ndarray:
        """The sample of slot ``place`` of a file's ``slots``: a random crop, or all of a file that is not longer."""
        item = self.files[index]
        rate = self.sampling_rate
        spare = int(self._num_samples[index]) - longest
        if spare <= 0:
            waveform = self._load(item, rate, duration=longest / rate)
        else:
            draw = uniform(self.seed, _CROP, global_index, index)
            start = min(spare, int((place + draw) / slots * (spare + 1)))
            try:
                waveform = self._load(item, rate, start=start / rate, duration=longest / rate)
            except AudioError as error:
                raise _listed_too_long(item, error) from error
        return self._checked(waveform, item)

    def _join(
        self, members: np.ndarray, unit: int, place: int, slots: int, epoch: int, skips: list[Skip]
    ) -> np.ndarray:
        """The sample of slot ``place`` of a group's ``slots``: files from there on until the crop is full."""
        num_files = len(members)
        first = place * num_files // slots
        pieces: list[np.ndarray] = []
        missing, failures = self.crop_samples, 0
        for step in range(num_files):
            position = permute((first + step) % num_files, num_files, self.seed, _JOIN, epoch, unit)
            item = self.files[members[position]]
            try:
                piece = self._load(item, self.sampling_rate, duration=missing / self.sampling_rate)
                # The last piece may be cut to any length; the file itself must not be too short.
                pieces.append(piece if len(piece) == missing else self._checked(piece, item))
            except AudioError as error:
                failures += 1
                if failures == self.max_attempts or (step == num_files - 1 and not pieces):
                    raise
                skips.append(error.skip)
                continue
            missing -= len(piece)
            if missing == 0:
                break
        return np.concatenate(pieces)

    def _checked(self, waveform: np.ndarray, item: AudioFile) -> np.ndarray:
        seconds = len(waveform) / self.sampling_rate
        if seconds < self.min_seconds:
            raise AudioError(item.path, "too short", f"{seconds:.3f} s, at least {self.min_seconds:g} s are needed")
        return waveform


def _listed_too_long(item: AudioFile, error: AudioError) -> AudioError:
    """The same for every crop of a file or part that ends before the crop does: what its list says, and what it has."""
    if error.skip.reason not in ("no samples", "truncated") or item.duration is None:
        return error
    try:
        found = clip_duration(item, audio_info(item.path))
    except AudioError as of_all:
        return of_all if item.is_part else error
    if error.skip.reason == "truncated":
        return error
    detail = f"listed with {item.duration:.3f} s, the file has {found:.3f} s: correct the list, or leave durations out"
    return AudioError(item.path, "truncated", detail)


def _duration(item: AudioFile) -> float:
    if item.duration is not None:
        return item.duration
    try:
        return clip_duration(item, audio_info(item.path))
    except AudioError as error:
        raise DataError(f"{error}; leave such files out with scan()") from error
