"""The training command with a Conformer: learning, exact resuming, and what comes out of embed and load."""

import shutil

import numpy as np
import pytest
import torch

from bestrq2 import embed, load
from bestrq2.data import tiny_dataset
from bestrq2.models import ConformerEncoder
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main

pytestmark = pytest.mark.usefixtures("plain_training")

RECIPES = ["best_rq_conformer_tiny", "best_rq2_conformer_tiny"]
QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=6",
    "train.batch_size=4",
    "train.save_every=3",
    "model.encoder.width=32",
    "model.encoder.depth=2",
    "model.encoder.dropout=0.1",
    "model.encoder.drop_path=0.2",
    "model.encoder.conformer.conv_mode=chunk",
    "model.encoder.conformer.conv_norm=batch_norm",
    "model.encoder.conformer.chunk_training=speechbrain",
]
CURVE = ("step", "loss", "accuracy", "perplexity", "grad_norm", "mask_ratio")


def curve(run):
    return [tuple(row[name] for name in CURVE) for row in read_metrics(run)]


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert main(["--runs", str(runs), "--name", "whole", "--config", request.param, *QUICK]) == 0
    return runs / "whole"


def test_resumed_run_repeats_the_uninterrupted_one(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(list_checkpoints(copy / "checkpoints")[-1])
    assert main(["--resume", str(copy)]) == 0
    assert curve(copy) == curve(run)
    first, second = (read_checkpoint(list_checkpoints(r / "checkpoints")[-1]).weights() for r in (run, copy))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_embed_and_load(run, tmp_path):
    paths = [str(file.path) for file in tiny_dataset()[:2]]
    assert embed.main([str(run), *paths, "--out", str(tmp_path / "out")]) == 0
    encoder = load(run)
    assert isinstance(encoder, ConformerEncoder)
    assert not encoder.training
    clips = np.load(tmp_path / "out" / "clips.npy")
    assert clips.shape == (2, 64)  # mean and deviation
    assert np.isfinite(clips).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_learns_above_the_unigram_baseline(recipe, tmp_path):
    overrides = ["train.steps=90", "train.batch_size=8", "train.save_every=90"]
    overrides += ["model.encoder.depth=2", "optimizer.learning_rate=0.003", "model.front_end.mean=-47.5"]
    command = ["--runs", str(tmp_path), "--name", "learn", "--config", recipe, "model.front_end.std=31.8"]
    assert main([*command, *overrides]) == 0
    tail = read_metrics(tmp_path / "learn")[-10:]
    accuracy = sum(float(row["accuracy"]) for row in tail) / len(tail)
    unigram = sum(float(row["unigram"]) for row in tail) / len(tail)
    print(f"{recipe}: masked accuracy {accuracy:.3f} against {unigram:.3f}")
    assert accuracy > unigram + 0.1


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_autocast(recipe, tmp_path):
    options = ["train.precision=bf16", "train.steps=2", "model.encoder.depth=1"]
    assert main(["--runs", str(tmp_path), "--name", "bf16", "--config", recipe, *QUICK, *options]) == 0
    assert all(np.isfinite(float(row["loss"])) for row in read_metrics(tmp_path / "bf16")[1:])
