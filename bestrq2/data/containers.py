"""Length stated by a file's container, where libsndfile hides it: a cut WAV, AIFF or MP3 opens without an error.

libsndfile shortens a cut WAV, AIFF, AU, W64, SPHERE, VOC or SVX to the bytes that exist and keeps the count of an MP3's
Xing header although the frames are gone, so the promise is read here from the container itself. FLAC's promise is in
its header and libsndfile reports it. Ogg states no length: a cut Ogg is a valid, shorter Ogg, which lacks the mark of
its last page. PAF, IRCAM, PVF and SD2 state none either: a cut one cannot be told from a whole one.
"""

import math
import os
import re
import struct
from typing import BinaryIO

__all__ = [
    "au_audio",
    "begins_as_mp3",
    "behind_id3",
    "caf_frames",
    "chunks",
    "missing_fraction",
    "mp3_counts_frames",
    "mp3_end",
    "ogg_without_end",
]

_STREAMED = 0x7FF00000  # sizes from here on are placeholders of programs that wrote to a pipe
_RIFF64 = bytes.fromhex("726966662e91cf11a5d628db04c10000")  # name of the first chunk of a Sony Wave64 file
_VOC = b"Creative Voice "
_LARGEST_PAGE = 27 + 255 + 255 * 255  # bytes, of Ogg


def missing_fraction(file: BinaryIO) -> float:
    """Fraction of the promised audio bytes that an open file lacks: 0.0 if complete, or if nothing is promised.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    start = behind_id3(file)
    file.seek(start)
    head = file.read(16)
    for magic, read in ((b".snd", au_audio), (b"dns.", au_audio), (b"NIST_1A", _sphere), (_RIFF64, _w64), (_VOC, _voc)):
        if head.startswith(magic):
            begin, length = read(file, start)
            return max(0.0, 1.0 - (size - begin) / length) if length else 0.0
    found = chunks(file, start)
    if found is not None:
        return _missing_in_chunk(file, size, *found)
    tag = _xing(file)
    if tag is not None and tag[1]:
        start, promised = tag
        return max(0.0, 1.0 - (size - start) / promised)
    return 0.0


def behind_id3(file: BinaryIO, position: int = 0) -> int:
    """Position behind the ID3 tags that begin there, which libsndfile skips before formats of every kind."""
    while True:
        file.seek(position)
        head = file.read(10)
        if head[:3] != b"ID3" or len(head) < 10:
            return position
        position += 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0)))


def chunks(file: BinaryIO, start: int) -> tuple[int, bytes, str, int] | None:
    """For a file made of chunks: where the first one is, name of the one with audio, format of the number that states a
    chunk's length, and the multiple to which chunks are padded. None for another file."""
    file.seek(start)
    head = file.read(12)
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return start + 12, b"data", "<I", 2
    if head[:4] == b"RIFX" and head[8:] == b"WAVE":
        return start + 12, b"data", ">I", 2
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        return start + 12, b"SSND", ">I", 2
    if head[:4] == b"FORM" and head[8:] in (b"8SVX", b"16SV"):
        return start + 12, b"BODY", ">I", 2
    if head[:4] == b"caff":
        return start + 8, b"data", ">q", 1
    return None


def au_audio(file: BinaryIO, start: int) -> tuple[int, int | None]:
    """First byte and stated number of bytes of the audio in an AU file; None if it was not known."""
    file.seek(start)
    head = file.read(12).ljust(12, b"\xff")
    offset, length = struct.unpack("<II" if head[:4] == b"dns." else ">II", head[4:])
    return start + offset, None if length == 0xFFFFFFFF else length


def _sphere(file: BinaryIO, start: int) -> tuple[int, int | None]:
    """As :func:`au_audio`, of a NIST SPHERE file, whose header is text: the corpora of the LDC, often named .wav."""
    file.seek(start)
    text = file.read(1 << 16)
    if re.search(rb"\nsample_coding\s+-\w+\s+[^\n]*,embedded", text):
        return start, None  # compressed: decoders refuse it
    lines = text.split(b"\n", 2)
    begin = int(lines[1]) if len(lines) == 3 and lines[1].strip().isdigit() else len(text)
    names = (b"sample_count", b"channel_count", b"sample_n_bytes")
    numbers = [re.search(rb"\n" + name + rb"\s+-\w+\s+(\d{1,18})\s", text[:begin]) for name in names]
    counted = [int(found[1]) for found in numbers if found]
    return start + begin, math.prod(counted) if len(counted) == 3 else None


