"""Packing: training from shards is training from the files, bit for bit; all is written, or nothing."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bestrq2.data import (
    AudioFile,
    CropDataset,
    DataError,
    batches,
    collect,
    load_audio,
    tiny_dataset,
    write_manifest,
)
from bestrq2.data.files import split_address
from bestrq2.data.fingerprint import data_fingerprint
from bestrq2.data.shards import pack
from bestrq2.shards import main


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _clip(number=0) -> bytes:
    return Path(tiny_dataset()[number].path).read_bytes()


def _mixed_folder(folder, write_wav):
    """Audio of several formats, lengths, rates and domains."""
    for item in tiny_dataset()[::2]:
        path = folder / item.domain / os.path.basename(item.path)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(Path(item.path).read_bytes())
    write_wav(f"{folder.name}/speech/deep/long 1.5.wav", 7.3)
    write_wav(f"{folder.name}/short.wav", 0.6)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (70001, 2))
    soundfile.write(folder / "music" / "noise.flac", noise, 22050)
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("options", [{}, {"join_short": True}, {"domain_weights": {"speech": 2, "music": 1, "env": 1}}])
def test_training_data_from_shards_is_that_of_the_files(tmp_path, write_wav, options):
    """Order, crops, replacements and joins bit for bit, from a folder, its manifest, and shards of both."""
    folder = _mixed_folder(tmp_path / "audio", write_wav)
    files, _ = collect(folder)
    if "domain_weights" in options:
        files = [item for item in files if item.domain]
    write_manifest(tmp_path / "m.csv", files)
    packed = pack(files, tmp_path / "shards", max_bytes=300_000)
    assert len(packed.shards) > 2
    assert not packed.skips
    datasets = [
        CropDataset(found, 1.7, seed=4, **options)
        for found in (files, collect(tmp_path / "m.csv")[0], collect(tmp_path / "shards")[0], packed.files)
    ]
    datasets.append(CropDataset(collect(tmp_path / "shards" / "manifest.csv")[0], 1.7, seed=4, **options))
    assert len({data_fingerprint(dataset) for dataset in datasets[:2]}) == 1
    streams = [list(batches(dataset, 5, num_steps=9)) for dataset in datasets]
    streams.append(list(batches(datasets[2], 5, num_steps=9, workers=2)))
    for stream in streams[1:]:
        for batch, gold in zip(stream, streams[0], strict=True):
            assert torch.equal(batch.waveform, gold.waveform)
            assert torch.equal(batch.lengths, gold.lengths)
            assert torch.equal(batch.index, gold.index)
            assert batch.domains == gold.domains


def test_packing_keeps_what_is_known(tmp_path, write_wav):
    folder = _mixed_folder(tmp_path / "audio", write_wav)
    files = [AudioFile(item.path, item.duration, item.sampling_rate, "d", "l ü") for item in collect(folder)[0]]
    packed = pack(files, tmp_path / "shards", prefix="train", max_bytes=10**9)
    assert [path.name for path in packed.shards] == ["train-000000.tar"]
    assert [(item.duration, item.sampling_rate, item.domain, item.label) for item in packed.files] == [
        (item.duration, item.sampling_rate, "d", "l ü") for item in files
    ]
    with tarfile.open(packed.shards[0]) as tar:
        names = tar.getnames()
    assert "speech/deep/long 1_5.wav" in names
    assert all(name.split("/")[-1].count(".") == 1 for name in names)
    sums = (tmp_path / "shards" / "SHA256SUMS").read_text()
    assert subprocess.run(["sha256sum", "-c"], input=sums, text=True, cwd=tmp_path / "shards").returncode == 0
    again = pack(files, tmp_path / "again", prefix="train", max_bytes=10**9)
    assert again.shards[0].read_bytes() == packed.shards[0].read_bytes()
    from_shards = pack(packed.files, tmp_path / "repacked", max_bytes=200_000)
    for item, gold in zip(from_shards.files, files, strict=True):
        np.testing.assert_array_equal(load_audio(item.path), load_audio(gold.path))


def test_size_of_shards(tmp_path):
    """Never above the limit, names of any length counted, and as full as it allows."""
    files = []
    for number in range(40):
        path = tmp_path / "in" / ("x" * (number * 5)) / f"{number}.ogg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_clip(number % 24)[: 3000 + 211 * number])
        files.append(AudioFile(str(path), 1.0, 16000))
    packed = pack(files, tmp_path / "out", max_bytes=71_680)
    sizes = [shard.stat().st_size for shard in packed.shards]
    assert max(sizes) <= 71_680
    assert min(sizes[:-1]) > 71_680 - 30_000
    assert len(pack(files[:3], tmp_path / "single", max_bytes=1).shards) == 3
    assert len(pack(files[:3], tmp_path / "whole", max_bytes=float("inf")).shards) == 1
    with pytest.raises(ValueError, match="max_bytes must be positive, got nan"):
        pack(files[:3], tmp_path / "none", max_bytes=float("nan"))


def test_names_that_would_collide(tmp_path):
    files = []
    for name in ("a.b.ogg", "a_b.ogg", "x/a.ogg", "x/a.flac"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_clip())
        files.append(AudioFile(str(path), 2.0, 16000))
    packed = pack(files, tmp_path / "out")
    inside = [split_address(item.path)[1] for item in packed.files]
    assert inside == ["a_b.ogg", "a_b~2.ogg", "x/a.ogg", "x/a~2.flac"]


def test_packing_all_or_nothing(tmp_path, monkeypatch):
    files = tiny_dataset()[:4]
    absent = AudioFile(str(tmp_path / "absent.wav"), 1.0)
    packed = pack([*files, absent], tmp_path / "one")
    assert [str(skip) for skip in packed.skips] == [f"{absent.path}: missing (No such file or directory)"]
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        pack(files, tmp_path / "one")
    with pytest.raises(DataError, match=r"no file could be packed \(1 file tried\)"):
        pack([absent], tmp_path / "two")
    with pytest.raises(ValueError, match="prefix"):
        pack(files, tmp_path / "two", prefix="a/b")

    def interrupted(item):
        if item is files[2]:
            raise KeyboardInterrupt
        return b"x", ".wav"

    monkeypatch.setattr("bestrq2.data.shards._content", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(files, tmp_path / "two")
    monkeypatch.setattr("bestrq2.data.shards._content", lambda item: (b"x", ".wav"))
    monkeypatch.setattr("bestrq2.data.shards.open_tar_member", lambda *_: io.BytesIO(b"y"))
    with pytest.raises(DataError, match="does not read back as it was written"):
        pack(files, tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_shard_that_does_not_fit_is_named(tmp_path, limited_files):
    with limited_files(4096), pytest.raises(OSError, match="File too large") as raised:
        pack(tiny_dataset()[:2], tmp_path / "out")
    assert raised.value.filename == str(tmp_path / "out" / "shards-000000.tar")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, write_wav, capsys):
    folder = _mixed_folder(tmp_path / "audio", write_wav)
    (folder / "broken.wav").write_bytes(b"RIFF")
    assert main([str(folder), "--out", str(tmp_path / "out"), "--max-bytes", "3e5"]) == 0
    printed = capsys.readouterr().out
    assert "15 files" in printed
    assert "read back and equal; 1 skipped: 1 not decodable; 1 ignored: 1 .txt" in printed
    assert len((tmp_path / "out" / "skipped.csv").read_text().splitlines()) == 2
    assert len(collect(tmp_path / "out")[0]) == 15
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "bestrq2.data.shards", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_what_the_json_beside_a_clip_says_of_splits_and_durations(tmp_path):
    """A test clip was trained on, and milliseconds were taken for seconds, by which clips are drawn."""

    def shard(name, *rows):
        with tarfile.open(tmp_path / name, "w") as tar:
            for number, row in enumerate(rows):
                for suffix, content in (("wav", _clip(number)), ("json", json.dumps(row).encode())):
                    entry = tarfile.TarInfo(f"{number}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))

    shard("a-0.tar", {"split": "train"}, {"split": "test"})
    shard("a-1.tar", {"Split": "dev"}, {})
    files, report = collect(str(tmp_path / "a-{0..1}.tar"))
    assert [item.path for item in files] == [f"{tmp_path}/a-0.tar::0.wav", f"{tmp_path}/a-1.tar::1.wav"]
    assert "(1 train, 1 test, 1 validation) only train is used" in report.notes[0]
    assert len(collect(str(tmp_path / "a-*.tar"), split=None)[0]) == 4
    shard("b.tar", {"duration": 2000})
    with pytest.raises(DataError, match=r"0\.wav has 2\.000 s, the list says 2000, which looks like milliseconds"):
        collect(tmp_path / "b.tar")
