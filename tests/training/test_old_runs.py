"""Runs that earlier versions wrote still load and resume; ``tests/fixtures/run_0_1_0`` was made by version 0.1.0."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import bestrq2
from bestrq2.data import load_audio, tiny_dataset
from bestrq2.runs.checkpoint import list_checkpoints
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main

OLD = Path(__file__).resolve().parent.parent / "fixtures" / "run_0_1_0"


@pytest.fixture
def old_run(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "runs" / "old"))


def test_features_are_those_of_the_version_that_trained(old_run):
    expected = json.loads((OLD / "expected_features.json").read_text())
    path = next(file.path for file in tiny_dataset() if file.path.endswith(expected["file"]))
    with torch.no_grad():
        features, _ = bestrq2.load(old_run).encode(torch.as_tensor(load_audio(path, 16000))[None])
    torch.testing.assert_close(
        features[0, expected["frames"]], torch.tensor(expected["features"]), atol=2e-4, rtol=2e-4
    )


def test_averaged_weights_load(old_run):
    folder = list_checkpoints(old_run / "checkpoints")[-1]
    averaged = bestrq2.load(folder / "ema.safetensors").state_dict()
    last = bestrq2.load(old_run).state_dict()
    assert averaged.keys() == last.keys()
    assert any(not torch.equal(averaged[name], last[name]) for name in last)


def test_training_goes_on(old_run):
    before = read_metrics(old_run)
    assert main(["--resume", str(old_run), "train.steps=6"]) == 0
    rows = read_metrics(old_run)
    assert rows[-1]["step"] == "6"
    assert set(before[0]) <= set(rows[0])  # no column of an old log is lost
    assert [{name: row[name] for name in before[0]} for row in rows[: len(before)]] == before
    assert list_checkpoints(old_run / "checkpoints")[-1].name == "step-00000006"
