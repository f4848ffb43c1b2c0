"""The cache of decoded audio: the samples of the files, whatever happens to the build or to the disk."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import cache as command
from bestrq2.data import AudioError, AudioFile, BucketDataset, CropDataset, batches, collect, load_audio, tiny_dataset
from bestrq2.data.cache import BLOCK, shard_path, to_int16
from bestrq2.data.cache_build import open_cache
from bestrq2.data.fingerprint import data_fingerprint
from bestrq2.errors import DataError
from bestrq2.training.feeder import Feeder

RATE = 16000


def write(
    folder: Path, count: int = 6, channels: int = 1, rate: int = RATE, subtype: str = "PCM_16"
) -> list[AudioFile]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    files = []
    for number in range(count):
        length = 4000 + 30_000 * number
        samples = rng.integers(-32768, 32768, (length, channels), np.int16)
        path = folder / f"clip-{number}.{'flac' if number % 2 else 'wav'}"
        soundfile.write(path, samples, rate, subtype=subtype)
        files.append(AudioFile(str(path), length / rate, rate, domain="ab"[number % 2]))
    return files


def same(one, two) -> bool:
    return all(
        torch.equal(a.waveform, b.waveform) and torch.equal(a.lengths, b.lengths) and a.domains == b.domains
        for a, b in zip(one, two, strict=True)
    )


def parts_of(files):
    """Parts of files whose times are no multiples of a sample."""
    return [
        AudioFile(item.path, 0.71003, RATE, item.domain, start=0.10001 * number, end=0.10001 * number + 0.71003)
        for item in files[2:]
        for number in range(5)
    ] + [AudioFile(files[5].path, files[5].duration - 7.00002, RATE, "a", start=7.00002)]


@pytest.mark.parametrize("kind", ["crops", "joined", "buckets", "parts"])
def test_batches_are_those_of_the_files(tmp_path, kind):
    files = write(tmp_path / "audio")
    if kind == "parts":
        files = parts_of(files)
    cache, report = open_cache(tmp_path / "cache", files)
    assert (report.files, report.added, report.rounded, report.failed) == (len(files), len(files), 0, 0)
    assert cache.exact

    def dataset(cache):
        if kind == "parts":
            return CropDataset(files, 0.3, RATE, seed=1, cache=cache)
        if kind == "buckets":
            return BucketDataset(files, 4.0, RATE, seed=1, cache=cache)
        return CropDataset(files, 4.0, RATE, seed=1, join_short=kind == "joined", cache=cache)

    plain, cached = dataset(None), pickle.loads(pickle.dumps(dataset(cache)))
    assert data_fingerprint(plain) == data_fingerprint(cached)
    assert same(batches(plain, 4, num_steps=6), batches(cached, 4, num_steps=6))
    raw = list(batches(cached, 4, num_steps=6, as_float=False))
    assert {batch.waveform.dtype for batch in raw} == {torch.int16}
    fed = [fed.batch for fed in Feeder(batches(cached, 4, num_steps=6, as_float=False), torch.device("cpu"))]
    assert same(batches(plain, 4, num_steps=6), fed)


def test_a_part_is_the_part_of_the_file(tmp_path):
    files = write(tmp_path / "audio")
    cache, _ = open_cache(tmp_path / "cache", files)
    path = files[5].path
    for start, duration in ((0.0, None), (0.0, 0.5), (4.1, 3.0), (9.5, 3.0), (2.3, 1e-6)):
        expected = load_audio(path, RATE, start=start, duration=duration)
        assert np.array_equal(cache.load(files[5], RATE, start=start, duration=duration) / np.float32(32768), expected)
    with pytest.raises(AudioError, match=r"nothing from 99\.000 s on"):
        cache.load(files[5], RATE, start=99.0)
    with pytest.raises(ValueError, match="16000 Hz, asked for 8000"):
        cache.load(files[5], 8000)


def test_samples_above_full_scale_are_told(tmp_path, caplog):
    """Floating files may be louder than 16 bits can hold; peaks that resampling makes are counted without a warning."""
    tone = np.sin(np.arange(44100) / 9, dtype=np.float32)
    levels = {"loud": 3.0, "full": 1.0, "integers": 20000.0, "quiet": 0.5}
    for name, level in levels.items():
        soundfile.write(tmp_path / f"{name}.wav", level * tone, RATE, subtype="FLOAT")
    peak = 0.99 * tone * (np.arange(44100) > 44000)
    peak[44050] = 1.2
    soundfile.write(tmp_path / "peak.wav", peak, RATE, subtype="FLOAT")
    files = [AudioFile(str(tmp_path / f"{name}.wav"), 44100 / RATE, RATE) for name in (*levels, "peak")]
    for added in (5, 0):
        caplog.clear()
        cache, report = open_cache(tmp_path / "cache", files)
        assert (report.added, report.rounded, report.clipped) == (added, 5, 3)
        assert "5 rounded to 16 bits, 3 clipped at full scale" in str(report)
        (told,) = [line.getMessage() for line in caplog.records if "louder than full scale" in line.getMessage()]
        share = np.mean(np.abs(20000 * tone) > 1)
        assert f"2 files louder than full scale, which 16 bits cannot hold: samples are cut ({tmp_path}" in told
        assert f"integers.wav {share:.1%}, {tmp_path}" in told
        assert "loud.wav 78.4%)" in told
    assert np.abs(cache.load(files[0], RATE).astype(int)).max() == 32768
    index = tmp_path / "cache" / str(RATE) / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "cut"}) + "\n" for row in rows))
    assert open_cache(tmp_path / "cache", files)[1].clipped == 0  # filled before it was noted


@pytest.mark.parametrize(
    ("channels", "rate", "subtype"), [(2, RATE, "PCM_16"), (1, 8000, "PCM_16"), (1, RATE, "PCM_24")]
)
def test_what_has_more_than_16_bits_is_rounded_and_has_another_fingerprint(tmp_path, channels, rate, subtype):
    files = write(tmp_path / "audio", 3, channels, rate, subtype)
    if subtype == "PCM_24":
        soundfile.write(files[0].path, np.linspace(-0.9, 0.9, 4000), rate, subtype=subtype)
    cache, report = open_cache(tmp_path / "cache", files)
    assert not cache.exact
    assert report.rounded >= 1
    assert "rounded to 16 bits" in str(report)
    plain, cached = CropDataset(files, 4.0, seed=1), CropDataset(files, 4.0, seed=1, cache=cache)
    assert data_fingerprint(plain) != data_fingerprint(cached)
    for one, two in zip(batches(plain, 3, num_steps=2), batches(cached, 3, num_steps=2)):
        clipped = one.waveform.clamp(-1, 32767 / 32768)
        assert (clipped - two.waveform).abs().max() <= 0.5 / 32768 + 1e-6  # parts are resampled to 1e-6


def test_rounding():
    samples, exact = to_int16(np.array([-1.5, -1.0, 0.0, 1 / 65536, 3 / 65536, 32767 / 32768, 1.5], np.float32))
    assert samples.tolist() == [-32768, -32768, 0, 0, 2, 32767, 32767]
    assert not exact
    assert to_int16(np.array([-1.0, 5 / 32768], np.float32))[1]


def test_nothing_is_decoded_twice_and_changes_are_seen(tmp_path, monkeypatch):
    files = write(tmp_path / "audio")
    open_cache(tmp_path / "cache", files[:4])
    _, report = open_cache(tmp_path / "cache", files)
    assert (report.added, report.changed) == (2, 0)
    soundfile.write(files[1].path, np.zeros(20_000, np.int16), RATE)
    os.utime(files[2].path, ns=(1, 1))
    cache, report = open_cache(tmp_path / "cache", files)
    assert (report.files, report.added, report.changed) == (6, 2, 2)
    assert not cache.load(files[1], RATE).any()
    monkeypatch.chdir(tmp_path)
    relative = [replace(item, path=os.path.relpath(item.path)) for item in files]
    cache, report = open_cache("cache", relative)
    assert report.added == 0
    assert np.array_equal(cache.load(relative[3], RATE), to_int16(load_audio(files[3].path))[0])


def test_damage_is_found_and_the_file_decoded(tmp_path, caplog):
    files = write(tmp_path / "audio")
    cache, _ = open_cache(tmp_path / "cache", files)
    expected = [cache.load(item, RATE).copy() for item in files]
    shard = tmp_path / "cache" / "16000" / "samples-00000.i16"
    rows = [json.loads(line) for line in (shard.parent / "index.jsonl").read_text().splitlines()[1:]]
    content = bytearray(shard.read_bytes())
    content[2 * (rows[5]["at"] + BLOCK + 7)] ^= 4  # one bit in the second block of the last clip
    shard.write_bytes(content)
    cache, report = open_cache(tmp_path / "cache", files)
    assert report.added == 0
    assert np.array_equal(cache.load(files[5], RATE, duration=4.0), expected[5][: 4 * RATE])
    assert not caplog.records
    for _ in range(2):
        assert np.array_equal(cache.load(files[5], RATE, start=3.0), expected[5][3 * RATE :])
    assert len(caplog.records) == 1
    assert f"damaged samples of {files[5].path}; decoding it" in caplog.text
    _, report = open_cache(tmp_path / "cache", files, verify=True)
    assert (report.added, report.damaged) == (1, 1)
    # A shard that was cut, and one that is gone.
    os.truncate(shard, 2 * rows[2]["at"] + 10)
    cache, report = open_cache(tmp_path / "cache", files)
    assert report.added == 4
    assert all(np.array_equal(cache.load(item, RATE), one) for item, one in zip(files, expected))
    shard.unlink()
    cache, report = open_cache(tmp_path / "cache", files)
    assert report.added == 6
    assert all(np.array_equal(cache.load(item, RATE), one) for item, one in zip(files, expected))


def test_a_damaged_or_foreign_index(tmp_path):
    files = write(tmp_path / "audio")
    open_cache(tmp_path / "cache", files)
    index = tmp_path / "cache" / "16000" / "index.jsonl"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines[:2], "{", '{"path": 3}', *lines[3:5], lines[5][:40]]))
    cache, report = open_cache(tmp_path / "cache", files)
    assert report.added == 3
    assert np.array_equal(cache.load(files[5], RATE), to_int16(load_audio(files[5].path))[0])
    index.write_text('{"format": 99}\n')
    with pytest.raises(DataError, match="format 99, expected 1"):
        open_cache(tmp_path / "cache", files)
    index.write_text("a,b\n")
    with pytest.raises(DataError, match="no index of a cache"):
        open_cache(tmp_path / "cache", files)


def test_unreadable_files_are_read_as_without_a_cache(tmp_path):
    files = write(tmp_path / "audio")
    content = Path(files[4].path).read_bytes()
    Path(files[4].path).write_bytes(content[: len(content) // 2])
    cache, report = open_cache(tmp_path / "cache", files)
    assert (report.files, report.failed) == (5, 1)
    assert not cache.exact
    with pytest.raises(AudioError, match="truncated"):
        cache.load(files[4], RATE)
    _, report = open_cache(tmp_path / "cache", files)
    assert report.added == 0


def test_no_room(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="GB free"):
        open_cache(tmp_path / "cache", [AudioFile(str(tmp_path / "long.wav"), duration=1e15)])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8192))
    with pytest.raises(DataError, match=r"8.2 kB free, 32 kB of samples are needed: .* bestrq2 cache --out"):
        open_cache(tmp_path / "cache", [AudioFile(str(tmp_path / "long.wav"), duration=1)])


def test_a_cache_that_does_not_fit_names_its_file(tmp_path, limited_files):
    files = write(tmp_path / "audio")
    with limited_files(4096), pytest.raises(OSError, match="File too large") as raised:
        open_cache(tmp_path / "cache", files, threads=1)
    assert str(raised.value.filename) == str(shard_path(tmp_path / "cache" / "16000", 0))


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("bestrq2.data.cache_build.SHARD_BYTES", 100_000)
    monkeypatch.setattr("bestrq2.data.cache_build.COMMIT_BYTES", 1)
    files = write(tmp_path / "audio")
    cache, _ = open_cache(tmp_path / "cache", files)
    assert len(list((tmp_path / "cache" / "16000").glob("*.i16"))) > 3
    for item in files:
        assert np.array_equal(cache.load(item, RATE), to_int16(load_audio(item.path))[0])


BUILD = """
import sys, time
from bestrq2.data import cache_build, collect
cache_build.COMMIT_BYTES = 100_000
original = cache_build._Writer.add
def slow(self, row, samples):
    original(self, row, samples)
    print("added", flush=True)
    time.sleep(0.05)
