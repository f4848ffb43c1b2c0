"""Training on a GPU: five steps, resume and evaluation of a ViT and a Conformer; losses near those of a CPU."""

import csv

import pytest
import torch

from bestrq2 import train
from bestrq2.training.trainer import Trainer

SMALL = ["train.batch_size=4", "train.save_every=5", "train.pictures_every=1000", "train.log_every=1"]


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")}


def run(folder, name, recipe, device, *settings):
    arguments = ["--config", recipe, "--runs", str(folder), "--name", name, f"train.device={device}", *SMALL, *settings]
    assert train.main(arguments) == 0
    return folder / name


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq2_conformer_tiny", "best_rq_vit_tiny"])
def test_five_steps_resume_and_evaluation(recipe, tmp_path):
    on_gpu = losses(run(tmp_path, "gpu", recipe, "cuda", "train.steps=5", "train.precision=fp32"))
    on_cpu = losses(run(tmp_path, "cpu", recipe, "cpu", "train.steps=1", "train.precision=fp32"))
    assert on_gpu[1] == pytest.approx(on_cpu[1], rel=0.02)
    assert train.main(["--resume", str(tmp_path / "gpu"), "train.steps=8"]) == 0
    longer = losses(tmp_path / "gpu")
    assert len(longer) == 8
    assert all(torch.isfinite(torch.tensor(loss)) for loss in longer.values())
    mixed = losses(run(tmp_path, "bf16", recipe, "cuda", "train.steps=2", "train.precision=bf16"))
    assert mixed[1] == pytest.approx(on_cpu[1], rel=0.05)


@pytest.mark.gpu
def test_preparing_ahead_changes_no_loss(tmp_path, monkeypatch):
    settings = ["train.steps=6", "train.precision=fp32", "model.masking.ratio=[0.3,0.7]"]
    ahead = losses(run(tmp_path, "ahead", "best_rq2_tiny", "cuda", *settings))
    monkeypatch.setattr(Trainer, "_preparation", lambda self: None)
    plain = losses(run(tmp_path, "plain", "best_rq2_tiny", "cuda", *settings))
    assert ahead == pytest.approx(plain, rel=1e-4)  # atomic additions of the backward pass have no fixed order
