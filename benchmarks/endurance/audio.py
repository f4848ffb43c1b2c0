"""Malformed audio: every file must be used or reported, and the counts must add up exactly.

The files lie in one folder. It is scanned, checked and trained on by the commands a user has, each with a time limit,
and every file is opened by itself in a process that a hanging decoder would end with a traceback.
"""

from __future__ import annotations

import csv
import faulthandler
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from benchmarks.endurance.kills import Figures
from bestrq2.data import AudioError, audio_info, discover_folder, load_audio, read_manifest, tiny_dataset
from bestrq2.data.audio import audio_digest
from bestrq2.errors import REASONS
from bestrq2.runs.metrics import read_metrics

LIMIT = 300.0  # seconds for a command
FILE_LIMIT = 20.0  # seconds for one file
CROP, BATCH = 1.0, 32

# extension, libsndfile format, subtype, sampling rate, channels
FORMATS = [
    ("wav", "WAV", "PCM_16", 16000, 1),
    ("wav", "WAV", "PCM_U8", 8000, 2),
    ("wav", "WAVEX", "PCM_24", 48000, 2),
    ("wav", "WAV", "FLOAT", 44100, 2),
    ("wav", "RF64", "PCM_32", 22050, 1),
    ("wav", "WAV", "MS_ADPCM", 22050, 1),
    ("wav", "WAV", "ULAW", 8000, 1),
    ("flac", "FLAC", "PCM_16", 44100, 2),
    ("flac", "FLAC", "PCM_24", 96000, 1),
    ("aiff", "AIFF", "PCM_16", 22050, 2),
    ("aif", "AIFF", "FLOAT", 11025, 1),
    ("mp3", "MP3", "MPEG_LAYER_III", 44100, 2),
    ("mp3", "MP3", "MPEG_LAYER_III", 22050, 1),
    ("ogg", "OGG", "VORBIS", 44100, 2),
    ("opus", "OGG", "OPUS", 48000, 2),
]
NAMES = [
    "spaces in it", "quote'and\"quote", "comma,semicolon;tab\tend", "new\nline", "-dash", "ünïcödé", "音声", "😀",
    "e\u0301 decomposed", "\u00e9 composed", "per%cent", "$HOME `id`", "a=b [c] {d}", "back\\slash", "\x1b[31mred",
    "x" * 200, "two.dots.wav", "UPPER", "not utf-8 \udcff\udcfe", "#hash", "~", "CON", "trailing ", "*?", "<&>",
]  # fmt: skip


def malformed(folder: Path, least: int, seed: int) -> None:
    """Write at least ``least`` files (and links, folders and devices) with the extensions of audio into ``folder``."""
    chance = random.Random(seed)
    clips = [soundfile.read(item.path, dtype="float32")[0][4000:18000] for item in tiny_dataset()]
    sources = []
    for number, (extension, form, subtype, rate, channels) in enumerate(FORMATS):
        path = folder / f"whole-{number}.{extension}"
        write(path, clips[number % len(clips)], rate, channels, form, subtype)
        sources.append((extension, path.read_bytes()))
    odd_but_valid(folder, clips)
    special(folder, clips)
    each = 0
    for number, (extension, content) in enumerate(sources):
        for kind, data in systematic(content, sources[(number + 1 + chance.randrange(13)) % len(sources)][1]):
            (folder / f"{number:02}-{kind}.{extension}").write_bytes(data)
    while len(list(os.scandir(folder))) < least:
        for number, (extension, content) in enumerate(sources):
            kind, data = damage(content, chance.choice(sources)[1], chance)
            (folder / f"{number:02}-{kind}-{each}.{extension}").write_bytes(data)
            each += 1


def write(path: Path | str, samples: np.ndarray, rate: int, channels: int, form: str, subtype: str) -> None:
    frames = np.repeat(samples[:, None], channels, axis=1)
    name = os.fsencode(path)
    with soundfile.SoundFile(name, "w", rate, channels, format=form, subtype=subtype) as file:
        for start in range(0, len(frames), 16384):  # libsndfile's Vorbis encoder crashes on a long single write
            file.write(frames[start : start + 16384])


