"""Fill a cache of decoded audio: only what is missing or changed, safe against kills, by one process at a time."""

import contextlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bestrq2.console import progress_bar
from bestrq2.data.cache import SampleCache, cache_key, checksums, cut_share, decode_clip, shard_path, to_int16
from bestrq2.data.files import AudioFile, split_address
from bestrq2.durability import named_in_errors
from bestrq2.errors import AudioError, DataError, byte_count, counted, printable

__all__ = ["CacheReport", "open_cache"]

logger = logging.getLogger(__name__)

FORMAT = 1
DECODER = 2  # in every row; without it MP3s were decoded with seams (bestrq2.data.decoder)
SHARD_BYTES = 1 << 30
MUCH_CUT = 1e-3  # share of the samples; resampling alone takes some peaks of loud music above full scale
COMMIT_BYTES, COMMIT_SECONDS = 64 << 20, 10.0  # a kill costs at most the work of one commit
_INDEX = "index.jsonl"
_DECODE = (("path", str), ("size", int), ("mtime", int))


@dataclass(frozen=True)
class CacheReport:
    """Statistics of :func:`open_cache`: numbers of files, and bytes of samples.

    Attributes:
        files, bytes: in the cache now, of those asked for.
        added: decoded now, of which ``changed`` had other samples before, ``damaged`` bad ones, and ``older`` are MP3s
            that an earlier version decoded with seams.
        rounded: files with more than 16 bits.
        clipped: of these, files with samples above full scale, which are cut.
        failed: files that cannot be decoded completely.
    """

    folder: Path
    files: int
    bytes: int
    added: int
    changed: int
    damaged: int
    older: int
    rounded: int
    clipped: int
    failed: int

    def __str__(self) -> str:
        parts = [f"{self.added} decoded now"]
        parts += [f"{count} {name}" for name in ("changed", "damaged", "failed") if (count := getattr(self, name))]
        parts += [f"{self.older} MP3s again that an earlier version decoded with seams"] if self.older else []
        parts.append(f"{self.rounded} rounded to 16 bits" if self.rounded else "all exact in 16 bits")
        parts += [f"{self.clipped} clipped at full scale"] if self.clipped else []
        return f"{self.folder}: {counted(self.files, 'file')}, {byte_count(self.bytes)} ({', '.join(parts)})"


def open_cache(
    folder: str | os.PathLike[str],
    files: Sequence[AudioFile],
    sampling_rate: int = 16000,
    *,
    verify: bool = False,
    threads: int | None = None,
    progress: bool = False,
) -> tuple[SampleCache, CacheReport]:
    """Decode what the cache lacks, and open it.

    A file is decoded again if its size or modification time changed, or its samples are missing; an MP3 also if an
    earlier version decoded it, with seams. Samples are on the
    disk before the index names them: after a kill the next call goes on behind the last commit. Processes that fill one
    cache wait for each other.

    Args:
        folder: of caches of any sampling rate; made if it does not exist.
        files: to find in the cache afterwards; what else is in it stays.
        sampling_rate: in Hz.
        verify: compare all checksums, and decode again what is damaged. Otherwise they are compared when samples are
            read for the first time.
        threads: files decoded at once; default: the processors, at most 16.
        progress: show a progress bar.

    Raises:
        DataError: no room for the samples, or a folder that holds something else.
        OSError: the folder cannot be written.
    """
    target = Path(folder) / str(sampling_rate)
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        known, ends = _read_index(target)
        wanted: list[tuple[AudioFile, dict[str, Any]]] = []
        changed = damaged = older = 0
        sources: dict[str, tuple[int, int] | None] = {}
        old = SampleCache(target, sampling_rate, [row for row in known.values() if "reason" not in row])
        for item in files:
            key = cache_key(item)
            row, source = known.get(key), _source(item.path, sources)
            if row is not None and source is not None and (row["size"], row["mtime"]) != source:
                changed += 1
            elif row is not None and verify and old.damaged(item):
                damaged += 1
            elif row is not None and source is not None and _has_seams(item, row):
                older += 1
            elif row is not None:
                continue
            wanted.append(
                (item, {"path": key, "size": source[0] if source else 0, "mtime": source[1] if source else 0})
            )
        _check_room(target, [item for item, _ in wanted], sampling_rate)
        with (
            _Writer(target, known, ends) as writer,
            progress_bar(total=len(wanted), desc="decoding", unit="file", disable=not progress) as bar,
        ):
            for row, samples in _decoded(wanted, sampling_rate, threads or min(16, os.cpu_count() or 1)):
                writer.add(row, samples)
                bar.update()
        rows = list({key: known[key] for key in map(cache_key, files)}.values())
    present = [row for row in rows if "reason" not in row]
    _warn_of_cut(target, present)
    cache = SampleCache(target, sampling_rate, present, len(rows) - len(present))
    report = CacheReport(
        target,
        len(present),
        2 * sum(row["count"] for row in present),
        len(wanted),
        changed,
        damaged,
        older,
        sum(not row["exact"] for row in present),
        sum(row.get("cut", 0) > 0 for row in present),
        len(rows) - len(present),
    )
    return cache, report


