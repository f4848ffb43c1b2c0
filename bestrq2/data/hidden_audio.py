"""Audio behind the end that a header states: decoders stop there, so a file of three parts would be used by a third.

A joined MP3 counts the frames of its first part, a joined FLAC its samples, libsndfile reads the first stream of a
chained Ogg, and a WAV, AIFF, AU, CAF or FLAC whose writer was stopped may state any length.
"""

import os
import struct
from itertools import pairwise
from typing import BinaryIO

from bestrq2.data.containers import au_audio, behind_id3, chunks

__all__ = ["audio_behind_end"]

_SLACK = 0.01  # of what is stated; encoders and tags need some bytes
_LEAST_BYTES = 4096
_OGG_PAGES = 200_000
_OGG_JUNK = 1 << 20  # bytes between two pages, such as the tags of a part
_FLAC_TAIL = 1 << 17
_FLAC_PLACES = (0.3, 0.43, 0.5)  # of a file of up to eleven equal parts, these do not count up from frame to frame


def audio_behind_end(file: BinaryIO, mp3_end: int | None = None) -> str | None:
    """Content of an open file behind its stated end, as a clause for an error; None if there is none.

    Args:
        file: in binary, at any position.
        mp3_end: where the frames that the tag of an MP3 counts end, in bytes, if it has one that counts them.

    Raises:
        OSError: the file cannot be read.
    """
    size = file.seek(0, os.SEEK_END)
    start = behind_id3(file)
    file.seek(start)
    head = file.read(12)
    if head[:4] == b"OggS":
        return _chained_ogg(file, size, start)
    if head[:4] == b"fLaC":
        return _long_flac(file, size, start)
    if head[:4] in (b".snd", b"dns."):
        return _long_au(file, size, start)
    if (found := chunks(file, start)) is not None:
        return _long_chunk(file, size, *found)
    if mp3_end is not None:
        return _joined_mp3(file, size, mp3_end)
    return None


def _chained_ogg(file: BinaryIO, size: int, position: int) -> str | None:
    """A stream that begins behind pages of content; several that begin together are multiplexed, and one is audio."""
    content = False
    for _ in range(_OGG_PAGES):
        file.seek(position)
        header = file.read(27)
        if len(header) < 27:
            return None
        if header[:4] != b"OggS":  # decoders look for the next page
            junk = (header + file.read(_OGG_JUNK)).find(b"OggS\0")
            if junk < 0:
                return None
            position += junk
            continue
        kind, segments = header[5], header[26]
        if kind & 2 and content:
            return f"another stream begins at byte {position} of {size}: a chain of Ogg files"
        content |= not kind & 2
        position += 27 + segments + sum(file.read(segments))
    return None


def _much_more(size: int, end: int, length: int) -> bool:
    return size - end > max(_LEAST_BYTES, _SLACK * length)


def _long_au(file: BinaryIO, size: int, start: int) -> str | None:
    begin, length = au_audio(file, start)
    if length is None or not _much_more(size, begin + length, length) or _behind_zeros(file, begin + length) is None:
        return None
    return f"its header states {length} bytes of audio, {size - begin - length} more follow"


def _long_chunk(file: BinaryIO, size: int, position: int, name: bytes, number: str, padding: int) -> str | None:
    long_size = 0  # RF64 keeps the real size of its audio, past 4 GiB, in a chunk of its own
    bytes_of_header = 4 + struct.calcsize(number)
    for _ in range(1000):
        file.seek(position)
        header = file.read(bytes_of_header)
        if len(header) < bytes_of_header:
            return None
        (length,) = struct.unpack(number, header[4:])
        if header[:4] == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if header[:4] == name:
            if length == 0xFFFFFFFF and long_size:
                length = long_size
            elif length < 0 or (bytes_of_header == 8 and length >= 0x7FF00000):
                return None  # a placeholder: libsndfile reads to the end
            end = position + bytes_of_header + length
            if not _much_more(size, end, length) or any(
                _are_chunks(file, size, place, number) for place in {end, end + length % padding}
            ):
                return None
            return f"its header states {length} bytes of audio, {size - end} more follow"
        position += bytes_of_header + length + length % padding
        if length < 0 or position > size:  # which may be more than a seek takes
            return None
    return None


def _behind_zeros(file: BinaryIO, position: int) -> int | None:
    """Position of the first byte from here on that is not zero, or None if there is only padding."""
    file.seek(position)
    while block := file.read(1 << 16):
        if any(block):
            return position + len(block) - len(block.lstrip(b"\0"))
        position += len(block)
    return None


def _are_chunks(file: BinaryIO, size: int, position: int, number: str) -> bool:
    """Return True if the audio is followed by further chunks (pictures, cue points) or padding only."""
    bytes_of_header = 4 + struct.calcsize(number)
    for _ in range(1000):
        behind = _behind_zeros(file, position)
        if behind is None:
            return True
        file.seek(behind)
        header = file.read(bytes_of_header)
        if len(header) < bytes_of_header:
            return True
        (length,) = struct.unpack(number, header[4:])
        if length < 0 or not all(32 <= byte < 127 for byte in header[:4]):
            return False
        position = behind + bytes_of_header + length
        if position > size + 1:
            return False
    return True


