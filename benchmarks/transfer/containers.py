"""Sound files inside four kinds of game and instrument containers: zip, Qt resource, OpenTTD sound set, SoundFont 2.

Every function takes the bytes of a container and yields ``(name, file)``, ``file`` being bytes that libsndfile reads;
:func:`soundfont` yields samples instead, with what the font says about them.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SOUND = re.compile(r"\.(wav|ogg|oga|opus|flac|aiff?|mp3)$", re.IGNORECASE)

# The 16 groups of 8 programs of General MIDI.
FAMILIES = (
    *("piano", "chromatic_percussion", "organ", "guitar", "bass", "strings", "ensemble", "brass"),
    *("reed", "pipe", "synth_lead", "synth_pad", "synth_fx", "ethnic", "percussive", "sound_fx"),
)


def zipped(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A zip archive (.pk3)."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name in sorted(archive.namelist()):
            if SOUND.search(name):
                yield name, archive.read(name)


def qt_resource(content: bytes) -> Iterator[tuple[str, bytes]]:
    """A compiled Qt resource (.rcc): a tree of nodes, names in UTF-16, files plain or behind a zlib stream."""
    if content[:4] != b"qres":
        return
    version, tree, data, names = struct.unpack(">iiii", content[4:20])
    size = 22 if version >= 2 else 14

    def walk(node: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        place = tree + node * size
        name_place, flags = struct.unpack(">IH", content[place : place + 6])
        path = prefix
        if node:
            start = names + name_place
            (length,) = struct.unpack(">H", content[start : start + 2])
            path = f"{prefix}/{content[start + 6 : start + 6 + 2 * length].decode('utf-16-be')}"
        if flags & 2:
            count, first = struct.unpack(">II", content[place + 6 : place + 14])
            for child in range(first, first + count):
                yield from walk(child, path)
        elif SOUND.search(path) and not flags & 4:  # 4: zstd, which no package here uses
            (offset,) = struct.unpack(">I", content[place + 10 : place + 14])
            (length,) = struct.unpack(">I", content[data + offset : data + offset + 4])
            file = content[data + offset + 4 : data + offset + 4 + length]
            yield path.lstrip("/"), zlib.decompress(file[4:]) if flags & 1 else file

    yield from walk(0, "")


def openttd_sounds(content: bytes) -> Iterator[tuple[str, bytes]]:
    """An OpenTTD sound set (.cat): a table of offsets, then length-prefixed names and RIFF files."""
    count = (struct.unpack("<I", content[:4])[0] & 0x7FFFFFFF) // 8
    for number in range(count):
        start = struct.unpack("<I", content[8 * number : 8 * number + 4])[0] & 0x7FFFFFFF
        length = content[start]
        name = content[start + 1 : start + length].rstrip(b"\0").decode("latin1")
        wave = start + 1 + length
        size = struct.unpack("<I", content[wave + 4 : wave + 8])[0] + 8
        quoted = re.match(r'"([^"]*)"', name)
        plain = re.sub(r"[^a-z0-9]+", "-", (quoted.group(1) if quoted else name).lower()).strip("-")
        if "unused" not in plain:
            yield f"{number:02d}_{plain}.wav", content[wave : wave + size]


@dataclass(frozen=True)
class Note:
    """One sample of a SoundFont: ``samples`` int16 ``(S,)`` at ``rate`` Hz, played by General MIDI ``program`` at MIDI
    pitch ``root``."""

    name: str
    samples: np.ndarray
    rate: int
    program: int
    root: int

    @property
    def family(self) -> str:
        return FAMILIES[self.program // 8]


def soundfont(content: bytes) -> Iterator[Note]:
    """Single notes of the acoustic and electromechanical programs of a SoundFont 2, the left or mono channel alone.

    Synthesisers, sound effects and string ensembles are left out: their family is a matter of taste. Samples shorter
    than 150 ms and plain waveforms are as well.
    """
    chunks = _soundfont_chunks(content)
    text = lambda raw: raw.split(b"\0")[0].decode("latin1").strip()  # noqa: E731

    def records(name: bytes, layout: str) -> list[tuple]:
        start, length = chunks[name]
        size = struct.calcsize(layout)
        return [struct.unpack(layout, content[start + i : start + i + size]) for i in range(0, length, size)]

    presets, preset_bags, preset_gens = records(b"phdr", "<20sHHHIII"), records(b"pbag", "<HH"), records(b"pgen", "<HH")
    instruments, bags, generators = records(b"inst", "<20sH"), records(b"ibag", "<HH"), records(b"igen", "<HH")
    headers = records(b"shdr", "<20sIIIIIBbHH")
    roots: list[dict[int, int]] = []  # of every instrument: sample -> MIDI pitch (generator 58, else the sample's own)
    for number in range(len(instruments) - 1):
        found: dict[int, int] = {}
        for bag in range(instruments[number][1], instruments[number + 1][1]):
            zone = dict(generators[bags[bag][0] : bags[bag + 1][0]])
            if 53 in zone:
                found[zone[53]] = zone.get(58, headers[zone[53]][6])
        roots.append(found)
    left_out = {*range(80, 104), 38, 39, 50, 51, 54, 55, 62, 63}
    chosen: dict[int, tuple[int, int]] = {}
    for preset in sorted(range(len(presets) - 1), key=lambda i: (presets[i][2], presets[i][1])):
        _, program, bank, first = presets[preset][:4]
        if bank != 0 or program > 111 or program in left_out:
            continue
        for bag in range(first, presets[preset + 1][3]):
            zone = dict(preset_gens[preset_bags[bag][0] : preset_bags[bag + 1][0]])
            instrument = zone.get(41)
            for sample, root in roots[instrument].items() if instrument is not None else ():
                name, kind = text(headers[sample][0]), headers[sample][9]
                right = kind == 2 or re.search(r"\(R\)$", name)
                if sample not in chosen and not right:
                    chosen[sample] = (program, int(root))
    base, _ = chunks[b"smpl"]
    for sample, (program, root) in chosen.items():
        header, name = headers[sample], text(headers[sample][0])
        samples = np.frombuffer(content, "<i2", header[2] - header[1], base + 2 * header[1])
        if len(samples) >= header[5] * 0.15 and not name.lower().startswith(("sine", "extension", "saw")):
            plain = re.sub(r"[^A-Za-z0-9#]+", "-", name).strip("-")
            yield Note(f"{program:03d}/{sample:04d}_{plain}", samples, header[5], program, root)


def _soundfont_chunks(content: bytes) -> dict[bytes, tuple[int, int]]:
    """Place and length of every chunk inside the three lists of a SoundFont."""

    def walk(start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        while start + 8 <= end:
            (length,) = struct.unpack("<I", content[start + 4 : start + 8])
            yield content[start : start + 4], start + 8, length
            start += 8 + length + (length & 1)

    found = {}
    for name, start, length in walk(12, len(content)):
        if name == b"LIST":
            found.update({inner: (at, size) for inner, at, size in walk(start + 4, start + length)})
    return found
