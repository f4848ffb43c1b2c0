"""MP3 files whose frames no tag counts: libsndfile then takes the first frame for all, and stops early in a file of
variable bitrate, or where files of other kinds were joined to it."""

import os
from collections import Counter
from typing import BinaryIO, NamedTuple

from bestrq2.data.containers import behind_id3, mp3_counts_frames, mp3_end

__all__ = ["mp3_fault"]

_PIECES, _PIECE = 32, 4096
_BLOCK = 1 << 20
_SLACK = 0.01
_LOST = 1 << 16  # bytes without a frame, behind which there is none
# kbit/s by MPEG version (1, or 2 and 2.5) and layer; the first is a bitrate of its own, the last is no frame.
_BITRATES = {
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


class _Frame(NamedTuple):
    kind: tuple[int, int, bool]  # sampling rate, samples, one channel
    bitrate: int
    length: int  # bytes


def mp3_fault(file: BinaryIO, promised: int) -> str | None:
    """Reason why decoding an open MP3 would end early, as a clause for an error; None for one that is decoded whole.

    Looked at are those whose tag does not state frames and bytes, and of them those that do not have the same bitrate
    everywhere, from which their length follows.

    Args:
        promised: samples of each channel that libsndfile expects.

    Raises:
        OSError: the file cannot be read.
    """
    if mp3_end(file) is not None:
        return None
    size = file.seek(0, os.SEEK_END)
    start = behind_id3(file)
    file.seek(start)
    piece = file.read(_LOST)
    if (begin := _next(piece, 0)) is None or (first := _frame(piece, begin)) is None:
        return None
    start += begin
    if not mp3_counts_frames(file) and size - start > _PIECES * _PIECE:
        for number in range(1, _PIECES):
            file.seek(start + number * (size - start - _PIECE) // _PIECES)
            piece = file.read(_PIECE)
            found = _frame(piece, place) if (place := _next(piece, 0)) is not None else None
            if found is not None and found[:2] != first[:2]:
                break
        else:
            return None
    samples = _count(file, start)
    own, total = samples[first.kind], sum(samples.values())
    if own < (1 - _SLACK) * total:
        return "frames of another sampling rate or number of channels follow: several MP3 files joined"
    if promised < (1 - _SLACK) * own:
        return (
            f"no tag counts the frames of its variable bitrate, and {promised} of {own} samples are expected ("
            "ffmpeg -i IN -c copy OUT adds a tag)"
        )
    return None


def _count(file: BinaryIO, position: int) -> Counter[tuple[int, int, bool]]:
    """Samples of each channel, by kind of frame."""
    samples: Counter[tuple[int, int, bool]] = Counter()
    block, base, lost = b"", position, 0
    while lost < _LOST:
        if position + 4 > base + len(block):
            file.seek(position)
            block, base = file.read(_BLOCK), position
            if len(block) < 4:
                break
        frame = _frame(block, position - base)
        if frame is not None:
            samples[frame.kind] += frame.kind[1]
            position, lost = position + frame.length, 0
        elif block.startswith(b"ID3", position - base):
            position = behind_id3(file, position)
        else:
            place = block.find(b"\xff", position - base + 1)
            behind = base + (len(block) if place < 0 else place)
            lost, position = lost + behind - position, behind
    return samples


def _next(piece: bytes, place: int) -> int | None:
    """The first frame in a piece that is followed by another one of its kind."""
    while (place := piece.find(b"\xff", place)) >= 0:
        frame = _frame(piece, place)
        after = None if frame is None else _frame(piece, place + frame.length)
        if frame is not None and after is not None and frame.kind == after.kind:
            return place
        place += 1
    return None


def _frame(data: bytes, place: int) -> _Frame | None:
    """The frame whose header is there; None if there is none, or one of a free bitrate."""
    header = data[place : place + 4]
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # 0: 2.5, 2: 2, 3: 1
    bitrate, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    old = 1 if version == 3 else 2
    hertz = (44100, 48000, 32000)[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits = 1000 * _BITRATES[old, layer][bitrate]
    samples = 384 if layer == 1 else 576 if layer == 3 and old == 2 else 1152
    padding = header[2] >> 1 & 1
    length = 4 * (12 * bits // hertz + padding) if layer == 1 else samples // 8 * bits // hertz + padding
    return _Frame((hertz, samples, header[3] >> 6 == 3), bits, length)
