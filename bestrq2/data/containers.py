"""Length stated by a file's container, where libsndfile hides it: a cut WAV, AIFF or MP3 opens without an error.

libsndfile shortens a cut WAV or AIFF to the bytes that exist and keeps the count of an MP3's Xing header although the
frames are gone, so the promise is read here from the container itself. FLAC's promise is in its header and libsndfile
reports it. Ogg carries none: a cut Ogg is a valid, shorter Ogg.
"""

import os
import struct
from typing import BinaryIO

__all__ = ["missing_fraction", "mp3_counts_frames", "mp3_end"]

_STREAMED = 0x7FF00000  # sizes from here on are placeholders of programs that wrote to a pipe


def missing_fraction(file: BinaryIO) -> float:
    """Fraction of the promised audio bytes that an open file lacks: 0.0 if complete, or if nothing is promised.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return _missing_in_chunk(file, size, b"data", "<I")
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _missing_in_chunk(file, size, b"SSND", ">I")
    tag = _xing(file)
    if tag is not None and tag[1]:
        start, promised = tag
        return max(0.0, 1.0 - (size - start) / promised)
    return 0.0


def mp3_counts_frames(file: BinaryIO) -> bool:
    """Return True if an MP3 states its number of frames; otherwise its length is estimated from the first frame.

    Raises:
        OSError: the file cannot be read.
    """
    return _xing(file) is not None


def mp3_end(file: BinaryIO) -> int | None:
    """End of the frames that the tag of an MP3 counts, in bytes; None if the tag does not state it."""
    tag = _xing(file)
    return None if tag is None or not tag[1] else tag[0] + tag[1]


def _missing_in_chunk(file: BinaryIO, size: int, name: bytes, number: str) -> float:
    """Walk the chunks of a RIFF or IFF file to the audio and compare its stated size with the bytes that follow."""
    position = 12
    long_size = 0  # RF64 keeps the real size of its audio, past 4 GiB, in a chunk of its own
    for _ in range(1000):  # a damaged file must not keep us walking
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            return 0.0
        (length,) = struct.unpack(number, header[4:])
        position += 8
        if header[:4] == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if header[:4] == name:
            if length == 0xFFFFFFFF and long_size:
                return max(0.0, 1.0 - (size - position) / long_size)
            if length == 0 or length >= _STREAMED:
                return 0.0
            return max(0.0, 1.0 - (size - position) / length)
        position += length + length % 2
    return 0.0


def _xing(file: BinaryIO) -> tuple[int, int] | None:
    """Find the Xing, Info or VBRI tag of an MP3: (offset of its frame, promised bytes from there, 0 if not stated)."""
    file.seek(0)
    start = 0
    head = file.read(10)
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))
    file.seek(start)
    frame = file.read(256)
    if len(frame) < 64 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return None
    if frame[36:40] == b"VBRI":
        return start, struct.unpack(">I", frame[46:50])[0]
    for offset in (
        13,
        21,
        36,
    ):  # after the side information of MPEG-2 mono; MPEG-2 stereo or MPEG-1 mono; MPEG-1 stereo
        if frame[offset : offset + 4] in (b"Xing", b"Info"):
            flags, *fields = struct.unpack(">III", frame[offset + 4 : offset + 16])
            if not flags & 1:
                return None  # no frame count
            return start, fields[1] if flags & 2 else 0
    return None
