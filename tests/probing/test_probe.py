"""python -m bestrq2.probe from a manifest to results beside their baselines."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import probe
from bestrq2.config import load_config
from bestrq2.data import AudioFile
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.models import build_model
from bestrq2.probing.features import log_mel_statistics, pool

SMALL = ["model.front_end.mean=-47", "model.front_end.std=31", "model.encoder.depth=1", "model.encoder.width=64"]


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(1)
    config = load_config("best_rq2_tiny", SMALL)
    write_encoder_file(path, config, build_model(config).state_dict())
    return path


def test_packaged_clips(encoder_file, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert probe.main([str(encoder_file), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "24 clips, 20 groups" in printed
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["classes"] == ["env", "music", "speech"]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(document["results"]) == {"encoder", "random initialisation", "log-mel statistics"}
    for name, entry in document["results"].items():
        for kind in ("linear", "knn"):
            recalls = [
                np.mean([row[f"{name} {kind}"] == label for row in rows if row["label"] == label])
                for label in document["classes"]
            ]
            value = entry[kind]
            assert value["balanced_accuracy"] == pytest.approx(np.mean(recalls))
            assert value["low"] <= value["balanced_accuracy"] <= value["high"]
            assert f"{value['balanced_accuracy']:.3f} [" in printed
    assert (tmp_path / "out" / "confusion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_own_manifest(encoder_file, tmp_path, capsys):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    rows = ["path,kind,take"]
    for i in range(12):
        time = np.arange(8000) / 16000
        tone = np.sin(2 * np.pi * (200 if i % 2 else 3000) * time) + 0.1 * rng.normal(size=8000)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * tone, 16000)
        rows.append(f"{i}.wav,{'low' if i % 2 else 'high'},{i // 2}")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows += ["broken.wav,low,9", "0.wav,,9"]
    manifest = tmp_path / "clips.csv"
    manifest.write_text("\n".join(rows))
    arguments = [
        str(encoder_file),
        str(manifest),
        "--label",
        "kind",
        "--out",
        str(tmp_path / "out"),
        "--pooling",
        "mean+std",
    ]
    assert probe.main([*arguments, "--group", "take"]) == 0
    printed = capsys.readouterr()
    assert "broken.wav" in printed.err
    assert "1 rows without a label" in printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["clips"] == 12
    assert all(entry["linear"]["balanced_accuracy"] == 1.0 for entry in results["results"].values())
    assert probe.main(arguments) == 0
    assert "no --group" in capsys.readouterr().err
    assert probe.main([*arguments, "--group", "singer"]) == 2
    assert "no column 'singer'; its columns are ['path', 'kind', 'take']" in capsys.readouterr().err


def test_without_sklearn(encoder_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert probe.main([str(encoder_file), "--out", str(tmp_path)]) == 2
    assert "pip install 'bestrq2[probe]'" in capsys.readouterr().err


def test_statistics_by_hand(tmp_path):
    noise = 0.1 * np.random.default_rng(0).normal(size=16000)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    (row,) = log_mel_statistics([AudioFile(str(tmp_path / "a.wav"))])
    from bestrq2 import LogMel

    frames = LogMel(n_fft=1024, win_length=400, hop_length=160, num_mels=64)(torch.tensor(noise)[None])[0][0].numpy()
    expected = [frames.mean(0), frames.std(0), [np.mean(np.abs(band[1:] - band[:-1])) for band in frames.T]]
    np.testing.assert_allclose(row, np.concatenate(expected), rtol=1e-4, atol=1e-4)
    assert pool(frames, "mean+std").shape == (128,)
    assert Path(tmp_path / "a.wav").exists()