def _warn_of_cut(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Name the files that are far above full scale, such as floating samples that were never normalised."""
    found = sorted((row for row in rows if row.get("cut", 0) > MUCH_CUT), key=lambda row: -row["cut"])
    if found:
        worst = ", ".join(f"{printable(row['path'].split(chr(0))[0])} {row['cut']:.1%}" for row in found[:3])
        logger.warning(
            f"{folder}: {counted(len(found), 'file')} louder than full scale, which 16 bits cannot hold: samples are "
            f"cut ({worst}{', ...' if len(found) > 3 else ''}). Lower their level, or train from the files"
        )


def _has_seams(item: AudioFile, row: dict[str, Any]) -> bool:
    return item.path.lower().endswith(".mp3") and "reason" not in row and row.get("decoder", 1) != DECODER


def _source(path: str, seen: dict[str, tuple[int, int] | None]) -> tuple[int, int] | None:
    """Size and modification time in ns of a file, or of the archive of a clip; None if it cannot be seen."""
    inside = split_address(path)
    name = path if inside is None else inside[0]
    if name not in seen:
        try:
            status = os.stat(name)
            seen[name] = (status.st_size, status.st_mtime_ns)
        except OSError:
            seen[name] = None
    return seen[name]


def _decoded(
    wanted: Iterable[tuple[AudioFile, dict[str, Any]]], sampling_rate: int, threads: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Index rows and samples in order; a row with a ``reason`` is that of a file that cannot be decoded."""

    def decode(item: AudioFile, row: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        try:
            waveform = decode_clip(item, sampling_rate)
        except AudioError as error:
            return row | {"reason": error.reason, "detail": error.detail}, np.zeros(0, "<i2")
        samples, exact = to_int16(waveform)
        row |= {"decoder": DECODER, "count": len(samples), "exact": exact, "checksums": checksums(samples)}
        return row if exact else row | {"cut": cut_share(waveform)}, samples

    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[Future[tuple[dict[str, Any], np.ndarray]]] = deque()
        for item, row in wanted:
            waiting.append(pool.submit(decode, item, row))
            if len(waiting) == 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Writer:
    """Appends samples to the last shard and rows to the index, which never runs ahead of the shards."""

    def __init__(self, folder: Path, known: dict[str, dict[str, Any]], ends: dict[int, int]) -> None:
        self.folder, self.known = folder, known
        self.pending: list[dict[str, Any]] = []
        self.pending_bytes, self.committed = 0, time.monotonic()
        # Behind the last sample that the index names there may be some of a build that was killed. What it names is
        # never written again, even where a newer row has replaced it: another process may read it.
        self.shard = max(ends, default=0)
        self.at = ends.get(self.shard, 0)
        self.file: BinaryIO | None = None  # at _path

    @property
    def _path(self) -> Path:
        return shard_path(self.folder, self.shard)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.commit()  # also what was decoded before an error or Ctrl-C
        finally:
            if self.file is not None:
                with named_in_errors(self._path):
                    self.file.close()

    def add(self, row: dict[str, Any], samples: np.ndarray) -> None:
        if "reason" not in row:
            if self.at and 2 * (self.at + len(samples)) > SHARD_BYTES:
                self.commit()
                self._open(self.shard + 1, 0)
            if self.file is None:
                self._open(self.shard, self.at)
            assert self.file is not None
            with named_in_errors(self._path):
                self.file.write(samples.tobytes())
            row = row | {"shard": self.shard, "at": self.at}
            self.at += len(samples)
        self.pending.append(row)
        self.pending_bytes += samples.nbytes
        if self.pending_bytes >= COMMIT_BYTES or time.monotonic() - self.committed > COMMIT_SECONDS:
            self.commit()

    def _open(self, shard: int, at: int) -> None:
        if self.file is not None:
            with named_in_errors(self._path):
                self.file.close()
        path = shard_path(self.folder, shard)
        self.file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed in __exit__)
        self.file.truncate(2 * at)
        self.file.seek(2 * at)
        self.shard, self.at = shard, at

    def commit(self) -> None:
        if self.pending:
            if self.file is not None:
                with named_in_errors(self._path):
                    self.file.flush()
                    os.fsync(self.file.fileno())
            new = not (self.folder / _INDEX).exists()
            path = self.folder / _INDEX
            with named_in_errors(path), open(path, "a", encoding="ascii") as index:
                if new:
                    index.write(json.dumps({"format": FORMAT}) + "\n")
                index.writelines(json.dumps(row) + "\n" for row in self.pending)
                index.flush()
                os.fsync(index.fileno())
            self.known.update({row["path"]: row for row in self.pending})
        self.pending, self.pending_bytes, self.committed = [], 0, time.monotonic()


def _read_index(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[int, int]]:
    """The newest row of every path whose samples are there, and the samples in use of every shard.

    A line that a kill cut off is taken out of the file.
    """
    path = folder / _INDEX
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}, {}
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    rows: dict[str, dict[str, Any]] = {}
    sizes: dict[int, int] = {}
    ends: dict[int, int] = {}
    for number, line in enumerate(content[:whole].splitlines()):
        try:
            row = json.loads(line)
            if number == 0:
                if row["format"] != FORMAT:
                    raise DataError(
                        f"{path} has format {row['format']}, expected {FORMAT}: use another folder for the cache"
                    )
                continue
            if "reason" not in row:
                shard = int(row["shard"])
                if shard not in sizes:
                    file = shard_path(folder, shard)
                    sizes[shard] = file.stat().st_size if file.exists() else 0
                if 2 * (row["at"] + row["count"]) > sizes[shard] or not {"exact", "checksums"} <= row.keys():
                    rows.pop(row["path"], None)
                    continue
                ends[shard] = max(ends.get(shard, 0), row["at"] + row["count"])
            rows[row["path"]] = {name: kind(row[name]) for name, kind in _DECODE} | row
        except (ValueError, KeyError, TypeError) as error:
            if number == 0:
                raise DataError(f"{path} is no index of a cache: use another folder for the cache") from error
            continue  # damaged: its file is decoded again
    return rows, ends


def _check_room(folder: Path, files: Sequence[AudioFile], sampling_rate: int) -> None:
    needed = 2 * sampling_rate * sum(item.duration or 0.0 for item in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{printable(str(folder))} has {byte_count(free)} free, {byte_count(needed)} of samples are needed: free "
            "some space, or name a folder with more room for the cache (data.cache, bestrq2 cache --out)"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a cache; wait for another process that fills it."""
    try:
        import fcntl
    except ImportError:  # Windows: the index stays readable, but two builds at once would overwrite each other
        yield
        return
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.warning(f"{folder}: waiting for another process that fills this cache")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
