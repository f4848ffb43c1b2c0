"""Open every header once before training: durations for the index, and a report of every file that is left out."""

import csv
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files
from itertools import islice
from pathlib import Path

from bestrq2.console import progress_bar
from bestrq2.data.audio import SILENCE, audio_info
from bestrq2.data.columns import LARGEST
from bestrq2.data.files import ARCHIVES, EXTENSIONS, AudioFile, split_address
from bestrq2.data.parts import clip_duration, part_digest
from bestrq2.data.sources import Source, find_audio
from bestrq2.errors import AudioError, DataError, Skip, counted, printable

__all__ = ["SkipReport", "collect", "scan", "tiny_dataset"]


@dataclass
class SkipReport:
    """Files that were left out, how many files of other kinds lay beside them (``ignored``, by extension), and
    ``notes`` on how the source was read: rows of manifests, splits that were left out. ``lost`` are columns that were
    asked for and cannot be kept, ``unopened`` the number of files whose durations are those of a list."""

    skips: list[Skip] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unopened: int = 0

    def __len__(self) -> int:
        return len(self.skips)

    def counts(self) -> Counter[str]:
        """Number of skips by reason."""
        return Counter(skip.reason for skip in self.skips)

    def __str__(self) -> str:
        """One line: "3 skipped: 2 truncated, 1 missing; 5 ignored: 5 .txt"."""
        parts = []
        if self.skips:
            parts.append(f"{len(self.skips)} skipped: {_count_words(self.counts())}")
        if self.ignored:
            parts.append(f"{sum(self.ignored.values())} ignored: {_count_words(self.ignored)}")
        return "; ".join(parts) or "nothing skipped"

    def lost_note(self) -> list[str]:
        """A note of the columns that are not kept, or not with all clips."""
        if not self.lost:
            return []
        more = f" and {len(self.lost) - 20} more" if len(self.lost) > 20 else ""
        return [
            f"{counted(len(self.lost), 'column')} not kept, or not of all clips: "
            f"{', '.join(map(printable, self.lost[:20]))}{more}. Text, numbers and lists are kept, up to {LARGEST:,} "
            "bytes a clip; keep the source for the rest (its order is kept)"
        ]

    def examples(self, each: int = 3) -> list[str]:
        """Up to ``each`` skipped files of every reason, as printable lines."""
        seen: Counter[str] = Counter()
        lines = []
        for skip in self.skips:
            seen[skip.reason] += 1
            if seen[skip.reason] <= each:
                lines.append(str(skip))
        return lines