def systematic(content: bytes, other: bytes) -> Iterator[tuple[str, bytes]]:
    """Cuts at every kind of place, swapped headers, lengths and sizes that lie, other kinds of content."""
    size = len(content)
    for keep in (0, 1, 4, 11, 12, 20, 36, 43, 44, 45, 60, 100, 200):
        yield f"cut-{keep}", content[:keep]
    for share in (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.985, 0.995):
        yield f"cut-{share}", content[: int(share * size)]
    yield "cut-last", content[:-1]
    for length in (4, 44, 128, 512):
        yield f"header-of-another-{length}", other[:length] + content[length:]
        yield f"no-header-{length}", content[length:]
    yield "twice", content + content
    yield "with-tail", content + b"TAG" + bytes(125)
    yield "with-garbage", content + os.urandom(5000)
    yield "zeros-before", bytes(512) + content
    yield "zeros", bytes(size)
    yield "ones", b"\xff" * size
    yield "text", b"RIFF this is not audio\n" * 200
    yield "page", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    yield "wrong-extension", other
    for at in lengths(content):
        for value in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
            yield f"length-at-{at}-{value:x}", content[:at] + value.to_bytes(4, "little") + content[at + 4 :]


def lengths(content: bytes) -> list[int]:
    """Offsets of numbers that a reader may trust: sizes, counts, rates, channels."""
    if content[:4] in (b"RIFF", b"RF64"):
        return [4, 16, 20, 24, 28, 32, max(0, content.find(b"data")) + 4]
    if content[:4] == b"FORM":
        return [4, 16, 20, 22, 28, max(0, content.find(b"SSND")) + 4]
    if content[:4] == b"fLaC":
        return [4, 8, 18, 21, 22]  # block header, block sizes, rate and channels, total samples
    if content[:4] == b"OggS":
        return [6, 10, 14, 18, 22, 26, 39]
    tag = max(content.find(b"Xing"), content.find(b"Info"), 0)
    return [0, tag + 4, tag + 8, tag + 12]


