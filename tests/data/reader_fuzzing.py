"""Inputs for fuzzing readers: audio files, manifests of every tool and archives, right ones and damaged ones."""

import csv
import functools
import gzip
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import strategies as st

from bestrq2.data.files import from_text

RATE = 16000
NOISE = (0.1 * np.random.default_rng(0).standard_normal(RATE // 2)).astype(np.float32)

# name -> arguments of soundfile.write
FORMS = {
    "pcm.wav": {"format": "WAV", "subtype": "PCM_16"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "adpcm.wav": {"format": "WAV", "subtype": "MS_ADPCM"},
    "gsm.wav": {"format": "WAV", "subtype": "GSM610"},
    "ulaw.wav": {"format": "WAV", "subtype": "ULAW"},
    "extensible.wav": {"format": "WAVEX", "subtype": "PCM_24"},
    "rf64.wav": {"format": "RF64", "subtype": "PCM_16"},
    "pcm.aiff": {"format": "AIFF", "subtype": "PCM_16"},
    "int16.flac": {"format": "FLAC", "subtype": "PCM_16"},
    "vorbis.ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus.opus": {"format": "OGG", "subtype": "OPUS"},
    "layer3.mp3": {"format": "MP3"},
}


@functools.cache
def audio_bytes(name: str) -> bytes:
    """Half a second of noise; two channels in the formats that begin with another letter than their extension."""
    buffer = io.BytesIO()
    samples = np.stack([NOISE, NOISE[::-1]], 1) if name.startswith(("float", "extensible", "layer3")) else NOISE
    rate = 8000 if name.startswith("gsm") else RATE
    soundfile.write(buffer, samples, rate, **FORMS[name])
    return buffer.getvalue()


_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 127, 128, 255, 256, 1000, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000)
_CHANGES = st.one_of(
    st.tuples(st.just("byte"), st.integers(0, 255)),
    st.tuples(st.just("bit"), st.integers(0, 7)),
    st.tuples(st.sampled_from(["<H", ">H"]), st.sampled_from([n for n in _NUMBERS if n < 1 << 16])),
    st.tuples(st.sampled_from(["<I", ">I"]), st.sampled_from([*_NUMBERS, 0xFFFFFFFF, 0xFFFFFFFE])),
    st.tuples(st.just("delete"), st.integers(1, 5000)),
    st.tuples(st.just("repeat"), st.integers(1, 5000)),
    st.tuples(st.just("zero"), st.integers(1, 5000)),
    st.tuples(st.just("insert"), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), st.just(0)),
    st.tuples(st.just("append"), st.sampled_from(sorted(FORMS))),
)
# Half of the places in the first 100 bytes, where headers are.
_PLACES = st.one_of(st.integers(0, 100), st.floats(0, 1))
damage = st.lists(st.tuples(_PLACES, _CHANGES), min_size=1, max_size=4)


def damaged(data: bytes, changes: list) -> bytes:
    """Apply changes (place, (kind, value)); a place is a byte or a fraction of the length."""
    content = bytearray(data)
    for place, (kind, value) in changes:
        at = min(len(content), place if isinstance(place, int) else int(place * len(content)))
        if kind == "byte":
            content[at : at + 1] = bytes([value])
        elif kind == "bit" and at < len(content):
            content[at] ^= 1 << value
        elif kind in ("<H", ">H", "<I", ">I"):
            content[at : at + struct.calcsize(kind)] = struct.pack(kind, value)
        elif kind == "delete":
            del content[at : at + value]
        elif kind == "repeat":
            content[at:at] = content[at : at + value]
        elif kind == "zero":
            content[at : at + value] = bytes(len(content[at : at + value]))
        elif kind == "insert":
            content[at:at] = value
        elif kind == "cut":
            del content[at:]
        elif kind == "append":
            content += audio_bytes(value)
    return bytes(content)


# --- manifests -------------------------------------------------------------------------------------------------------

# Quotation marks, delimiters, other scripts; no line breaks, which a format without quoting cannot hold.
_LINE = st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="\x85")
text = st.text(_LINE, max_size=12) | st.sampled_from(['"', '"Yes", he said', "5' 3\"", "a,b;c|d", "#", "'", "NaN", "-"])
names = st.text(
    st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"), blacklist_characters="/\x85"), min_size=1, max_size=8
).filter(lambda name: name.strip() == name and name not in (".", "..") and "root}" not in name)
paths = st.builds(lambda folder, name: f"{folder}/{name}.wav", names, names)
milliseconds = st.integers(0, 30_000)


@st.composite
def clips(draw):
    """(path, start, end, text): start and end in thousandths of a second or None."""
    start = draw(st.none() | milliseconds)
    end = None if start is None else start + draw(st.integers(100, 20_000))
    return draw(paths), start, end, draw(text)


def _seconds(value):
    return "" if value is None else repr(value / 1000)


def write_table(path: Path, rows, delimiter: str, quoting=csv.QUOTE_MINIMAL) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerow(["path", "start", "end", "sentence"])
        writer.writerows((name, _seconds(start), _seconds(end), words) for name, start, end, words in rows)


def write_nemo(path: Path, rows) -> None:
    lines = []
    for name, start, end, words in rows:
        row = {"audio_filepath": name, "text": words}
        if start is not None:
            row |= {"offset": start / 1000, "duration": (end - start) / 1000}
        lines.append(json.dumps(row, ensure_ascii=len(lines) % 2 == 0))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_speechbrain(path: Path, rows) -> None:
    document = {}
    for number, (name, start, end, words) in enumerate(rows):
        wav = name
        row = {"words": words}
        if start is not None:
            wav = {"file": name, "start": start * 16, "stop": end * 16}
            row["length"] = (end - start) / 1000
        document[f"utt{number}"] = {"wav": wav, **row}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")