def _w64(file: BinaryIO, start: int) -> tuple[int, int | None]:
    """As :func:`au_audio`, of a Sony Wave64 file: its chunks have long names, and lengths that count their headers."""
    position = start + 40
    for _ in range(1000):
        file.seek(position)
        header = file.read(24)
        length = int.from_bytes(header[16:], "little") - 24
        if len(header) < 24 or length < 0:
            break
        position += 24
        if header[:4] == b"data":
            return position, length if length < 1 << 62 else None
        position += -(-length // 8) * 8
    return start, None


def _voc(file: BinaryIO, start: int) -> tuple[int, int | None]:
    """As :func:`au_audio`, of a Creative Voice file: its first block of sound, behind blocks of text and others."""
    file.seek(start + 20)
    position = start + int.from_bytes(file.read(2), "little")
    for _ in range(1000):
        file.seek(position)
        header = file.read(4)
        if len(header) < 4 or header[0] == 0:
            break
        position += 4
        length = int.from_bytes(header[1:], "little")
        if header[0] in (1, 9):
            return position, length
        position += length
    return start, None


def ogg_without_end(file: BinaryIO) -> str | None:
    """Early end of an open Ogg, as a clause for an error; None for one that is whole, and for other formats.

    The last page of a stream carries a mark (RFC 3533). It is looked for in the last two pages' length of the file, so
    that tags and padding behind it do not matter.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(behind_id3(file))
    if file.read(4) != b"OggS":
        return None
    start = max(0, size - 2 * _LARGEST_PAGE)
    file.seek(start)
    tail = file.read()
    place = tail.rfind(b"OggS\0")
    if place < 0:
        return None
    header = tail[place : place + 27]
    lacing = tail[place + 27 : place + 27 + header[26]] if len(header) == 27 else b""
    if len(header) < 27 or len(lacing) < header[26] or place + 27 + len(lacing) + sum(lacing) > len(tail):
        return f"the last page, at byte {start + place} of {size}, is not whole"
    if not header[5] & 4:
        return "its last page is not marked as the end"
    return None


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


def _missing_in_chunk(file: BinaryIO, size: int, position: int, name: bytes, number: str, padding: int) -> float:
    """Walk the chunks of a file to the audio and compare its stated size with the bytes that follow."""
    bytes_of_header = 4 + struct.calcsize(number)
    long_size = 0  # RF64 keeps the real size of its audio, past 4 GiB, in a chunk of its own
    for _ in range(1000):  # a damaged file must not keep us walking
        if position > size:  # which may be more than a seek takes
            return 0.0
        file.seek(position)
        header = file.read(bytes_of_header)
        if len(header) < bytes_of_header:
            return 0.0
        (length,) = struct.unpack(number, header[4:])
        position += bytes_of_header
        if header[:4] == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if header[:4] == name:
            if length == 0xFFFFFFFF and long_size:
                return max(0.0, 1.0 - (size - position) / long_size)
            if length <= 0 or (bytes_of_header == 8 and length >= _STREAMED):
                return 0.0
            return max(0.0, 1.0 - (size - position) / length)
        if length < 0:
            return 0.0
        position += length + length % padding
    return 0.0


def caf_frames(file: BinaryIO) -> int | None:
    """Samples of each channel that the packet table of a compressed CAF states; None without one. libsndfile counts
    the whole packets that are there.

    Raises:
        OSError: the file cannot be read.
    """
    found = chunks(file, behind_id3(file))
    if found is None or found[2] != ">q":
        return None
    position, size = found[0], file.seek(0, os.SEEK_END)
    for _ in range(1000):
        if position > size:  # which may be more than a seek takes
            break
        file.seek(position)
        header = file.read(28)
        length = int.from_bytes(header[4:12], "big", signed=True)
        if len(header) < 28 or length < 0:
            break
        if header[:4] == b"pakt":
            return int.from_bytes(header[20:], "big", signed=True)
        position += 12 + length
    return None


def begins_as_mp3(file: BinaryIO) -> bool:
    """Return True if the first frame of an MP3 is where it should be, behind ID3 tags.

    Raises:
        OSError: the file cannot be read.
    """
    file.seek(behind_id3(file))
    head = file.read(2)
    return len(head) == 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 != 0  # not AAC


def _xing(file: BinaryIO) -> tuple[int, int] | None:
    """Find the Xing, Info or VBRI tag of an MP3: (offset of its frame, promised bytes from there, 0 if not stated)."""
    start = behind_id3(file)
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
            if not flags & 1 or not fields[0]:
                return None  # no frame count
            return start, fields[1] if flags & 2 else 0
    return None