def damage(content: bytes, other: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Random damage: flipped bits (anywhere, or in the header), overwritten runs, holes, insertions, foreign tails."""
    data, size = bytearray(content), len(content)
    kind = chance.choice(("bits", "header-bits", "run", "hole", "insertion", "tail", "cut"))
    at = chance.randrange(size)
    if kind in ("bits", "header-bits"):
        for _ in range(chance.choice((1, 2, 8, 64))):
            data[chance.randrange(size if kind == "bits" else min(size, 64))] ^= 1 << chance.randrange(8)
    elif kind == "run":
        length = chance.randrange(1, 4000)
        data[at : at + length] = bytes([chance.choice((0, 255, 127))]) * length
    elif kind == "hole":
        del data[at : at + chance.randrange(1, 4000)]
    elif kind == "insertion":
        data[at:at] = chance.randbytes(chance.randrange(1, 4000))
    elif kind == "tail":
        data[at:] = other[at:]
    else:
        del data[at:]
    return kind, bytes(data)


def odd_but_valid(folder: Path, clips: list[np.ndarray]) -> None:
    """Odd rates, channel counts, bit depths and sample values in files that are whole."""
    clip = clips[0]
    for rate in (1, 500, 1000, 3999, 7350, 11025, 88200, 192000, 384000, 1000000, 2000000):
        write(folder / f"rate-{rate}.wav", clip, rate, 1, "WAV", "PCM_16")
    for channels in (3, 4, 5, 6, 8, 16, 64, 255):
        write(folder / f"channels-{channels}.wav", clip[:2000], 16000, channels, "WAVEX", "PCM_16")
    for channels in (1, 5, 8):
        write(folder / f"channels-{channels}.flac", clip, 16000, channels, "FLAC", "PCM_16")
    for subtype in ("PCM_U8", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM", "GSM610"):
        write(folder / f"depth-{subtype}.wav", clip, 8000, 1, "WAV", subtype)
    write(folder / "depth-PCM_S8.flac", clip, 16000, 1, "FLAC", "PCM_S8")
    for length in (0, 1, 2, 159, 160, 400, 1599):
        write(folder / f"samples-{length}.wav", clip[:length], 16000, 1, "WAV", "PCM_16")
    values = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf, "1e30": 1e30, "1e5": 1e5, "denormal": 1e-42}
    for name, value in values.items():
        for place in (0, len(clip) // 2, len(clip) - 1):
            for subtype in ("FLOAT", "DOUBLE"):
                samples = clip.astype(np.float64)
                samples[place] = value
                write(folder / f"value-{name}-{place}-{subtype}.wav", samples, 16000, 1, "WAV", subtype)
        write(folder / f"value-{name}-all.wav", np.full(16000, value), 16000, 2, "WAV", "FLOAT")
    write(folder / "silence.wav", np.zeros(16000), 16000, 1, "WAV", "PCM_16")
    write(folder / "constant.wav", np.full(16000, 0.5), 16000, 1, "WAV", "PCM_16")
    write(folder / "clipped.wav", np.sign(clip), 16000, 1, "WAV", "PCM_16")


def special(folder: Path, clips: list[np.ndarray]) -> None:
    """Odd names, folders named like files, links that lead nowhere or in circles, pipes, devices, other extensions."""
    for number, name in enumerate(NAMES):
        write(f"{folder}/{name}.{'wav' if number % 2 else 'flac'}", clips[number % len(clips)], 16000, 1,
              *(("WAV", "PCM_16") if number % 2 else ("FLAC", "PCM_16")))  # fmt: skip
        with open(f"{folder}/broken {name}"[:240].encode("utf-8", "surrogateescape") + b".wav", "wb") as file:
            file.write(b"RIFF")
    (folder / "folder.wav").mkdir()
    (folder / "full folder.flac").mkdir()
    write(folder / "full folder.flac" / "inside.wav", clips[1], 16000, 1, "WAV", "PCM_16")
    (folder / "dangling.wav").symlink_to(folder / "nowhere.wav")
    (folder / "itself.wav").symlink_to(folder / "itself.wav")
    (folder / "circle").symlink_to(folder)
    (folder / "link.wav").symlink_to(folder / "whole-0.wav")
    (folder / "null.wav").symlink_to("/dev/null")
    (folder / "zero.flac").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    for name in ("notes.txt", "cover.jpg", "no extension", "audio.m4a", "audio.wav.part", ".hidden.wav"):
        (folder / name).write_bytes(b"x" * 100)
    os.link(folder / "whole-0.wav", folder / "hard link.wav")
    os.chmod(folder / "samples-400.wav", 0)


def each_file(folder: Path) -> None:
    """Open every file by itself and print one JSON line about it; a hanging decoder ends this process."""
    for item in discover_folder(folder).files:
        faulthandler.dump_traceback_later(FILE_LIMIT, exit=True)
        start, outcomes = time.perf_counter(), []
        for call in (audio_info, audio_digest, load_audio, lambda p: load_audio(p, start=0.3, duration=0.4)):
            try:
                found = call(item.path)
                if isinstance(found, np.ndarray) and not (found.size and np.isfinite(found).all()):
                    raise ValueError(f"{item.path}: samples that cannot be used")
                outcomes.append("")
            except AudioError as error:
                outcomes.append(error.reason)
        print(json.dumps([os.fsencode(item.path).hex(), time.perf_counter() - start, outcomes]))
    faulthandler.cancel_dump_traceback_later()


def command(name: str, arguments: list[str], log: Path) -> str:
    """Run a command of the package with a time limit; its output. A crash or a hang ends the soak."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    result = subprocess.run([sys.executable, *arguments], capture_output=True, timeout=LIMIT, env=environment)
    log.write_bytes(result.stdout + result.stderr)
    if result.returncode != 0 or b"Traceback" in result.stderr:
        raise RuntimeError(f"{name} ended with {result.returncode}; see {log}:\n{result.stderr.decode()[-3000:]}")
    return result.stdout.decode()


def malformed_run(folder: Path, least: int, seed: int) -> Figures:
    """Scan, check and train on a folder of broken audio; every file is accounted for three times."""
    audio = folder / "audio"
    audio.mkdir()
    malformed(audio, least, seed)
    listing = discover_folder(audio)
    inputs = {os.path.realpath(os.path.dirname(f.path)) + "/" + os.path.basename(f.path) for f in listing.files}
    entries = sum(len(f) + len(d) for _, d, f in os.walk(audio))
    figures: Figures = {"files and folders": entries, "audio files tried": len(inputs)}
    problems: list[str] = []

    output = command("each file", ["-m", "benchmarks.endurance.audio", str(audio)], folder / "each.log")
    single = {bytes.fromhex(name).decode(errors="surrogateescape"): (seconds, outcomes)
              for name, seconds, outcomes in map(json.loads, output.splitlines())}  # fmt: skip
    if len(single) != len(inputs):
        problems.append(f"{len(inputs)} files, {len(single)} opened")
    figures["slowest file, seconds"] = round(max(seconds for seconds, _ in single.values()), 2)

    manifests, reasons = {}, {}
    for name, options in {"scan": ["--min-seconds", "0.1"], "check": ["--check"]}.items():
        out = folder / f"{name}.csv"
        arguments = ["-m", "bestrq2.data.manifest", str(audio), "--out", str(out), *options]
        command(name, arguments, folder / f"{name}.log")
        used = [file.path for file in read_manifest(out)]
        with open(out.with_suffix(".skipped.csv"), newline="", encoding="utf-8", errors="surrogateescape") as file:
            skipped = [(row["path"], row["reason"]) for row in csv.DictReader(file)]
        problems += accounted(name, inputs, used, skipped)
        manifests[name] = used
        figures[f"{name}: usable"] = len(used)
        reasons[name] = Counter(reason for _, reason in skipped)
        for reason, count in sorted(reasons[name].items()):
            figures[f"{name}: {reason}"] = count
    broken = {path for path, (_, outcomes) in single.items() if outcomes[1]}
    if wrong := [path for path in manifests["check"] if path in broken]:
        problems.append(f"--check calls usable what cannot be decoded: {wrong[:3]}")

    # One epoch: every usable file is drawn, so what is not reported was used.
    slots = sum(max(1, round((file.duration or 0.0) / CROP)) for file in read_manifest(folder / "scan.csv"))
    figures["longest file by its header, seconds"] = round(
        max(file.duration or 0.0 for file in read_manifest(folder / "scan.csv")), 1
    )
    steps = -(-slots // BATCH)
    settings = ["data.min_seconds=0.1", f"data.crop_seconds={CROP}", "data.workers=1", f"train.batch_size={BATCH}",
                f"train.steps={steps}", "train.save_every=1000", "train.pictures_every=0", "model.encoder.width=32",
                "model.encoder.hidden=48", "model.encoder.depth=1", "model.predictor.width=32",
                "model.predictor.hidden=48", "model.predictor.depth=1"]  # fmt: skip
    train = [
        "-m",
        "bestrq2.train",
        "--config",
        "best_rq2_tiny",
        "--data",
        str(audio),
        "--runs",
        str(folder),
        "--name",
        "run",
        *settings,
    ]
    command("training", train, folder / "train.log")
    last = read_metrics(folder / "run")[-1]
    scanned = reasons["scan"]
    text = (folder / "run" / "skipped.txt").read_text(errors="surrogateescape")
    reports = text.splitlines()
    by_reason = Counter({r: count for r in REASONS if (count := int(last.get(f"skipped/{r.replace(' ', '_')}") or 0))})
    listed = Counter(next((r for r in REASONS if f": {r}" in line), "?") for line in reports)
    # Those of the scan at its start, then those met while training.
    if int(last["skipped_files"]) != by_reason.total() or listed != by_reason + scanned:
        problems.append(
            f"skipped.txt lists {listed}, the log {last['skipped_files']} = {by_reason}, the scan {scanned}"
        )
    names = {line.split(f": {reason}")[0] for line in reports for reason in REASONS if f": {reason}" in line}
    printable = {path: str(AudioError(path, "silent")).removesuffix(": silent") for path in inputs}
    failed = [path for path in manifests["scan"] if printable[path] in names]
    if unsaid := [path for path in inputs if path not in manifests["scan"] and printable[path] not in names]:
        problems.append(f"training says nothing about {unsaid[:3]}")
    if len(names) != len(inputs) - len(manifests["scan"]) + len(failed):
        problems.append(f"skipped.txt names {len(names)} files, expected those the scan left out and {len(failed)}")
    if unexplained := [path for path in failed if not any(single[path][1])]:
        problems.append(f"training left out what can be decoded: {unexplained[:3]}")
    if silently := [path for path in manifests["scan"] if path not in failed and all(single[path][1][2:])]:
        problems.append(f"training reports nothing about {silently[:3]}")
    figures |= {
        "training: samples of one epoch": steps * BATCH,
        "training: files used": len(manifests["scan"]) - len(failed),
        "training: files reported": len(failed),
        "training: skips of these files, each reported": by_reason.total(),
        "losses": len(problems),
    }
    for problem in problems:
        print(f"LOSS: {problem}", flush=True)
    return figures


def accounted(name: str, inputs: set[str], used: list[str], skipped: list[tuple[str, str]]) -> list[str]:
    """Problems found: every input must be used or reported, exactly once, with a known reason."""
    seen = Counter([*used, *(path for path, _ in skipped)])
    problems = [f"{name}: {path!r} occurs {count} times" for path, count in seen.items() if count != 1]
    problems += [f"{name}: {path!r} is not reported" for path in inputs - seen.keys()]
    problems += [f"{name}: {path!r} is not of the folder" for path in seen.keys() - inputs]
    return problems + [f"{name}: {path!r}: reason {reason!r}" for path, reason in skipped if reason not in REASONS]


if __name__ == "__main__":
    each_file(Path(sys.argv[1]))