def write_kaldi(path: Path, rows) -> None:
    """wav.scp, with segments where every clip is one (a folder of Kaldi has one form or the other)."""
    path.write_text("".join(f"rec{n} {name}\n" for n, (name, *_) in enumerate(rows)), encoding="utf-8")
    path.with_name("segments").unlink(missing_ok=True)
    if all(start is not None for _, start, _, _ in rows):
        lines = (f"utt{n} rec{n} {start / 1000} {end / 1000}\n" for n, (_, start, end, _) in enumerate(rows))
        path.with_name("segments").write_text("".join(lines), encoding="utf-8")


def write_lhotse(path: Path, rows) -> None:
    lines = []
    for number, (name, start, end, words) in enumerate(rows):
        source = {"type": "file", "channels": [0], "source": name}
        recording = {"id": f"r{number}", "sources": [source], "sampling_rate": 16000, "duration": 60.0}
        begin, length = (0, 60_000) if start is None else (start, end - start)
        cut = {"id": f"c{number}", "start": begin / 1000, "duration": length / 1000, "channel": 0, "type": "MonoCut"}
        lines.append(json.dumps({**cut, "recording": recording, "supervisions": [{"text": words}]}))
    path.write_text("\n".join(lines), encoding="utf-8")


def write_fairseq(path: Path, rows) -> None:
    """A folder, then a path and a number of samples a line."""
    lines = (f"{name}\t{1600 + 16 * len(words)}\n" for name, _, _, words in rows)
    path.write_text(f"{path.parent}\n" + "".join(lines), encoding="utf-8")


def write_gzipped(path: Path, rows) -> None:
    write_nemo(path.with_suffix(""), rows)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


# tool -> (name of the file, writer)
TOOLS = {
    "csv": ("clips.csv", lambda path, rows: write_table(path, rows, ",")),
    "semicolons": ("clips.csv", lambda path, rows: write_table(path, rows, ";")),
    "tsv": ("clips.tsv", lambda path, rows: write_table(path, rows, "\t")),
    "quoted tsv": ("clips.tsv", lambda path, rows: write_table(path, rows, "\t", csv.QUOTE_ALL)),
    "NeMo": ("clips.jsonl", write_nemo),
    "SpeechBrain": ("clips.json", write_speechbrain),
    "Kaldi": ("wav.scp", write_kaldi),
    "Lhotse": ("cuts.jsonl", write_lhotse),
    "fairseq": ("train.tsv", write_fairseq),
    "gzip": ("clips.jsonl.gz", write_gzipped),
}


def expected(folder: Path, tool: str, rows) -> list[tuple[str, float, float | None]]:
    """(path, start, end) that a reader must give; a process of another locale sees the bytes of a name."""
    segments = tool != "fairseq" and (tool != "Kaldi" or all(start is not None for _, start, _, _ in rows))
    return [
        (os.path.normpath(os.path.join(folder, from_text(name))), start / 1000, end / 1000)
        if start is not None and segments
        else (os.path.normpath(os.path.join(folder, from_text(name))), 0.0, None)
        for name, start, end, _ in rows
    ]


# --- archives --------------------------------------------------------------------------------------------------------


@functools.cache
def tar_bytes() -> bytes:
    """Six clips with sidecars, one with a long name (a pax header)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(6):
            stem = f"{'long' * 40 if number == 3 else 'clip'}-{number}"
            for suffix, content in ((".flac", audio_bytes("int16.flac")), (".json", b'{"label": "a", "domain": "b"}')):
                member = tarfile.TarInfo(f"folder/{stem}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


CLIPS = 6


def samples_of(number: int) -> np.ndarray:
    """int16 samples of one clip of an archive, of another length than the others."""
    return (NOISE[: 3000 + 100 * number] * 32767).astype(np.int16)


def _hdf5(layout: str) -> bytes:
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        if layout == "table":
            rows = np.stack([samples_of(0)] * CLIPS)
            file.create_dataset("waveform", data=rows, chunks=(1, 1000), compression="gzip")
        elif layout == "group":
            for number in range(CLIPS):
                file[f"waveform/clip{number}"] = samples_of(number)
        else:
            rows = file.create_dataset("waveform", (CLIPS,), h5py.vlen_dtype(np.int16))
            for number in range(CLIPS):
                rows[number] = samples_of(number)
        file["label"] = [f"é{number}" for number in range(CLIPS)]
        file.attrs["sample_rate"] = RATE
    return buffer.getvalue()


def _arrow(form: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    clips = []
    for number in range(CLIPS):
        clip = io.BytesIO()
        soundfile.write(clip, samples_of(number), RATE, format="WAV")
        clips.append({"bytes": clip.getvalue(), "path": f"{number}.wav"})
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {"audio": pyarrow.array(clips, kind), "label": [f"é{number}" for number in range(CLIPS)]}
    table = pyarrow.table(columns)
    if form == "parquet":
        pyarrow.parquet.write_table(table, buffer, row_group_size=2)
    else:
        new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with new(buffer, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return buffer.getvalue()


# name of the file -> its content: six clips
ARCHIVES = {
    "table.h5": lambda: _hdf5("table"),
    "group.hdf5": lambda: _hdf5("group"),
    "arrays.h5": lambda: _hdf5("arrays"),
    "stream.arrow": lambda: _arrow("stream"),
    "file.arrow": lambda: _arrow("file"),
    "rows.parquet": lambda: _arrow("parquet"),
}


@functools.cache
def archive_bytes(name: str) -> bytes:
    return ARCHIVES[name]()
