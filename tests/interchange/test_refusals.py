"""Clips that an encoder of others refuses are left out, the others are used."""

import csv

import numpy as np
import pytest
import soundfile

from bestrq2 import embed, probe, train
from bestrq2.config import load_config
from bestrq2.data import AudioFile
from bestrq2.interchange import open_encoder
from bestrq2.interchange.refusals import encode_or_skip
from bestrq2.models import build_encoder
from bestrq2.runs.metrics import read_metrics

CODE = """
import torch
class Frames(torch.nn.Module):
    sampling_rate, output_dim, hop_size_in_ms = 16000, 3, 20.0
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(320, 3)
    def METHOD(self, audio, lengths=None):
        if REFUSES:
            raise ValueError(f"expected other audio, got {audio.shape[1]} samples")
        features = self.layer(audio[:, : audio.shape[1] // 320 * 320].unflatten(1, (-1, 320))).detach()
        return RESULT
"""
OWN = ("encode", "features, torch.tensor([features.shape[1]])")
XARES = ("forward", "features")
SHORT = "audio.shape[1] < 2000"
ALL = "audio.shape[1] not in (16000, 48000)"  # but the noise that the interface is checked with


def source(tmp_path, refuses=SHORT, interface=OWN):
    code = CODE.replace("REFUSES", refuses).replace("METHOD", interface[0]).replace("RESULT", interface[1])
    (tmp_path / "frames.py").write_text(code)
    return f"{tmp_path}/frames.py:Frames"


@pytest.fixture
def folder(tmp_path):
    """Eight clips, the third of 0.1 s, and a table with their labels."""
    folder = tmp_path / "audio"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = ["path,label,part"]
    for number in range(8):
        noise = 0.1 * generator.normal(size=1600 if number == 2 else 20000)
        soundfile.write(folder / f"{number}.wav", noise, 16000)
        rows.append(f"{folder}/{number}.wav,{'ab'[number // 2 % 2]},{number}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("interface", [OWN, XARES])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_embed(folder, tmp_path, capsys, interface, format):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    command = [source(tmp_path, SHORT, interface), str(folder), "--out", str(out), "--format", format]
    assert embed.main([*command, "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    assert "7 files embedded, 1 skipped" in printed.out
    refusal = "2.wav: refused by the encoder (ValueError: expected other audio, got 1600 samples)"
    assert f"warning: skipped {folder}/{refusal}" in printed.err
    if format == "npy":
        rows = list(csv.DictReader((out / "index.csv").read_text().splitlines()))
        assert [row["name"] for row in rows] == [f"{number}.wav" for number in range(8) if number != 2]
        for row in rows:
            waveform = soundfile.read(row["path"], dtype="float32")[0]
            expected = open_encoder(command[0])
            assert np.load(out / row["features"]).shape == (len(waveform) // 320, expected.output_dim)


def test_embed_of_an_encoder_that_refuses_everything(folder, tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    for out in ("out", "kept"):
        assert embed.main([source(tmp_path, ALL), str(folder), "--out", str(tmp_path / out)]) == 2
        error = capsys.readouterr().err
        assert "error: the encoder fails on every clip (8 clips tried): " in error
        assert "0.wav: refused by the encoder (ValueError: expected other audio, got 20000 samples)" in error
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "kept").exists()  # it was there before


def test_probe(folder, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out = ["--out", str(tmp_path / "out"), "--head", "knn"]
    assert probe.main([source(tmp_path), str(tmp_path / "labels.csv"), *out]) == 0
    printed = capsys.readouterr()
    assert "7 clips, 7 groups" in printed.out
    assert "2.wav: refused by the encoder (ValueError: expected other audio, got 1600 samples)" in printed.err
    assert "1 row unreadable: refused by the encoder left out" in printed.err
    assert probe.main([source(tmp_path, ALL), str(tmp_path / "labels.csv"), *out, "--overwrite"]) == 2
    assert "the encoder fails on every clip (8 clips tried)" in capsys.readouterr().err


def test_frozen_encoder(folder, tmp_path, capsys, caplog, plain_training):
    """Windows of a clip that the encoder takes are kept."""
    long = 0.1 * np.random.default_rng(1).normal(size=2 * 32000 + 1700)  # windows of 2 s, the last one is short
    soundfile.write(folder / "long.wav", long, 16000)
    quick = ["train.steps=1", "train.batch_size=4", "data.crop_seconds=2", "data.workers=0"]
    quick += [f"data.source={folder}", "model.front_end.mean=-45", "model.front_end.std=20"]
    options = ["--runs", str(tmp_path), *quick, "--frozen-encoder"]
    assert train.main([*options, source(tmp_path), "--name", "some"]) == 0
    assert "2.wav: refused by the encoder (1 of 1 window, ValueError: expected other audio" in caplog.text
    assert "long.wav: refused by the encoder (1 of 3 windows, ValueError: expected other audio" in caplog.text
    assert len(read_metrics(tmp_path / "some")) == 1
    for name, shards in (("none", "1 of 1"), ("again", "0 of 1")):  # computed, and found again
        arguments = [*options, source(tmp_path, ALL), "--name", name, f"frozen.cache={tmp_path / 'cache'}"]
        assert train.main(arguments) == 2
        printed = capsys.readouterr()
        assert f"{shards} shards computed" in printed.out
        assert "the frozen encoder fails on every clip (9 clips tried)" in printed.err


def test_which_errors_are_of_a_clip(tmp_path):
    encoder = open_encoder(source(tmp_path))
    clip = (AudioFile("a.wav"), np.zeros(1600, np.float32))

    def fail(error):
        def encode(clips):
            raise error

        return encode

    for error in (RuntimeError("CUDA error: device-side assert"), MemoryError(), OSError("gone")):
        with pytest.raises(type(error)):
            encode_or_skip(encoder, [clip], fail(error))
    assert encode_or_skip(encoder, [clip], fail(IndexError("")))[0].detail == "IndexError"
    with pytest.raises(IndexError):  # a fault of ours
        encode_or_skip(build_encoder(load_config("best_rq2_tiny").model, 1.0), [clip], fail(IndexError("")))
