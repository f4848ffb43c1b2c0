"""Crops of audio files by global sample index: which file, which part, what replaces it if it cannot be read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch.utils.data import Dataset

from bestrq2.data.audio import AudioError, DataError, Skip, audio_info, load_audio
from bestrq2.data.manifest import AudioFile
from bestrq2.data.order import SampleOrder, permute
from bestrq2.hashing import mix, uniform

__all__ = ["CropDataset", "DataError", "Sample"]

# Domains of the hash: what is drawn must not be correlated with what else is drawn from the same seed and index.
_CROP, _REPLACEMENT, _JOIN = 1, 2, 3


@dataclass(frozen=True)
class Sample:
    """One training sample: ``waveform`` (S,) float32, its global ``index``, and the files skipped on the way to it."""

    waveform: np.ndarray
    index: int
    skips: tuple[Skip, ...] = field(default=())


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

    A file that cannot be read is replaced by another, drawn from (seed, index, attempt); the sample then carries a
    :class:`Skip` for it. So the result depends on (files, seed, index) alone, never on workers, ranks or earlier calls.

    Args:
        files: usable files; durations that are None are read from the headers now.
        crop_seconds: longest sample.
        sampling_rate: of the waveforms, in Hz.
        seed: of the order and of every crop.
        join_short: fill up short files as described; otherwise they are returned at their own length.
        min_seconds: a file that turns out shorter when read is skipped as "too short".
        max_attempts: different unreadable files (or groups) drawn for one sample until a :class:`DataError`.

    ``num_slots`` is the length of an epoch in samples, ``seconds`` the audio in the files.
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
        self.files = list(files)
        self.sampling_rate = sampling_rate
        self.crop_samples = round(crop_seconds * sampling_rate)
        self.seed = seed
        self.join_short = join_short
        self.min_seconds = min_seconds
        self.max_attempts = max_attempts
        self._durations = np.array([_duration(item) for item in self.files])
        self.seconds = float(self._durations.sum())

        slots = np.maximum(1, np.rint(self._durations / crop_seconds)).astype(np.int64)
        self._groups: list[np.ndarray] = []  # the short files of each group, as indices into files
        group_slots: list[int] = []
        if join_short:
            short = np.floor(self._durations * sampling_rate) < self.crop_samples
            members: dict[str, list[int]] = {}
            for index in np.flatnonzero(short):
                members.setdefault(self.files[index].group, []).append(int(index))
            for indices in members.values():
                self._groups.append(np.array(indices))
                group_slots.append(max(1, round(float(self._durations[indices].sum()) / crop_seconds)))
            slots[short] = 0
        # A unit is a file, or after all files a group of short ones; slots are counted through them.
        self._slots = np.concatenate([slots, np.array(group_slots, dtype=np.int64)])
        self._ends = np.cumsum(self._slots)
        self.num_slots = int(self._ends[-1])
        self.order = SampleOrder(self.num_slots, seed)

    def __len__(self) -> int:
        """Samples in an epoch; a global index may go beyond, into the epochs that follow."""
        return self.num_slots

    def __getitem__(self, global_index: int) -> Sample:
        epoch, slot = self.order.item(global_index)
        skips: list[Skip] = []
        failed: set[int] = set()
        for attempt in range(min(self.max_attempts, int(np.count_nonzero(self._slots)))):
            if attempt:
                slot = mix(self.seed, _REPLACEMENT, global_index, attempt) % self.num_slots
            unit = int(np.searchsorted(self._ends, slot, side="right"))
            place = slot - int(self._ends[unit] - self._slots[unit])  # which slot of the unit
            while unit in failed or not self._slots[unit]:  # one long broken file must not be drawn over and over
                unit = (unit + 1) % len(self._slots)
                place = slot % max(1, int(self._slots[unit]))
            try:
                if unit < len(self.files):
                    waveform = self._crop(unit, place, global_index)
                else:
                    waveform = self._join(self._groups[unit - len(self.files)], unit, place, epoch, skips)
                return Sample(waveform, global_index, tuple(skips))
            except AudioError as error:
                skips.append(error.skip)
                failed.add(unit)
        listed = "\n  ".join(str(skip) for skip in dict.fromkeys(skips))
        raise DataError(
            f"gave up on training sample {global_index}: {len(dict.fromkeys(skips))} files drawn one after the other "
            f"could not be read:\n  {listed}"
        )

    def _crop(self, index: int, place: int, global_index: int) -> np.ndarray:
        """The sample of slot ``place`` of a file: a random crop, or the whole file if it is not longer."""
        item = self.files[index]
        rate, crop = self.sampling_rate, self.crop_samples
        spare = int(self._durations[index] * rate) - crop
        if spare <= 0:
            waveform = load_audio(item.path, rate, duration=crop / rate)
        else:
            draw = uniform(self.seed, _CROP, global_index, index)
            start = min(spare, int((place + draw) / int(self._slots[index]) * (spare + 1)))
            waveform = load_audio(item.path, rate, start=start / rate, duration=crop / rate)
        return self._checked(waveform, item)

    def _join(self, members: np.ndarray, unit: int, place: int, epoch: int, skips: list[Skip]) -> np.ndarray:
        """The sample of slot ``place`` of a group: files from there on in this epoch's order until the crop is full."""
        num_files = len(members)
        first = place * num_files // int(self._slots[unit])
        pieces: list[np.ndarray] = []
        missing, failures = self.crop_samples, 0
        for step in range(num_files):
            position = permute((first + step) % num_files, num_files, self.seed, _JOIN, epoch, unit)
            item = self.files[members[position]]
            try:
                piece = load_audio(item.path, self.sampling_rate, duration=missing / self.sampling_rate)
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


def _duration(item: AudioFile) -> float:
    if item.duration is not None:
        return item.duration
    try:
        return audio_info(item.path).duration
    except AudioError as error:
        raise DataError(f"{error}; leave such files out with scan()") from error
