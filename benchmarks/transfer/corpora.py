#!/usr/bin/env python
"""Build manifests of real audio from Debian packages: an hour-scale corpus and labelled clips that stay out of it.

    mkdir packages
    for p in $(python benchmarks/transfer/corpora.py --list); do
      (cd packages && apt-get download $p && dpkg -x ${p}_*.deb $p)
    done
    python benchmarks/transfer/corpora.py --root packages --out corpora

``--root`` holds one unpacked tree per package, as above (nothing is installed), or is ``/`` after ``apt-get install``.
``--only`` takes some of the packages. Every sound is decoded once and written below ``corpora/audio`` as mono FLAC at
16 kHz, so neither training nor probes decode G.722, GSM or containers. G.722 needs PyAV: ``pip install 'bestrq2[av]'``.

Written to ``--out``:

    pretrain.csv  what an encoder may be trained on: path, duration, sampling_rate, domain
    clips.csv     everything: also package, corpus, lang, speaker, item, kind, label, group, split, and the columns of
                  the tasks in tasks.py (pair, voice, program, pitch, octave, part)
    data.yaml     configuration overlay: the manifest, joined short clips, shares of the domains

Byte-identical files are taken once. Clips for probes are cut to their first 10 seconds. The audio stays under the
licences of its packages (many GPL or CC-BY-SA); none of it is part of this repository.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import soundfile
import soxr

from benchmarks.transfer import containers
from benchmarks.transfer.packages import PACKAGES, PRETRAINING, Clip, Package

RATE = 16000
LONGEST_PROBE = 10.0  # seconds
SHORTEST = 0.03
PER_CLASS = 300  # clips of each domain on each side of the domain task
# Speech has the most hours; environment is scarce and would be drawn hardly ever.
SHARES = {"speech": 0.45, "music": 0.35, "environment": 0.2}
SOUNDS = (".wav", ".ogg", ".oga", ".opus", ".flac", ".aif", ".aiff", ".mp3", ".gsm", ".g722")
TASK_COLUMNS = ("pair", "voice", "program", "pitch", "octave", "part")
COLUMNS = (
    *("path", "duration", "sampling_rate", "domain", "package", "corpus", "lang", "speaker", "item", "kind", "label"),
    *("group", "split", *TASK_COLUMNS),
)
UNPACK: dict[str, Callable[[bytes], Iterator[tuple[str, bytes]]]] = {
    ".pk3": containers.zipped,
    ".rcc": containers.qt_resource,
    ".cat": containers.openttd_sounds,
}
Row = dict[str, Any]


class CorpusError(ValueError):
    """A package that cannot be read; the message says what to do."""


def decode(name: str, content: bytes) -> tuple[np.ndarray, int]:
    """Samples ``(S,)`` float32, channels averaged, and their rate.

    Raises:
        CorpusError: if PyAV is missing and the file needs it.
        soundfile.LibsndfileError: for a damaged file.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".g722":
        try:
            import av
        except ImportError as error:
            raise CorpusError("G.722 needs PyAV: pip install 'bestrq2[av]'") from error
        with av.open(io.BytesIO(content), mode="r", format="g722") as stream:
            parts = [frame.to_ndarray().ravel() for frame in stream.decode(audio=0)]
        samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
        return samples.astype(np.float32) / 32768, 16000
    raw = {"format": "RAW", "subtype": "GSM610", "samplerate": 8000, "channels": 1} if suffix == ".gsm" else {}
    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True, **raw)
    return samples.mean(1), rate


def sounds(package: Package, base: Path) -> Iterator[tuple[str, bytes | containers.Note]]:
    """Every sound file of a package in sorted order, unpacked where it lies in a container."""
    for folder, below, names in os.walk(base):
        below.sort()
        for name in sorted(names):
            path = Path(folder) / name
            if path.is_symlink():
                continue
            relative = path.relative_to(base).as_posix()
            if package.container == ".sf2" and name.endswith(".sf2"):
                for note in containers.soundfont(path.read_bytes()):
                    yield f"{note.name}.wav", note
            elif package.container and name.endswith(package.container):
                yield from UNPACK[package.container](path.read_bytes())
            elif not package.container and name.lower().endswith(SOUNDS) and package.wants(relative):
                yield relative, path.read_bytes()


def find(package: Package, root: Path) -> Path | None:
    """The package's folder of sounds below ``root/<package>/usr/share`` or ``root/usr/share``."""
    shares = (root / package.name / "usr" / "share", root / "usr" / "share")
    return next((share / folder for share in shares for folder in package.folders if (share / folder).is_dir()), None)


def describe(package: Package, name: str, sound: bytes | containers.Note) -> Clip | None:
    if isinstance(sound, containers.Note):
        group = f"program-{sound.program}"
        return Clip("music", "notes", f"{sound.name} {sound.root}", "note", label=sound.family, group=group)
    assert package.rule is not None
    return package.rule(name)


def write_clip(target: Path, name: str, sound: bytes | containers.Note, longest: float | None) -> float:
    """Write a sound as FLAC unless it is there already; its duration in seconds."""
    if not target.exists():
        if isinstance(sound, containers.Note):
            samples, rate = sound.samples.astype(np.float32) / 32768, sound.rate
        else:
            samples, rate = decode(name, sound)
        if longest is not None:
            samples = samples[: round(longest * rate)]
        if rate != RATE and len(samples):
            samples = soxr.resample(samples, rate, RATE)
        if len(samples) < SHORTEST * RATE:
            return 0.0
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        soundfile.write(partial, np.clip(samples, -1, 1), RATE, format="FLAC", subtype="PCM_16")
        partial.replace(target)
    info = soundfile.info(target)
    return info.frames / info.samplerate