def _count_words(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def scan(
    files: Sequence[AudioFile],
    *,
    min_seconds: float = 0.0,
    check: bool = False,
    num_threads: int | None = None,
    progress: bool = False,
    source: str = "the list of files",
) -> tuple[list[AudioFile], SkipReport]:
    """Complete the records with duration and sampling rate, and leave out what cannot be used.

    A file whose duration is already known (from a manifest) is not opened unless ``check``: a large manifest is ready
    at once, and a fault of such a file is met, skipped and reported when it is read.

    Args:
        files: in the order to keep.
        min_seconds: shorter files are left out as "too short".
        check: decode every file completely; also leaves out silent files (nothing above -80 dB of full scale) and
            duplicates (the same decoded samples as an earlier file).
        num_threads: headers opened at once; default: twice the processors, at most 16.
        progress: show a progress bar.
        source: what to call the origin in an error.

    Returns:
        the usable files in their given order, and the report on the others.

    Raises:
        DataError: nothing usable, or a number out of range.
    """
    if not 0 <= min_seconds < math.inf:
        raise DataError(f"min_seconds: expected 0 or more seconds, got {min_seconds:g}")
    if num_threads is not None and num_threads < 1:
        raise DataError(f"threads: expected at least 1, got {num_threads}")
    report = SkipReport()
    usable: list[AudioFile] = []
    first_with: dict[str, str] = {}  # hash of the samples -> path
    wrong: list[str] = []  # durations that a list gave

    def look(item: AudioFile) -> AudioFile | Skip | tuple[AudioFile, str]:
        try:
            if check:
                digest = part_digest(item)
                known = replace(item, duration=digest.info.duration, sampling_rate=digest.info.sampling_rate)
                if digest.peak <= SILENCE:
                    return Skip(item.path, "silent", f"largest magnitude {digest.peak:.1e}")
                return _long_enough(known, min_seconds), digest.sha256
            if item.duration is None:
                info = audio_info(item.path)
                item = replace(item, duration=clip_duration(item, info), sampling_rate=info.sampling_rate)
            return _long_enough(item, min_seconds)
        except AudioError as error:
            return error.skip

    threads = num_threads or min(16, 2 * (os.cpu_count() or 1))
    with progress_bar(
        total=len(files), desc="checking" if check else "scanning", unit="file", disable=not progress
    ) as bar:
        closed = [item for item in files if check or item.duration is None]
        report.unopened = sum(not check and f.duration is not None and not split_address(f.path) for f in files)
        looked = _in_order(look, closed, threads)
        for item in files:
            # Not through the pool, which would take longer for a million known files than all the rest of this.
            result = next(looked) if check or item.duration is None else look(item)
            bar.update()
            if isinstance(result, tuple):
                result, sha256 = result
                if (known := item.duration) is not None and abs(known - result.duration) > max(0.05, 0.01 * known):
                    wrong.append(f"{item.place} {known:.3f} s, found {result.duration:.3f} s")
                first = first_with.setdefault(sha256, result.place)
                if first != result.place:
                    result = Skip(result.path, "duplicate", f"same samples as {first}")
            if isinstance(result, Skip):
                report.skips.append(result)
            else:
                usable.append(result)
    if wrong:
        more = "" if len(wrong) == 1 else f" and {len(wrong) - 1} more"
        report.notes.append(f"listed durations that are not those of the files (which are used): {wrong[0]}{more}")
    if not usable:
        lines = "".join(f"\n  {line}" for line in report.examples())
        raise DataError(f"no usable audio in {source}: found {len(files)} files, {report}{lines}")
    return usable, report


def _long_enough(item: AudioFile, min_seconds: float) -> AudioFile:
    if item.duration is not None and item.duration < min_seconds:
        raise AudioError(item.path, "too short", f"{item.duration:.3f} s, at least {min_seconds:g} s are needed")
    return item


def _in_order(look: Callable, files: Sequence[AudioFile], threads: int) -> Iterator:
    if threads == 1:
        yield from map(look, files)
        return
    with ThreadPoolExecutor(threads) as pool:
        remaining = iter(files)
        while portion := list(islice(remaining, 2048)):  # not a million futures at once
            yield from pool.map(look, portion)


def collect(
    source: Source | None = None,
    *,
    min_seconds: float = 0.0,
    check: bool = False,
    num_threads: int | None = None,
    progress: bool = False,
    split: str | None = "train",
    columns: bool = False,
) -> tuple[list[AudioFile], SkipReport]:
    """Find the audio a user means (see :func:`find_audio`), or the packaged clips for None, and :func:`scan` it.

    Arguments and result as for :func:`find_audio` and :func:`scan`; the report also counts what was found damaged in
    archives.

    Raises:
        DataError: nothing there, or nothing usable; the message counts what was found and why it was left out.
        ManifestError: a manifest that cannot be understood.
    """
    if source is None:
        return scan(tiny_dataset(), min_seconds=min_seconds, source="the packaged clips")
    found = find_audio(source, progress=progress, split=split, columns=columns, check=check)
    if not found.files:
        report = SkipReport(found.skips, found.ignored)
        beside = f"; it holds {_count_words(found.ignored)}" if found.ignored else ""
        lines = "".join(f"\n  {line}" for line in report.examples())
        raise DataError(
            f"no audio files in {found.name} (looked for {' '.join(sorted(EXTENSIONS | ARCHIVES))}){beside}{lines}"
        )
    usable, report = scan(
        found.files,
        min_seconds=min_seconds,
        check=check,
        num_threads=num_threads,
        progress=progress,
        source=found.name,
    )
    report.skips[:0] = found.skips
    report.ignored, report.notes = found.ignored, found.notes + report.notes
    report.lost = found.lost
    return usable, report


def tiny_dataset() -> list[AudioFile]:
    """The 24 packaged clips of real audio, two seconds each at 16 kHz: 8 speech, 8 music, 8 env (the ``domain``).

    CC0 and CC-BY-3.0; their authors are named in the file CREDITS beside them.
    """
    folder = Path(str(package_files("bestrq2.data"))) / "tiny"
    with open(folder / "labels.csv", newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
    return [
        AudioFile(str(folder / row["file"]), duration=2.0, sampling_rate=16000, domain=row["domain"], label=row["item"])
        for row in rows
    ]
