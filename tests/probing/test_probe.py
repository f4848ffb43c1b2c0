"""python -m bestrq2.probe from a manifest to results beside their baselines."""

import csv
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import probe
from bestrq2.config import load_config
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.layers import LogMel
from bestrq2.models import build_model
from bestrq2.probing.features import clip_statistics, frame_statistics, log_mel_frames, pool

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
            value = entry[kind]["balanced_accuracy"]
            assert value["value"] == pytest.approx(np.mean(recalls))
            assert value["low"] <= value["value"] <= value["high"]
            assert f"{value['value']:.3f} [" in printed
            assert ("encoder_minus_this" in value) == (name != "encoder")
            assert [row["recall"] for row in entry[kind]["per_class"]] == pytest.approx(recalls)
    own, other = (document["results"][name]["knn"]["mAP"] for name in ("encoder", "log-mel statistics"))
    assert other["encoder_minus_this"]["value"] == pytest.approx(own["value"] - other["value"])
    with (tmp_path / "out" / "results.csv").open() as file:
        table = {(row["features"], row["head"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(table) == 3 * 2 * 4
    for (name, head, metric), row in table.items():
        assert float(row["value"]) == document["results"][name][head][metric]["value"]
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
    assert all(entry["linear"]["balanced_accuracy"]["value"] == 1.0 for entry in results["results"].values())
    assert probe.main(arguments) == 0
    assert "no --group" in capsys.readouterr().err
    assert probe.main([*arguments, "--group", "singer"]) == 2
    assert "no column 'singer'; its columns are ['path', 'kind', 'take']" in capsys.readouterr().err


def test_without_sklearn(encoder_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert probe.main([str(encoder_file), "--out", str(tmp_path)]) == 2
    assert "pip install 'bestrq2[probe]'" in capsys.readouterr().err


def test_statistics_by_hand():
    noise = 0.1 * np.random.default_rng(0).normal(size=16000).astype(np.float32)
    log_mel = LogMel(n_fft=1024, win_length=400, hop_length=160, num_mels=64)
    frames = log_mel(torch.from_numpy(noise)[None])[0][0].numpy()
    rows = log_mel_frames(noise, log_mel)
    expected = [frames.mean(0), frames.std(0), [np.mean(np.abs(band[1:] - band[:-1])) for band in frames.T]]
    np.testing.assert_allclose(clip_statistics(rows), np.concatenate(expected), rtol=1e-4, atol=1e-4)
    # Frames of 40 ms: the 10 ms frames 4 .. 7 lie in the second. The last one of 101 lies behind 25 of them.
    blocks = frame_statistics(rows, 25, 0.04)
    second = frames[4:8]
    change = np.abs(frames[4:8] - frames[3:7])
    np.testing.assert_allclose(blocks[1], np.concatenate((second.mean(0), second.std(0), change.mean(0))), atol=1e-3)
    # Frames of 4 ms: most have no 10 ms frame of their own and take the nearest.
    fine = frame_statistics(rows, 250, 0.004)
    np.testing.assert_allclose(fine[3, :64], frames[1], atol=1e-3)
    np.testing.assert_allclose(fine[4, :64], frames[2], atol=1e-3)
    assert pool(frames, "mean+std").shape == (128,)
