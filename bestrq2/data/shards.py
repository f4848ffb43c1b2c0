"""Pack audio into tar shards in webdataset's naming: few large files where many small ones are slow.

    bestrq2 shards recordings/ --out shards/
    bestrq2 train --data shards/

The files are packed as they are, in their order, each with a .json of its duration, sampling rate, domain, label and
further columns: training from the shards is, bit for bit, training from the files. Clips of HDF5 files, which are
samples and no files, become FLAC of the same samples, or float32 WAV where these are above full scale.
"""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from bestrq2.console import progress_bar
from bestrq2.data.archives.opening import open_member
from bestrq2.data.archives.readers import SampleReader
from bestrq2.data.archives.tar import list_tar, open_tar_member
from bestrq2.data.audio import audio_info, load_audio
from bestrq2.data.cells import as_json
from bestrq2.data.columns import with_place
from bestrq2.data.files import AudioFile, address, is_audio, split_address
from bestrq2.data.manifest import write_manifest
from bestrq2.data.parts import is_whole, load_clip
from bestrq2.durability import flush_file, named_in_errors
from bestrq2.errors import AudioError, DataError, Skip, check_open_files, counted

__all__ = ["Packed", "pack"]

_MAGIC = ((b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"RIFF", ".wav"), (b"RF64", ".wav"), (b"FORM", ".aiff"))
_SUMS = "SHA256SUMS"