def _joined_mp3(file: BinaryIO, size: int, end: int) -> str | None:
    """MPEG frames behind those that the tag counts; tags of ID3 and APE there are none."""
    if not _much_more(size, end, end):
        return None
    position = end
    for _ in range(10):
        file.seek(position)
        after = file.read(1 << 12)
        if after[:3] == b"ID3":
            position = behind_id3(file, position)
        elif after[:8] == b"APETAGEX" and len(after) >= 32:
            position += 32 + int.from_bytes(after[12:16], "little")
        elif after[:3] == b"TAG":
            position += 128
        else:
            break
    if any(after[i] == 0xFF and after[i + 1] & 0xE6 == 0xE2 for i in range(len(after) - 1)):
        return f"its tag counts {end} bytes, MPEG frames follow up to byte {size}: several MP3 files joined"
    return None


def _long_flac(file: BinaryIO, size: int, start: int) -> str | None:
    """Compare the stated number of samples with the numbers in the headers of frames."""
    file.seek(start + 8)
    info = file.read(34)
    if len(info) < 34:
        return None
    smallest, largest = struct.unpack(">HH", info[:4])
    longest_frame = int.from_bytes(info[7:10], "big")  # 0: not stated
    total = int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    if total == 0:
        return None  # not stated
    begin = _behind_metadata(file, start + 4)
    fixed = largest if smallest == largest else 0
    file.seek(begin)
    first = file.read(16)
    if _flac_frame(first, fixed, first) is None:
        return None  # damaged, or in another form

    def frame(position: int, last: bool) -> tuple[int, int] | None:
        """Position of the first or last frame that begins in a piece of the file, and the sample number behind it."""
        file.seek(position)
        piece = file.read(_FLAC_TAIL)
        place = len(piece) if last else -1
        while (place := piece.rfind(b"\xff", 0, place) if last else piece.find(b"\xff", place + 1)) >= 0:
            found = _flac_frame(piece[place : place + 16], fixed, first)
            if found is not None:
                return position + place, found
        return None

    final = frame(max(begin, size - _FLAC_TAIL), True)
    if final is not None and final[1] > total * (1 + _SLACK) + 2 * (fixed or 4608):
        return f"its header states {total} samples, the last frame ends at sample {final[1]}"
    frames = -(-total // max(1, smallest))
    if final is not None and longest_frame and final[0] > begin + frames * longest_frame:
        return (
            f"its {frames} frames of at most {longest_frame} bytes do not fill {size} bytes: several FLAC files joined"
        )
    if _other_flac_frames(file, max(begin, size - _FLAC_TAIL) if final is None else final[0] + 1, first):
        return "frames of another sampling rate or depth follow: several FLAC files joined"
    between = (frame(begin + int(share * (size - begin)), False) for share in _FLAC_PLACES)
    found = sorted({place for place in (frame(begin, False), *between, final) if place is not None})
    if any(number <= before for (_, before), (_, number) in pairwise(found)):
        return f"its frames count anew before the end of its {size} bytes: several FLAC files joined"
    return None


def _other_flac_frames(file: BinaryIO, position: int, first: bytes) -> bool:
    """Return True if, from a position in the last piece of a file on, there are frames of a stream that is another than
    that of the ``first`` one. One may be chance; two that agree and count up are none."""
    file.seek(position)
    piece = file.read(_FLAC_TAIL)
    last: dict[tuple[int, ...], int] = {_flac_kind(first): 1 << 60}
    place = -1
    while (place := piece.find(b"\xff", place + 1)) >= 0:
        header = piece[place : place + 16]
        end = _flac_frame(header, 0, header)
        if end is None:
            continue
        if last.get(_flac_kind(header), 1 << 60) < end:
            return True
        last.setdefault(_flac_kind(header), end)
    return False


def _flac_kind(header: bytes) -> tuple[int, int, int]:
    """Fields that do not change within a stream: kind of number, sampling rate, bits of a sample."""
    return header[1], header[2] & 15, header[3] & 15


def _behind_metadata(file: BinaryIO, position: int) -> int:
    """Position of the first frame of a FLAC, behind its blocks of metadata, each of which states its length."""
    for _ in range(1000):
        file.seek(position)
        header = file.read(4)
        position += 4 + int.from_bytes(header[1:], "big")
        if len(header) < 4 or header[0] & 0x80:
            break
    return position


def _flac_frame(header: bytes, fixed: int, first: bytes) -> int | None:
    """Number of the sample behind a frame, if this is the header of one: its CRC-8 is right, and what does not change
    within a stream (kind of number, sampling rate, bits of a sample) is as in the ``first`` one."""
    if len(header) < 6 or header[0] != 0xFF or header[1] & 0xFE != 0xF8:
        return None
    sizes, rate = header[2] >> 4, header[2] & 15
    if sizes == 0 or rate == 15:
        return None
    if _flac_kind(header) != _flac_kind(first):
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
