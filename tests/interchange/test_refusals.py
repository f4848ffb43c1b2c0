"""Clips that an encoder of others refuses are left out, the others are used."""

import csv

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import embed, probe, train
from bestrq2.config import load_config
from bestrq2.data import AudioFile
from bestrq2.interchange import open_encoder
from bestrq2.interchange.refusals import FeatureError, encode_or_skip
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
        if UNUSABLE and audio.shape[1] < 2000:
            return FOUND
        features = self.layer(audio[:, : audio.shape[1] // 320 * 320].unflatten(1, (-1, 320))).detach()
        return RESULT
"""
OWN = ("encode", "features, torch.tensor([features.shape[1]])")
XARES = ("forward", "features")
SHORT = "audio.shape[1] < 2000"
ALL = "audio.shape[1] not in (16000, 48000)"  # but the noise that the interface is checked with


UNUSABLE = {  # what an encoder gives for the short clip
    "the encoder's features of it are not finite": ("torch.full((1, 5, 3), torch.nan)", "torch.tensor([5])"),
    "the encoder gives no frame for it": ("torch.zeros(1, 0, 3)", "torch.tensor([0])"),
}


def source(tmp_path, refuses=SHORT, interface=OWN, found=None):
    code = CODE.replace("UNUSABLE", str(found is not None)).replace("FOUND", ", ".join(found or ["None"]))
    code = code.replace("REFUSES", refuses).replace("METHOD", interface[0]).replace("RESULT", interface[1])
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


@pytest.mark.parametrize("fault", UNUSABLE)
def test_unusable_features_of_one_clip(folder, tmp_path, capsys, caplog, fault, plain_training):
    """Features that are not finite, or no frame, are a refusal of that clip by every command."""
    encoder = source(tmp_path, "False", OWN, UNUSABLE[fault])
    assert embed.main([encoder, str(folder), "--out", str(tmp_path / "out"), "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    assert "7 files embedded, 1 skipped" in printed.out
    assert f"2.wav: refused by the encoder ({fault})" in printed.err
    quick = ["train.steps=1", "train.batch_size=4", "data.crop_seconds=2", "data.workers=0"]
    quick += [f"data.source={folder}", "model.front_end.mean=-45", "model.front_end.std=20"]
    assert train.main(["--runs", str(tmp_path), *quick, "--frozen-encoder", encoder, "--name", "some"]) == 0
    assert f"2.wav: refused by the encoder (1 of 1 window, {fault})" in caplog.text
    capsys.readouterr()
    pytest.importorskip("sklearn")
    table = ["--out", str(tmp_path / "probe"), "--head", "knn"]
    assert probe.main([encoder, str(tmp_path / "labels.csv"), *table]) == 0
    printed = capsys.readouterr()
    assert "7 clips, 7 groups" in printed.out
    assert f"2.wav: refused by the encoder ({fault})" in printed.err


def test_features_of_our_own_that_are_not_finite(folder, tmp_path):
    encoder = build_encoder(load_config("best_rq2_tiny").model, 1.0)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(FeatureError, match=r"0\.wav: the encoder's features of it are not finite"):
        list(embed.embed(encoder, [AudioFile(str(folder / "0.wav"))]))


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