cache_build._Writer.add = slow
cache_build.open_cache(sys.argv[2], collect(sys.argv[1])[0])
"""


def test_a_killed_build_goes_on(tmp_path):
    files = write(tmp_path / "audio", 12)
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, tmp_path / "audio", tmp_path / "cache"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(7):
        assert process.stdout.readline() == "added\n"
    process.kill()
    process.wait()
    process.stdout.close()
    found, _ = collect(str(tmp_path / "audio"))
    cache, report = open_cache(tmp_path / "cache", found)
    assert report.files == 12
    assert 0 < report.added < 12
    for item in files:
        assert np.array_equal(cache.load(item, RATE), to_int16(load_audio(item.path))[0])


def test_two_builds_at_once(tmp_path):
    files = write(tmp_path / "audio", 12)
    command = [sys.executable, "-c", BUILD, tmp_path / "audio", tmp_path / "cache"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    added = sum(process.communicate(timeout=120)[0].count("added") for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert added == 12
    _, report = open_cache(tmp_path / "cache", files, verify=True)
    assert report.added == 0


def test_training_uses_it_and_says_so(tmp_path, capsys):
    from bestrq2.train import main

    write(tmp_path / "audio")
    options = [
        "--config",
        "best_rq2_tiny",
        "--data",
        str(tmp_path / "audio"),
        "--runs",
        str(tmp_path / "runs"),
        "train.steps=1",
        "train.device=cpu",
    ]
    options += ["train.pictures_every=0", "data.crop_seconds=1", "data.workers=0", "train.save_every=1"]
    weights = []
    for name, cache in (("plain", []), ("cached", [f"data.cache={tmp_path / 'cache'}"])):
        assert main([*options, "--name", name, *cache]) == 0
        checkpoint = max((tmp_path / "runs" / name / "checkpoints").iterdir())
        weights.append(next(checkpoint.glob("*.safetensors")).read_bytes())
    assert weights[0] == weights[1]
    assert "Cache: " in capsys.readouterr().out


@pytest.mark.parametrize("key", ["data.cache", "frozen.cache"])
def test_a_folder_that_cannot_be_made_is_named_with_its_key(tmp_path, capsys, key):
    """As when a run is resumed on a machine without its old place."""
    from bestrq2.train import main

    (tmp_path / "file").touch()
    options = ["--config", "best_rq2_tiny", "--runs", str(tmp_path / "runs"), "train.steps=1", "train.device=cpu"]
    if key == "frozen.cache":
        assert main([*options, "--name", "encoder", "train.pictures_every=0"]) == 0
        options[:2] = ["--frozen-encoder", str(tmp_path / "runs" / "encoder")]
    assert main([*options, f"{key}={tmp_path}/file/cache"]) == 2
    told = f"{key}: the folder {tmp_path}/file/cache cannot be made: Not a directory"
    assert told in capsys.readouterr().err


def test_command(tmp_path, capsys):
    from bestrq2.cache import main

    write(tmp_path / "audio", 3)
    assert main([str(tmp_path / "audio"), "--out", str(tmp_path / "cache")]) == 0
    assert "3 files" in capsys.readouterr().out
    assert main([str(tmp_path / "audio"), "--out", str(tmp_path / "cache"), "--verify"]) == 0
    assert "0 decoded now, all exact in 16 bits" in capsys.readouterr().out


def test_packaged_ogg(tmp_path):
    cache, report = open_cache(tmp_path, tiny_dataset())
    assert report.files == report.rounded == 24
    worst = max(
        np.abs(cache.load(item, RATE) - 32768 * load_audio(item.path).clip(-1, 32767 / 32768)).max()
        for item in tiny_dataset()
    )
    assert worst <= 0.501


def test_the_command_says_which_split_it_left_out(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        shutil.copy(tiny_dataset()[0].path, tmp_path / "data" / split)
    assert command.main([str(tmp_path / "data"), "--out", str(tmp_path / "cache")]) == 0
    assert "only train is used" in capsys.readouterr().out