@dataclass
class Packed:
    """The ``shards`` that were written, their ``files`` by address, and what could not be read on the way."""

    shards: list[Path] = field(default_factory=list)
    files: list[AudioFile] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def pack(
    files: Sequence[AudioFile],
    out: str | os.PathLike[str],
    *,
    max_bytes: float = 1 << 30,
    prefix: str = "shards",
    progress: bool = False,
) -> Packed:
    """Write shards of at most ``max_bytes`` (more only for a single larger file) into the new folder ``out``.

    The folder appears when everything in it is written, read back and equal, or not at all. Beside the shards are their
    indices, ``manifest.csv`` with the address and the columns of every clip, and ``SHA256SUMS`` for ``sha256sum -c``.

    Args:
        files: in the order to keep; durations and sampling rates that are known are kept, to the last bit.
        out: must not exist, or be empty.
        max_bytes: size of a shard; infinity: one shard.
        prefix: shards are named ``prefix-000000.tar`` and so on.
        progress: show a progress bar.

    Raises:
        DataError: ``out`` is not empty, nothing could be read, or what was written reads back differently.
        OSError: the folder cannot be written.
    """
    target = Path(out)
    if not max_bytes >= 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    if not re.fullmatch(r"[^\s./{}*?\[\]][^\s/{}*?\[\]]*", prefix):
        raise ValueError(
            f"prefix must be a file name without dots in front, spaces, braces or wildcards, got {prefix!r}"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists and is not an empty folder; name another one")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        packed = Packed()
        shard: _Shard | None = None
        with progress_bar(total=len(files), desc="packing", unit="file", disable=not progress) as bar:
            for clip in _clips(files, packed.skips, bar):
                if shard is not None and shard.size_with(clip) > max_bytes:
                    packed.files += shard.finish()
                    shard = None
                if shard is None:
                    name = f"{prefix}-{len(packed.shards):06d}.tar"
                    packed.shards.append(target / name)
                    shard = _Shard(partial / name, packed.shards[-1])
                shard.add(clip)
        if shard is not None:
            packed.files += shard.finish()
        if not packed.files:
            listed = "".join(f"\n  {skip}" for skip in packed.skips[:10])
            raise DataError(f"no file could be packed ({counted(len(files), 'file')} tried):{listed}")
        write_manifest(partial / "manifest.csv", packed.files)
        with named_in_errors(target / _SUMS), open(partial / _SUMS, "w", encoding="utf-8") as file:
            for written in packed.shards:
                file.write(f"{_sha256(partial / written.name)}  {written.name}\n")
            file.flush()
            flush_file(file.fileno())
        if target.exists():
            target.rmdir()  # empty, or this fails
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    moved = [item.path.replace(str(partial), str(target), 1) for item in packed.files]
    packed.files = [replace(item, path=path) for item, path in zip(packed.files, moved)]
    return packed


@dataclass(frozen=True)
class _Clip:
    """A file to pack: its ``name`` in the shard, its bytes, the text of its .json, and the file itself."""

    name: str
    content: bytes
    sidecar: bytes
    item: AudioFile

    @property
    def sidecar_name(self) -> str:
        return self.name.rpartition(".")[0] + ".json"

    @property
    def parts(self) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
        return (self.name, self.content), (self.sidecar_name, self.sidecar)

    @property
    def size(self) -> int:
        """Bytes in a shard: for each part a header, which a long name lengthens, and whole blocks."""
        total = 0
        for name, content in self.parts:
            length = len(os.fsencode(name))
            long_name = 0 if length <= tarfile.LENGTH_NAME else tarfile.BLOCKSIZE + _blocks(length + 1)
            total += long_name + tarfile.BLOCKSIZE + _blocks(len(content))
        return total


def _blocks(count: int, size: int = tarfile.BLOCKSIZE) -> int:
    return -(-count // size) * size


def _clips(files: Sequence[AudioFile], skips: list[Skip], bar: tqdm) -> Iterator[_Clip]:
    """The content of one file after the other; what cannot be read is added to ``skips``."""
    places = _places(files)
    for number, (item, stem) in enumerate(zip(files, _names(places))):
        bar.update()
        try:
            content, extension = _content(item)
        except AudioError as error:
            skips.append(error.skip)
            continue
        except OSError as error:
            check_open_files(error)
            reason = "missing" if isinstance(error, FileNotFoundError) else "not readable"
            skips.append(Skip(item.path, reason, error.strerror or str(error)))
            continue
        if item.is_part and not is_whole(item):
            item = replace(item, columns=with_place(item.columns, places[number], item.start, item.end))
        row = {"duration": item.duration, "sampling_rate": item.sampling_rate, "domain": item.domain}
        row["label"] = item.label
        row = {key: value for key, value in row.items() if value is not None} | (item.columns or {})
        text = json.dumps(as_json(row), allow_nan=False)
        yield _Clip(stem + extension, content, text.encode(), item)


def _places(files: Sequence[AudioFile]) -> list[str]:
    """The path of every file below the folder that all have in common."""
    paths = [os.path.abspath(item.path.replace("::", os.sep)) for item in files]
    folders = {os.path.dirname(path) for path in paths}
    base = os.path.commonpath(folders) if folders else ""
    return [os.path.relpath(path, base) for path in paths]


def _names(places: Sequence[str]) -> list[str]:
    """A unique name without extension for every place.

    A dot in a file's name would end webdataset's key, and one in front would hide it, so dots become underscores.
    """
    used: set[str] = set()
    names = []
    for place in places:
        folder, name = os.path.split(place)
        stem = os.path.splitext(name)[0] if is_audio(name) else name
        parts = [f"_{part[1:]}" if part.startswith(".") else part for part in folder.split(os.sep) if part]
        path = "/".join([*parts, stem.replace(".", "_")])
        unique, number = path, 2
        while unique in used:
            unique, number = f"{path}~{number}", number + 1
        used.add(unique)
        names.append(unique)
    return names


def _content(item: AudioFile) -> tuple[bytes, str]:
    """The bytes of an audio file and its extension; a part of a file becomes one of its (mixed) samples."""
    if item.is_part:
        info = soundfile.info(item.path) if os.path.isfile(item.path) else None
        samples = load_clip(item, rate := audio_info(item.path).sampling_rate)
        exact = info is not None and info.channels == 1 and info.subtype in ("PCM_16", "PCM_S8", "PCM_U8")
        return _as_file(samples, rate, exact)
    member = open_member(item.path)
    if isinstance(member, SampleReader):
        stored = member.stored.dtype
        samples = load_audio(item.path, member.samplerate)
        return _as_file(samples, member.samplerate, stored.kind == "i" and stored.itemsize <= 2)
    with open(item.path, "rb") if member is None else member as file:
        content = file.read()
    if not content:
        raise AudioError(item.path, "empty file")
    parts = split_address(item.path)
    name = item.path if parts is None else parts[1]
    if is_audio(name):
        return content, os.path.splitext(name)[1].lower()
    return content, next((extension for magic, extension in _MAGIC if content.startswith(magic)), ".mp3")


def _as_file(samples: np.ndarray, rate: int, exact: bool) -> tuple[bytes, str]:
    """Mono samples as a FLAC, of 16 bits if these are ``exact``, else of 24; as a WAV of float32 where it would clip,
    as decoded MP3s of loud music would. With the extension."""
    if float(abs(samples).max()) > 1:
        content = samples.astype("<f4").tobytes()
        form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)  # soundfile would note the time
        data = struct.pack("<4sI", b"data", len(content))
        return struct.pack("<4sI4s", b"RIFF", 36 + len(content), b"WAVE") + form + data + content, ".wav"
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16" if exact else "PCM_24")
    return buffer.getvalue(), ".flac"


class _Shard:
    """One shard while it is written."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path, self.target, self._size = path, target, 0  # target: what it will be called
        self._written: list[tuple[AudioFile, str, str]] = []  # file, name in the shard, hash of its bytes
        self._file = open(path, "wb")  # noqa: SIM115 (closed by finish)
        self._tar = tarfile.open(  # noqa: SIM115
            fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        )

    def add(self, clip: _Clip) -> None:
        for name, content in clip.parts:
            header = tarfile.TarInfo(name)  # no time and no owner: the same files give the same shard
            header.size, header.mode = len(content), 0o644
            with named_in_errors(self.target):
                self._tar.addfile(header, io.BytesIO(content))
        vars(self._tar)["members"].clear()  # else tarfile keeps them all
        self._written.append((clip.item, clip.name, hashlib.sha256(clip.content).hexdigest()))
        self._size += clip.size

    def size_with(self, clip: _Clip) -> int:
        """Bytes of the finished shard if this clip is its last."""
        return _blocks(self._size + clip.size + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def finish(self) -> list[AudioFile]:
        """Close the shard, read it back, and return its clips by address.

        Raises:
            DataError: a clip reads back differently.
        """
        with named_in_errors(self.target), self._file:
            self._tar.close()
            self._file.flush()
            flush_file(self._file.fileno())
        listing = list_tar(str(self.path))
        expected = [
            replace(item, path=address(str(self.path), name), start=0.0, end=None) for item, name, _ in self._written
        ]
        if listing.files != expected or listing.skips:
            what = "; ".join(map(str, listing.skips)) or "other clips"
            raise DataError(f"{self.path} does not read back as it was written: {what}")
        for _, name, digest in self._written:
            with open_tar_member(str(self.path), name) as member:
                if hashlib.sha256(member.read()).hexdigest() != digest:
                    raise DataError(f"{self.path}: {name} does not read back as it was written")
        return expected


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    # The former name of the command `bestrq2 shards`; the entry points are above this package, so no plain import.
    import_module("bestrq2.command").leave(import_module("bestrq2.shards").main())
