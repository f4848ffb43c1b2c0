"""Data sources: folders, manifests, single files, and archives by name or pattern."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bestrq2.data.archives.opening import list_archives as read_archives
from bestrq2.data.audio import audio_info
from bestrq2.data.columns import of_manifest, together
from bestrq2.data.fields import columns_in_seconds
from bestrq2.data.files import AudioFile, Listing, address, is_archive, is_audio, split_address
from bestrq2.data.manifest import check_first_channel, discover_folder, is_manifest, read_rows
from bestrq2.data.parts import clip_duration, is_whole
from bestrq2.data.patterns import expand
from bestrq2.data.splits import choose_split, deeper_splits, split_inside, split_of, split_of_row, unknown_splits
from bestrq2.errors import AudioError, DataError, Skip, check_open_files, counted, printable

__all__ = ["Found", "Source", "find_audio"]

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_COMPRESSED = {".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".tzst"}
_EXPECTED = (
    "a folder, a .csv or .jsonl manifest, .tar shards, an .h5 file, a saved dataset, a .parquet file, an audio file, "
    "or a pattern for any of them, such as 'audio/*/*.wav' or 'shards-{000000..000009}.tar'"
)


@dataclass
class Found:
    """All ``files`` of a source that was called ``name``, what was damaged, other files by extension, ``notes`` on how
    the source was read, ``repeated`` names of clips and ``lost`` columns as in a listing, and rows with a clip
    ``again``."""

    name: str
    files: list[AudioFile] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unrated: list[str] = field(default_factory=list)
    shared: list[tuple[str, int]] = field(default_factory=list)
    again: int = 0

    def add(self, listing: Listing) -> None:
        self.files += listing.files
        self.skips += listing.skips
        self.ignored += listing.ignored
        self.notes += listing.notes
        self.repeated += listing.repeated
        self.unrated += listing.unrated
        self.shared += listing.shared
        self.lost += [name for name in listing.lost if name not in self.lost]


def find_audio(
    source: Source,
    *,
    progress: bool = False,
    split: str | None = "train",
    columns: bool = False,
    check: bool = False,
) -> Found:
    """List the clips of a source in a stated order, without opening audio.

    A source is a folder, a manifest, an archive (a ``.tar`` shard in webdataset's naming, ``.h5`` in the published
    layout, ``.arrow`` or ``.parquet`` with an audio column), a dataset folder of Hugging Face's ``save_to_disk``, an
    audio file, or several of these. Names may be patterns: ``{000000..000009}`` and ``{a,b}`` in the order written,
    ``*`` and ``?`` sorted. A folder with audio files stands for these; one without, for the archives in it, sorted.

    Args:
        source: one name or several.
        progress: show a progress bar while archives are listed.
        split: of a folder with files of several splits (train, validation, test by their names), the one that is used;
            None: all, with a note in ``notes``.
        columns: keep the other columns of manifests and archives with the files; with all splits also the split that
            the names of folders and archives say, as a column ``split``.
        check: every clip will be decoded, so that no note is needed on stated times that are not those of the files.

    Raises:
        DataError: a name that does not exist or cannot be listed, or a package that is needed and not installed.
        ManifestError: a manifest that cannot be understood.
    """
    sources = [os.fspath(part) for part in ([source] if isinstance(source, str | os.PathLike) else source)]
    found = Found(", ".join(sources) or "an empty list of sources")
    archives: list[tuple[str, str]] = []
    named: dict[str, str] = {}  # split of an archive by its name, and of a file of a pattern, of several splits
    source_of: dict[str, tuple[int, int]] = {}  # the source that an archive is from, and the pattern in it

    def list_archives() -> None:
        files: list[AudioFile] = []
        splits: list[str | None] = []
        of_names: list[str | None] = []  # what the names of an archive or of folders inside of it say, and no column
        places: list[tuple[tuple[int, int], bool]] = []  # the source, and whether the archive was chosen by its name
        for (path, _), listing in zip(archives, read_archives(archives, progress, columns), strict=True):
            check_first_channel(listing.asking)
            found.add(replace(listing, files=[]))
            begin = address(path, "")
            for item, own in zip(listing.files, listing.splits or [None] * len(listing.files), strict=True):
                inside = item.path.removeprefix(begin) if item.path.startswith(begin) else ""
                splits.append(own)
                of_names.append(None if own else named.get(path) or split_inside(inside))
            places += [(source_of[path], path in named)] * len(listing.files)
            files += listing.files
        if archives:
            # One that is a source of its own was meant, whatever its folders are called.
            told = Counter(at for at, _ in {(at, name) for (at, _), name in zip(places, of_names) if name})
            of_names = [name if told[at] > 1 else None for (at, _), name in zip(places, of_names)]
            splits = [own or (None if known else name) for own, name, (_, known) in zip(splits, of_names, places)]
            name = archives[0][0] + (f" and {len(archives) - 1} more" if len(archives) > 1 else "")
            files, note = choose_split(files, splits, split, name)
            if columns and split is None and (note or named):
                files = _with_split_column(files, of_names)
            folders = {os.path.dirname(item.path) for item in files} if split is not None else ()
            members = (clip[1] for folder in folders if (clip := split_address(f"{folder}/clip")))
            deeper = deeper_splits(members, "", name, "keep their rows of a list that bestrq2 manifest writes")
            found.notes += [text for text in (note, deeper) if text]
            found.notes += _check_unit(name, files, opened=True, check=check)
            found.files += files
        archives.clear()

    parts: list[tuple[tuple[int, int], str]] = []
    for number, pattern in enumerate(sources):
        for folder, names in expand(pattern):
            if folder is not None:
                of_pattern = [split_of(name, folder, not is_audio(name)) for name in names]
                kept, note = choose_split(names, of_pattern, split, pattern)
                if note:
                    named.update((name, own) for name, own in zip(names, of_pattern) if own)
                    found.notes.append(note)
                names = kept
            at = (number, -1 if folder is None else len(parts))
            parts += [(at, name) for name in names]
    for at, part in parts:
        if os.path.isfile(part) and is_archive(part):
            archives.append((part, ""))  # together, so that many shards are listed at once
            source_of[part] = at
            continue
        list_archives()
        if os.path.isdir(part):
            inside = _add_folder(part, found, split, columns, check, named)
            source_of.update((path, at) for path, _ in inside)
            archives += inside
        elif not os.path.exists(part):
            clip = split_address(part)
            if clip is None or not os.path.isfile(clip[0]):
                raise DataError(f"{part} does not exist; expected {_EXPECTED}")
            found.files.append(AudioFile(part))
        elif is_manifest(part):
            _add_manifest(part, found, split, columns, check)
        elif is_audio(part):
            kept_names = [named.get(part) if columns and split is None else None]
            found.files += _with_split_column([AudioFile(part)], kept_names)
        elif Path(part).suffix.lower() in _COMPRESSED:
            raise DataError(f"{part} is compressed, so its members cannot be read at random: unpack it to a .tar first")
        else:
            raise DataError(f"{part} is of no kind that is known; expected {_EXPECTED}")
    list_archives()
    if columns:
        found.files = together(found.files)
    if len(sources) > 1:
        places = {(os.path.abspath(item.path), item.start, item.end) for item in found.files}
        if (again := len(found.files) - len(places) - found.again) > 0:
            found.notes.append(
                f"{found.name}: {counted(again, 'clip')} in several of these sources; each is used as often as it is "
                "listed"
            )
    if found.repeated:  # said once: a data set may have thousands of shards
        clips = counted(sum(number for _, number in found.repeated), "clip")
        shards = counted(len(found.repeated), "shard")
        found.notes.append(
            f"{clips} in {shards} with the name of an earlier one of the same shard, first "
            f"{printable(found.repeated[0][0])}: all are used, the later ones are called NAME~2 and so on"
        )
    if found.shared:
        clips = counted(sum(number for _, number in found.shared), "clip")
        found.notes.append(
            f"{clips} in {counted(len(found.shared), 'shard')} with the key of another clip and several labels, first "
            f"{found.shared[0][0]}: each has the first of .json, .cls and .txt; if they are one per clip, give the "
            "clips keys of their own"
        )
    if found.unrated:
        found.notes.append(
            f"{counted(len(found.unrated), 'HDF5 file')} without a sampling rate, first {printable(found.unrated[0])}: "
            "32000 Hz is taken, as of the published layout; the attribute sample_rate states another one"
        )
    return found


def _add_manifest(path: str, found: Found, split: str | None, columns: bool, check: bool) -> None:
    try:
        rows = read_rows(path)
    except OSError as error:
        check_open_files(error)
        raise DataError(f"manifest {path} cannot be read: {error.strerror or error}") from error
    if columns:
        rows = [(replace(item, columns=of_manifest(row, found.lost)), row) for item, row in rows]
    files, note = choose_split([item for item, _ in rows], [split_of_row(row) for _, row in rows], split, path)
    notes = _check_unit(path, files, rows, check=check)
    if split is not None and (unknown := unknown_splits([row for _, row in rows])):
        notes.append(f"{path}: {unknown}")
    parts = _count_parts(files)
    of_parts = f", {parts} of them parts of longer files" if parts else ""
    segments = Path(path).with_name("segments")
    listed = segments if Path(path).name == "wav.scp" and segments.is_file() else path
    found.notes.append(f"{listed}: {counted(len(rows), 'row')}{of_parts}")
    found.notes += [*([note] if note else []), *notes]
    repeats = len(files) - len({(item.path, item.start, item.end) for item in files})
    found.again += repeats
    if repeats:
        found.notes.append(
            f"{path}: {counted(repeats, 'row')} with a clip that is listed before; it is used as often as it is listed"
        )
    found.files += files


def _count_parts(files: list[AudioFile]) -> int:
    """Clips that are known to be less than their file: they begin late, or another clip of it ends later or begins
    where they end. A file with several places is opened if the one that ends last begins with the file."""
    spans: defaultdict[str, set[tuple[float, float | None]]] = defaultdict(set)
    last: dict[str, tuple[float, bool]] = {}  # seconds, whether the file is known to go on behind them
    for item in files:
        latest = (item.start, True) if item.end is None else (item.end, False)
        last[item.path] = max(last.get(item.path, latest), latest)
        spans[item.path].add((item.start, item.end))
    opened: dict[str, bool] = {}

    def is_less(item: AudioFile) -> bool:
        if item.start > 0 or item.end is None:
            return item.start > 0
        if (item.end, False) < last[item.path]:
            return True
        if len(spans[item.path]) > 1 and item.path not in opened:
            opened[item.path] = not is_whole(item)
        return opened.get(item.path, False)

    return sum(map(is_less, files))


def _check_unit(
    path: str,
    files: list[AudioFile],
    rows: Iterable[tuple[AudioFile, dict[str, Any]]] = (),
    opened: bool = False,
    check: bool = False,
) -> list[str]:
    """Compare a few stated times with the files: milliseconds or samples would be taken for hours, and of files whose
    list says that they are shorter than they are, training uses the beginning alone. Returns notes on one of these and
    on one with a part that is not there.

    Args:
        rows: those of a manifest, for messages.
        opened: clips in archives, too.
        check: every clip will be decoded: no notes on what is corrected or left out then.

    Raises:
        DataError: if they are a hundred times too long or thirty times too short, or if all are minutes: the
            beginning of a file, as NeMo states it, may be short.
    """
    stated = [item for item in files if item.duration is not None and (opened or split_address(item.path) is None)]
    parts: defaultdict[str, list[AudioFile]] = defaultdict(list)
    for item in stated:
        if item.is_part:
            parts[item.path].append(item)
    notes, behind, minutes, looked = [], [], [], 0
    for item in stated[:: max(1, len(stated) // 4)][:5]:
        try:
            info = audio_info(item.path)
        except AudioError:
            continue  # reported when it is read
        looked += 1
        of_file = parts[item.path]
        seconds = item.end if item.end is not None else item.duration or 0.0
        has = f"{printable(item.path)} has {info.duration:.3f} s, the list says {seconds:g}"
        if seconds > 100 * info.duration and seconds > 10:
            ratio = max([seconds, *(part.end or 0.0 for part in of_file)]) / info.duration
            unit = "milliseconds" if 700 < ratio < 1400 else "samples" if ratio > 4000 else "another unit"
            raise _unit_error(path, has, unit, item, _columns_of(item, rows), info.sampling_rate)
        try:
            clip_duration(max(of_file, key=lambda part: part.end or 0.0, default=item), info)
        except AudioError as error:
            behind.append(
                f"{path}: {error}: such parts are skipped and counted when training meets them (bestrq2 manifest "
                "--check leaves them out)"
            )
        if item.is_part and (item.start > 0 or len(of_file) > 1):
            continue
        minutes += (
            [(has, item, info.sampling_rate)] if item.is_part and 50 * seconds < info.duration < 75 * seconds else []
        )
        if info.duration - seconds <= max(1.0, 0.05 * info.duration):
            continue
        if info.duration > 30 * seconds and not item.is_part:
            unit = "minutes" if info.duration < 90 * seconds else "another unit"
            raise _unit_error(path, has, unit, item, _columns_of(item, rows), info.sampling_rate)
        cure = "" if item.is_part else " (bestrq2 manifest --check corrects lists)"
        if item.is_part or not check:
            notes.append(f"{path}: {has}: training uses no more of such a file{cure}")
    if len(minutes) > 2 and len(minutes) == looked:
        has, item, rate = minutes[0]
        raise _unit_error(path, has, "minutes", item, _columns_of(item, rows), rate)
    return notes[:1] + ([] if check else behind[:1])


def _columns_of(item: AudioFile, rows: Iterable[tuple[AudioFile, dict[str, Any]]]) -> dict[str, str]:
    """As :func:`columns_in_seconds`, of the row of a clip, or of rows as bestrq2 names them."""
    found = next((columns_in_seconds(row) for clip, row in rows if clip == item), {})
    return found or ({"start": "start_ms", "end": "end_ms"} if item.is_part else {"duration": "duration_ms"})


def _unit_error(path: str, has: str, unit: str, item: AudioFile, columns: dict[str, str], rate: int) -> DataError:
    """The error on times in another unit, with what to do with the columns that state them."""
    names, verb, them = " and ".join(columns), "is", "the column"
    if len(columns) > 1:
        verb, them = "are", "the columns"
    samples = f"divide by the sampling rate ({rate})"
    cure = {
        "samples": samples,
        "minutes": "multiply by 60",
        "milliseconds": f"name {them} {' and '.join(columns.values())}",
        "another unit": f"convert {them} to seconds",
    }[unit]
    if item.is_part and unit in ("milliseconds", "another unit"):
        cure += f"; if it counts samples, {samples}" if verb == "is" else f"; if they count samples, {samples}"
    return DataError(f"{path}: {names} {verb} expected in seconds; {has}, which looks like {unit}: {cure}")


def _with_split_column(files: list[AudioFile], splits: list[str | None]) -> list[AudioFile]:
    """The same with a column ``split``; one of the source that says something else is called ``source_split``."""
    found = []
    for item, split in zip(files, splits, strict=True):
        if split is not None:
            others = {f"source_{name}" if name == "split" else name: v for name, v in (item.columns or {}).items()}
            item = replace(item, columns=others | {"split": split})
        found.append(item)
    return found


def _add_folder(
    folder: str, found: Found, split: str | None, columns: bool, check: bool, named: dict[str, str]
) -> list[tuple[str, str]]:
    """Add the audio of a folder; returns its archives, if these are to be listed instead, with their splits noted."""
    if os.path.isfile(scp := os.path.join(folder, "wav.scp")):
        _add_manifest(scp, found, split, columns, check)
        return []
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")):
        from bestrq2.data.archives.arrow import saved_dataset_files

        return [(path, "") for path in saved_dataset_files(folder)]
    try:
        listing = discover_folder(folder)
    except OSError as error:
        check_open_files(error)
        raise DataError(f"folder {folder} cannot be listed: {error.strerror or error}") from error
    if listing.files:  # archives beside them are most often the same audio, packed: they are reported as ignored
        splits = [split_of(item.path, folder, False) for item in listing.files]
        files, note = choose_split(listing.files, splits, split, folder)
        if columns and split is None and note:
            files = _with_split_column(files, splits)
        found.add(replace(listing, files=files))
        deeper = None if split is None else deeper_splits((item.path for item in files), folder)
        found.notes += [text for text in (note, deeper) if text]
        return []
    used = Counter(Path(path).suffix.lower() for path, _ in listing.archives)
    found.ignored += listing.ignored - used
    splits = [split_of(path, folder, True) for path, _ in listing.archives]
    archives, note = choose_split(listing.archives, splits, split, folder)
    if note:
        named.update((path, own) for (path, _), own in zip(listing.archives, splits) if own)
        found.notes.append(note)
    if split is not None and (deeper := deeper_splits((path for path, _ in archives), folder)):
        found.notes.append(deeper)
    return archives
