#!/usr/bin/env python
"""Clips per second and core that training can read: Ogg, FLAC and WAV files, and a cache of decoded samples.

python benchmarks/data_loading.py
python benchmarks/data_loading.py --seconds 10 --crop 10 --batch 32 --csv rows.csv

The audio is the packaged clips, joined to files of --file-seconds. Batches are read in this process by one thread, so
that clips per second are those of one core: samples found, read, put into one padded batch of float32.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # a script: make `benchmarks` and, in an uninstalled checkout, `bestrq2` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import soundfile
import torch

from bestrq2.data import AudioFile, CropDataset, batches, load_audio, tiny_dataset
from bestrq2.data.cache_build import open_cache

RATE = 16000
FORMATS = {"Ogg Vorbis": ("ogg", "VORBIS"), "FLAC": ("flac", "PCM_16"), "WAV": ("wav", "PCM_16")}


def write_files(folder: Path, extension: str, subtype: str, count: int, seconds: float) -> list[AudioFile]:
    """``count`` files of ``seconds``, each the packaged clips one after the other from another one on."""
    clips = [load_audio(item.path, RATE) for item in tiny_dataset()]
    files = []
    for number in range(count):
        order = [clips[(number + place) % len(clips)] for place in range(int(np.ceil(seconds / 2.0)))]
        path = folder / f"{number}.{extension}"
        samples = np.concatenate(order)[: round(seconds * RATE)]
        with soundfile.SoundFile(path, "w", RATE, 1, subtype) as file:
            for start in range(0, len(samples), RATE):  # libsndfile's Vorbis encoder overflows on long writes
                file.write(samples[start : start + RATE])
        files.append(AudioFile(str(path), seconds, RATE))
    return files


def clips_per_second(dataset: CropDataset, batch: int, seconds: float, as_float: bool) -> float:
    """Clips that one thread reads in a second, after a warm-up of one batch."""
    count, start = 0, 0.0
    for number, found in enumerate(batches(dataset, batch, as_float=as_float)):
        if number == 0:
            start = time.perf_counter()
            continue
        count += len(found)
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> list[dict[str, str | float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="timed seconds of each row (default: 4)")
    parser.add_argument("--crop", type=float, default=10.0, help="seconds of a clip (default: 10)")
    parser.add_argument("--file-seconds", type=float, default=30.0, help="seconds of a file (default: 30)")
    parser.add_argument("--files", type=int, default=24, help="of each format (default: 24)")
    parser.add_argument("--batch", type=int, default=32, help="clips of a batch (default: 32)")
    parser.add_argument("--csv", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, str | float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (extension, subtype) in FORMATS.items():
            folder = Path(scratch) / extension
            folder.mkdir()
            files = write_files(folder, extension, subtype, options.files, options.file_seconds)
            plain = CropDataset(files, options.crop, RATE)
            rows.append(
                {"source": name, "clips_per_second": clips_per_second(plain, options.batch, options.seconds, True)}
            )
        start = time.perf_counter()
        cache, report = open_cache(Path(scratch) / "cache", files, RATE, threads=1)
        built = sum(item.duration or 0.0 for item in files) / (time.perf_counter() - start)
        cached = CropDataset(files, options.crop, RATE, cache=cache)
        for name, as_float in (("cache", True), ("cache, int16", False)):
            rows.append(
                {"source": name, "clips_per_second": clips_per_second(cached, options.batch, options.seconds, as_float)}
            )
    print(f"clips of {options.crop:g} s from files of {options.file_seconds:g} s, one thread")
    for row in rows:
        print(f"{row['source']:14} {row['clips_per_second']:9.0f} clips/s")
    print(f"filling the cache from WAV: {built:.0f} s of audio per second; {report}")
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["source", "clips_per_second"])
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    main()
