"""The stream command: live features of a file equal those of encode, and bad input is one clear line."""

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import load, stream, train
from bestrq2.data import load_audio, tiny_dataset

QUICK = ["train.steps=2", "train.batch_size=2", "model.encoder.depth=2", "model.front_end.mean=-47.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, plain_training):
    runs = tmp_path_factory.mktemp("runs")
    chunks = ["model.encoder.conformer.conv_mode=chunk", "model.encoder.conformer.chunk_training=speechbrain"]
    window = ["model.encoder.conformer.chunk_size=8", "model.encoder.conformer.left_context=16"]
    for name, recipe, more in (
        ("streaming", "best_rq_conformer_tiny", [*chunks, *window]),
        ("full", "best_rq_conformer_tiny", []),
        ("vit", "best_rq2_tiny", []),
    ):
        command = ["--runs", str(runs), "--name", name, "--config", recipe, "model.front_end.std=31.8"]
        assert train.main([*command, *QUICK, *more]) == 0
    return runs


def test_live_features_equal_encode(runs, tmp_path, capsys):
    path, out = str(tiny_dataset()[0].path), tmp_path / "features of s2.npy"
    capsys.readouterr()
    assert stream.main([str(runs / "streaming"), path, "--out", str(out.with_suffix("")), "--piece", "0.07"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"written to {out}"
    encoder = load(runs / "streaming")
    with torch.no_grad():
        expected, _ = encoder.encode(torch.from_numpy(load_audio(path))[None])
    np.testing.assert_allclose(np.load(out), expected[0].numpy(), atol=1e-5, rtol=1e-5)
    shown = [line for line in lines if "real-time factor" in line]
    assert len(shown) == -(-expected.shape[1] // 8)
    assert lines[-2].startswith(f"{expected.shape[1]} frames of")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "AUDIO"], "cannot stream exactly: attention to the whole sequence"),
        (["full", "AUDIO", "--chunk-size", "8"], 'conv_mode "full" looks ahead'),
        (["vit", "AUDIO"], "this is a ViTEncoder: train one, bestrq2 train --config streaming_conformer"),
        (["nothing", "AUDIO"], "no such file or folder"),
        (["streaming", "missing.wav"], "missing.wav"),
        (["streaming", "AUDIO", "--piece", "0"], "pieces of at least one sample"),
        (["streaming", "AUDIO", "--piece", "inf"], "pieces of at least one sample"),
        (["streaming", "AUDIO", "--chunk-size", "0"], "chunk_size must be at least 1"),
        (["streaming", "AUDIO", "--out", "nowhere/x.npy"], "the folder nowhere does not exist"),
        (["streaming", "AUDIO", "--out", "nowhere.npy/"], "expected the name of a file"),
    ],
)
def test_bad_input_is_one_clear_line(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.npy").mkdir()
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 16000)
    run, *rest = [str(tmp_path / "a.wav") if argument == "AUDIO" else argument for argument in arguments]
    assert stream.main([str(runs / run), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
