"""The members of a tar archive from its headers alone, also behind damage."""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from bestrq2.data.files import is_audio

__all__ = ["Entry", "walk"]

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 1 << 20
_LONGEST_END = 1 << 16  # zeros after the last member; tar writes up to 10 KiB, a download that stopped may leave more
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


@dataclass(frozen=True)
class Entry:
    """One regular member: ``stop`` is the end of its bytes, beyond the end of the shard if it was cut."""

    name: str
    offset: int
    stop: int


def walk(file: BinaryIO, size: int, damage: list[str]) -> Iterator[Entry]:
    """Every regular member of a tar archive; unreadable parts are noted in ``damage`` and skipped."""
    at, found, ended = 0, 0, False
    long_name: str | None = None
    long_size: int | None = None
    offsets: dict[str, tuple[int, int]] = {}  # of hard links' targets
    while at + _BLOCK <= size:
        file.seek(at)
        block = file.read(_BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if not 0 <= header.size < 1 << 62:
                raise tarfile.HeaderError(f"size {header.size}")
        except tarfile.HeaderError:
            following = _next_header(file, at + _BLOCK, size)
            zeros = not block.strip(b"\0")
            if following is None and zeros:
                ended = True
                if found and size - at > _LONGEST_END:
                    damage.append(f"{size - at} zeros at the end of {size} bytes: members may be lost")
                elif found and _anything_from(file, at):
                    damage.append(f"{size - at} bytes that are not empty have no header: members are lost")
                break
            if found or not zeros or following is not None:
                until = size if following is None else following
                what = "zeros" if zeros else "no valid header"
                damage.append(f"{what} from byte {at} to {until} of {size}: members that were there are lost")
            if following is None:
                return
            at, long_name, long_size = following, None, None
            continue
        found += 1
        start = at + _BLOCK
        stored = header.size if header.type in _REGULAR or header.type in b"LKxgXS" else 0
        if header.type in _REGULAR and long_size is not None:
            stored = long_size
        at = start + -(-stored // _BLOCK) * _BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            data = b""
            if stored <= _LONGEST_NAME:
                file.seek(start)
                data = file.read(stored)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax_records(data)
                long_name = records.get("path", long_name)
                stated = records.get("size", "")
                long_size = min(int(stated), 1 << 62) if re.fullmatch(r"\d{1,30}", stated, re.A) else long_size
            continue
        if header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            continue
        name = header.name if long_name is None else long_name
        long_name, long_size = None, None
        if header.type in _REGULAR:
            offsets[name] = (start, start + stored)
            yield Entry(name, start, start + stored)
        elif header.type == tarfile.LNKTYPE and header.linkname in offsets:
            yield Entry(name, *offsets[header.linkname])
        elif header.type != tarfile.DIRTYPE and is_audio(name):
            damage.append(f"{name} is a link or a sparse file, which cannot be read from a shard")
    if not found:
        damage.append(f"no members in {size} bytes: an empty tar archive, or none")
    elif not ended:
        damage.append(
            f"the end-of-archive mark is missing after {size} bytes: the shard was cut, and members may be lost"
        )


def _pax_records(data: bytes) -> dict[str, str]:
    """The records "length key=value" of a pax header; none after the first that is malformed."""
    records: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return records


def _anything_from(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    return any(file.read(_LONGEST_END))


def _next_header(file: BinaryIO, at: int, size: int) -> int | None:
    """The first block from ``at`` on that is a valid header of a ustar, pax or GNU archive."""
    step = 1 << 20
    for start in range(at, size, step):
        file.seek(start)
        chunk = file.read(step)
        place = chunk.find(b"ustar", 257)
        while place >= 0:
            if place % _BLOCK == 257:
                block = chunk[place - 257 : place - 257 + _BLOCK]
                try:
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    return start + place - 257
                except tarfile.HeaderError:
                    pass
            place = chunk.find(b"ustar", place + 1)
    return None
