"""Audio behind the end that a header states: decoders stop there, so a file of three parts would be used by a third.

A joined MP3 counts the frames of its first part, libsndfile reads the first stream of a chained Ogg, and a WAV or FLAC
whose writer was stopped may state any length.
"""

import os
import struct
from typing import BinaryIO

__all__ = ["audio_behind_end"]

_SLACK = 0.01  # of what is stated; encoders and tags need some bytes
_LEAST_BYTES = 4096
_OGG_PAGES = 200_000
_FLAC_TAIL = 1 << 17


def audio_behind_end(file: BinaryIO, mp3_end: int | None = None) -> str | None:
    """Content of an open file behind its stated end, as a clause for an error; None if there is none.

    Args:
        file: in binary, at any position.
        mp3_end: where the frames that the tag of an MP3 counts end, in bytes, if it has one that counts them.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"OggS":
        return _chained_ogg(file, size)
    if head[:4] == b"fLaC":
        return _long_flac(file, size)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return _long_chunk(file, size, b"data", "<I")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _long_chunk(file, size, b"SSND", ">I")
    if mp3_end is not None:
        return _joined_mp3(file, size, mp3_end)
    return None


def _chained_ogg(file: BinaryIO, size: int) -> str | None:
    """A stream that begins after another has ended; several that begin together are multiplexed, and one is audio."""
    position, ended = 0, False
    for _ in range(_OGG_PAGES):
        file.seek(position)
        header = file.read(27)
        if len(header) < 27 or header[:4] != b"OggS":
            return None
        kind, segments = header[5], header[26]
        if kind & 2 and ended:
            return f"another stream begins at byte {position} of {size}: a chain of Ogg files"
        ended |= bool(kind & 4)
        position += 27 + segments + sum(file.read(segments))
    return None


def _long_chunk(file: BinaryIO, size: int, name: bytes, number: str) -> str | None:
    position = 12
    for _ in range(1000):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return None
        (length,) = struct.unpack(number, header[4:])
        if header[:4] == name:
            if length >= 0x7FF00000:
                return None  # a placeholder: libsndfile reads to the end
            end = position + 8 + length
            if size - end <= max(_LEAST_BYTES, _SLACK * length) or _are_chunks(file, size, end + length % 2, number):
                return None
            return f"its header states {length} bytes of audio, {size - end} more follow"
        position += 8 + length + length % 2
    return None


def _are_chunks(file: BinaryIO, size: int, position: int, number: str) -> bool:
    """Return True if the audio is followed by further chunks (pictures, cue points) or padding only."""
    file.seek(position)
    if not any(file.read(1 << 16)):
        return True
    for _ in range(1000):
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return True
        if not all(32 <= byte < 127 for byte in header[:4]):
            return False
        position += 8 + struct.unpack(number, header[4:])[0]
        position += position % 2
        if position > size + 1:
            return False
    return True


def _joined_mp3(file: BinaryIO, size: int, end: int) -> str | None:
    """MPEG frames behind those that the tag counts; tags of ID3 and APE there are none."""
    if size - end <= max(_LEAST_BYTES, _SLACK * end):
        return None
    file.seek(end)
    after = file.read(1 << 16)
    if after[:8] == b"APETAGEX":
        return None
    if after[:3] == b"ID3":
        skip = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(after[6:10], (21, 14, 7, 0)))
        file.seek(end + skip)
        after = file.read(4096)
    if any(after[i] == 0xFF and after[i + 1] & 0xE6 == 0xE2 for i in range(min(len(after), 4096) - 1)):
        return f"its tag counts {end} bytes, MPEG frames follow up to byte {size}: several MP3 files joined"
    return None


def _long_flac(file: BinaryIO, size: int) -> str | None:
    """Compare the stated number of samples with the number in the header of the last frame."""
    file.seek(8)
    info = file.read(34)
    if len(info) < 34:
        return None
    smallest, largest = struct.unpack(">HH", info[:4])
    total = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    if total == 0:
        return None  # not stated
    start = max(0, size - _FLAC_TAIL)
    file.seek(start)
    tail = file.read(_FLAC_TAIL)
    position = len(tail)
    while (position := tail.rfind(b"\xff", 0, position)) >= 0:
        found = _flac_frame(tail[position : position + 16], largest if smallest == largest else 0)
        if found is not None:
            if found > total * (1 + _SLACK) + 65535:
                return f"its header states {total} samples, the last frame ends at sample {found}"
            return None
    return None


def _flac_frame(header: bytes, fixed: int) -> int | None:
    """Number of the sample behind a frame, if this is the header of one (its CRC-8 is right)."""
    if len(header) < 6 or header[0] != 0xFF or header[1] & 0xFE != 0xF8:
        return None
    sizes, rate = header[2] >> 4, header[2] & 15
    if sizes == 0 or rate == 15:
        return None
    lead = header[4]
    extra = 0 if lead < 0x80 else 1 if lead & 0xE0 == 0xC0 else 2 if lead & 0xF0 == 0xE0 else 3
    if lead & 0xF8 == 0xF8:
        extra = 4 if lead & 0xFC == 0xF8 else 5 if lead & 0xFE == 0xFC else 6
    number = lead if extra == 0 else lead & (0x3F >> extra)
    for byte in header[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    place = 5 + extra
    block = 0  # of codes 6 and 7, which state it behind the number
    if sizes == 1:
        block = 192
    elif sizes < 6:
        block = 576 << (sizes - 2)
    elif sizes > 7:
        block = 256 << (sizes - 8)
    if sizes in (6, 7):
        width = 1 if sizes == 6 else 2
        block = int.from_bytes(header[place : place + width], "big") + 1
        place += width
    place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if place >= len(header) or _crc8(header[:place]) != header[place]:
        return None
    if header[1] & 1:
        return number + block  # variable block size: the number of the first sample
    return number * (fixed or block) + block


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07) & 0xFF if value & 0x80 else value << 1
    return value