def convert(package: Package, base: Path, out: Path, seen: set[bytes], notes: Counter[str]) -> list[Row]:
    """Write the clips of a package; their rows."""
    rows = []
    for name, sound in sounds(package, base):
        clip = describe(package, name, sound)
        if clip is None:
            continue
        content = sound.samples.tobytes() if isinstance(sound, containers.Note) else sound
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            notes[f"{package.name}: byte-identical to an earlier file"] += 1
            continue
        seen.add(digest)
        split = "pretrain" if (clip.corpus, clip.domain) in PRETRAINING else "probe"
        plain = re.sub(r"[^A-Za-z0-9._#/-]+", "_", name)
        target = out / "audio" / package.name / f"{plain}.flac"
        try:
            seconds = write_clip(target, name, sound, LONGEST_PROBE if split == "probe" else None)
        except (soundfile.LibsndfileError, OSError, IndexError) as error:
            notes[f"{package.name}: {type(error).__name__}"] += 1
            continue
        if seconds:
            known = {key: value for key, value in vars(clip).items() if key in COLUMNS}
            where = target.relative_to(out).as_posix()
            fixed = {"path": where, "duration": seconds, "sampling_rate": RATE, "package": package.name, "split": split}
            rows.append({**known, **fixed})
            if isinstance(sound, containers.Note):
                rows[-1].update(program=sound.program, pitch=sound.root % 12, octave=sound.root // 12)
    return rows


def add_task_columns(rows: list[Row]) -> None:
    """Fill the columns that only tasks need.

    ``pair`` and ``voice``: phrases that two voices of one language say, "gallery" for the voice of pretraining and
    "query" for the other. ``part``: train or test for the domain task, up to ``PER_CLASS`` clips of each domain from
    the pretraining collections and from the others, chosen by a hash of their path.
    """
    voices: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["corpus"] in ("asterisk-core", "asterisk-prompt"):
            voices[row["lang"], row["item"]][row["corpus"]].append(row)
    for (lang, item), by_voice in voices.items():
        if len(by_voice) == 2:
            for corpus, voice in (("asterisk-core", "gallery"), ("asterisk-prompt", "query")):
                by_voice[corpus][0].update(pair=f"{lang} {item}", voice=voice)
    classes: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] != "note":
            classes[row["split"], row["domain"]].append(row)
    for (split, _), members in classes.items():
        members.sort(key=lambda row: hashlib.sha256(row["path"].encode()).digest())
        for row in members[:PER_CLASS]:
            row["part"] = "train" if split == "pretrain" else "test"


def write_table(path: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def summary(rows: list[Row]) -> str:
    lines = []
    for split in ("pretrain", "probe"):
        for domain in SHARES:
            chosen = [float(row["duration"]) for row in rows if (row["split"], row["domain"]) == (split, domain)]
            lines.append(f"{split:9s} {domain:12s} {len(chosen):6d} clips {sum(chosen) / 60:8.1f} min")
    return "\n".join(lines)


def build(root: Path, out: Path, names: list[str]) -> list[Row]:
    """Convert the packages that are there and write the tables.

    Raises:
        CorpusError: if none is, or PyAV is needed and missing.
    """
    rows: list[Row] = []
    seen: set[bytes] = set()
    notes: Counter[str] = Counter()
    for package in PACKAGES:
        if package.name not in names:
            continue
        base = find(package, root)
        if base is None:
            notes[f"{package.name}: not found below {root}"] += 1
            continue
        rows += convert(package, base, out, seen, notes)
        print(f"{package.name}: {len(rows)} clips so far", flush=True)
    if not rows:
        raise CorpusError(f"none of the packages lies below {root}: see --list and the text of --help")
    add_task_columns(rows)
    write_table(out / "clips.csv", COLUMNS, rows)
    training = [row for row in rows if row["split"] == "pretrain"]
    write_table(out / "pretrain.csv", COLUMNS[:4], training)
    shares = {name: share for name, share in SHARES.items() if any(row["domain"] == name for row in training)}
    listed = ", ".join(f"{name}: {share}" for name, share in shares.items())
    (out / "data.yaml").write_text(
        f"data:\n  source: {(out / 'pretrain.csv').resolve()}\n  join_short: true\n  domain_weights: {{{listed}}}\n"
    )
    for note, count in notes.items():
        print(f"note: {count} x {note}", file=sys.stderr)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the packages and stop")
    parser.add_argument("--root", type=Path, default=Path("/"), help="unpacked packages, or / (default) if installed")
    parser.add_argument("--out", type=Path, default=Path("corpora"), help="output folder (default: corpora)")
    parser.add_argument("--only", metavar="NAMES", help="packages to use, separated by commas (default: all)")
    options = parser.parse_args(arguments)
    known = [package.name for package in PACKAGES]
    if options.list:
        print("\n".join(known))
        return 0
    names = options.only.split(",") if options.only else known
    if unknown := set(names) - set(known):
        print(f"error: --only: no such package here: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = build(options.root, options.out, names)
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
