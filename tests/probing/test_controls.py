"""Controls pass for a sound probe and fail for broken ones; learned layer weights find the informative layer."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from bestrq2 import probe
from bestrq2.data import iterate_clips
from bestrq2.data.scanning import tiny_dataset
from bestrq2.probing import controls, packaged_task, run_probe
from bestrq2.probing.evaluation import Rows, cross_validate
from bestrq2.probing.heads import standardise, weighted_layers
from bestrq2.probing.labels import read_clips
from bestrq2.probing.task import ProbeTask

LOG_MEL = "bestrq2.probing.controls:LogMelEncoder"


def test_log_mel_as_an_encoder(tmp_path, capsys):
    options = ["--out", str(tmp_path), "--controls", "--pooling", "mean+std", "--head", "linear"]
    assert probe.main([LOG_MEL, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("holds") == 2
    document = json.loads((tmp_path / "results.json").read_text())
    assert [rung["holds"] for rung in document["controls"]] == [True, True]
    results = document["results"]
    own, known = (results[name]["linear"] for name in ("encoder", "log-mel as an encoder"))
    assert known["balanced_accuracy"]["encoder_minus_this"]["value"] == 0
    assert all(own[metric] == {key: known[metric][key] for key in own[metric]} for metric in ("mAP", "accuracy"))


def clips():
    return list(iterate_clips(tiny_dataset()[:4], 16000))


def test_a_fault_in_the_path_is_found(monkeypatch):
    assert controls.path_difference(clips(), 16000) < 1e-3
    whole = controls.LogMelEncoder.encode_layers

    def ignoring_lengths(self, waveform, lengths=None, layers=None, **options):
        return whole(self, waveform, None, layers, **options)

    monkeypatch.setattr(controls.LogMelEncoder, "encode_layers", ignoring_lengths)
    assert controls.path_difference(clips(), 16000) > 0.1


@pytest.mark.parametrize("kind", ["classification", "retrieval"])
def test_features_that_tell_nothing_fail(kind):
    task = packaged_task(kind=kind, group="item")
    labels = read_clips(task)
    features = np.random.default_rng(0).normal(size=(len(labels), 40))
    assert controls.overfit(features, labels, task).holds
    features[:] = features[0]  # as if one clip had been encoded again and again
    assert controls.overfit(features, labels, task).holds is False


def test_every_class_is_in_the_handful():
    labels = read_clips(packaged_task())
    chosen = controls.handful(labels)
    assert len(chosen) == 16
    assert min(np.bincount(labels.targets[chosen])) >= 5


@pytest.mark.parametrize("kind", ["single", "several", "number"])
def test_weights_find_the_layer(kind):
    generator = np.random.default_rng(0)
    layers = generator.normal(size=(3, 120, 6))
    hidden = layers[1] @ generator.normal(size=(6, 3))
    targets = {"single": hidden.argmax(1), "several": hidden > 0, "number": hidden[:, 0]}[kind]
    flat = np.concatenate(layers, 1)
    train, test = standardise(flat[:80], flat[80:])
    scores, weights = weighted_layers(train, targets[:80], test, 3, 10.0, 3)
    assert weights.sum() == pytest.approx(1)
    assert weights.argmax() == 1
    assert weights[1] > 0.8
    if kind == "single":
        assert (scores.argmax(1) == targets[80:]).mean() > 0.8
        groups = np.arange(120)
        rows = Rows(targets, groups, groups % 3, ["a", "b", "c"], groups)
        known = cross_validate(flat, rows, "linear", parts=3)[0]
        assert (known.argmax(1) == targets).mean() > 0.85
    elif kind == "several":
        assert ((scores > 0.5) == targets[80:]).mean() > 0.85
    else:
        assert np.corrcoef(scores[:, 0], targets[80:])[0, 1] > 0.95


def test_readings_of_a_task():
    from bestrq2.config import load_config
    from bestrq2.models import build_encoder

    front = ["model.front_end.normalize=global", "model.front_end.mean=-47", "model.front_end.std=31"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(load_config("best_rq2_tiny", [*front, "model.encoder.width=32"]).model)
    found = [
        run_probe(encoder, packaged_task(layers=layers, combine=combine, regularisation=0.02), untrained=encoder)
        for layers, combine in (("final", "each"), ("middle", "average"), ("0,3", "concatenate"), ("all", "weighted"))
    ]
    assert all(values["balanced_accuracy"] == values["random/balanced_accuracy"] for values in found)
    assert len({values["log_mel/balanced_accuracy"] for values in found}) == 1
    with pytest.raises(ValueError, match="probe combine: expected average, concatenate or weighted"):
        run_probe(encoder, packaged_task(layers="middle"))
    with pytest.raises(ValueError, match="probe combine: expected learned weights with the linear head"):
        ProbeTask(combine="weighted", head="knn")
