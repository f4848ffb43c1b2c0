"""Values of a step that are read after the next one was queued, with stand-ins for what only a GPU does."""

import pytest
import torch

from bestrq2.data import Batch
from bestrq2.runs.bad_batches import load_bad_batch
from bestrq2.runs.best import BEST
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.train import main
from bestrq2.training import trainer
from bestrq2.training.late import Reading
from bestrq2.training.step import StepTotals
from bestrq2.training.trainer import Trainer

from .undisturbed import TINY, curve

SETTINGS = ["train.ema_decay=0", "train.log_every=3", "train.save_every=4", "train.steps=9", "train.precision=fp32"]


def run(folder, name, *options):
    assert main(["--runs", str(folder), "--name", name, *TINY, *SETTINGS, *options]) == 0
    return folder / name


@pytest.fixture
def late(monkeypatch):
    """Updates are queued; returns the numbers of the steps that are read late, filled while a run goes on."""
    found = []

    def step_if_finite(optimizer, values):
        if values.isfinite().all():
            optimizer.step()

    def start(reading):
        found.append(reading.number)

    def queue():
        monkeypatch.setattr(Trainer, "_queues", lambda self: True)
        monkeypatch.setattr(trainer, "step_if_finite", step_if_finite)
        monkeypatch.setattr(trainer.Reading, "start", start)
        return found

    return queue


def assert_equal_weights(run, other):
    first, second = (read_checkpoint(list_checkpoints(path / "checkpoints")[-1]) for path in (run, other))
    for a, b in ((first.weights(), second.weights()), (first.training_state(), second.training_state())):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_same_run(tmp_path, late):
    """Curve, weights and the value that checkpoints are ranked by are those of values read at once."""
    at_once = run(tmp_path, "at-once")
    numbers = late()
    later = run(tmp_path, "later")
    assert numbers == [1, 2, 5, 7], "all but those that are logged (3, 6, 9) or saved (4, 8)"
    assert curve(later) == curve(at_once)
    assert_equal_weights(later, at_once)
    best = [(path / "checkpoints" / BEST).read_text() for path in (at_once, later)]
    assert best[0] == best[1]


def test_a_step_that_is_not_finite(tmp_path, late, monkeypatch, caplog):
    """It is reported with its own number and batch, its update is left out, and the next step is read at once."""
    forward_backward = Trainer._forward_backward

    def poisoned(self, part, step, *rest):
        output = forward_backward(self, part, step, *rest)
        if step == 4:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(Trainer, "_forward_backward", poisoned)
    at_once = run(tmp_path, "at-once")
    first = caplog.text
    caplog.clear()
    numbers = late()
    later = run(tmp_path, "later")
    assert numbers == [1, 2, 5, 7]
    for text in (first, caplog.text):
        assert "step 5: loss nan" in text
    assert curve(later) == curve(at_once)
    assert_equal_weights(later, at_once)
    for path in (at_once, later):  # the checkpoint after the step is ranked by the steps around it
        scores = {
            folder.name: read_checkpoint(folder).extra["score"] for folder in list_checkpoints(path / "checkpoints")
        }
        assert 0 < scores["step-00000008"] < 20
    kept = [load_bad_batch(path / "bad_batches" / "step-00000005-rank-0.safetensors") for path in (at_once, later)]
    assert torch.equal(kept[0].index, kept[1].index)
    assert torch.equal(kept[0].waveform, kept[1].waveform)


@pytest.mark.parametrize("option", ["train.ema_decay=0.9", "train.precision=fp16", "train.log_every=1"])
def test_what_needs_the_values_at_once(option, tmp_path, late):
    numbers = late()
    run(tmp_path, "run", option, "train.steps=3")
    assert numbers == []


def test_what_was_prepared_is_not_kept():
    batch = Batch(torch.ones(1, 8), torch.tensor([8]), torch.tensor([0]), prepared=torch.ones(4))
    reading = Reading(1, batch, StepTotals(), torch.arange(5.0), queued=True)
    reading.start()
    assert reading.batch.prepared is None
    assert reading.batch.waveform is batch.waveform
    assert reading.read() == [0, 1, 2, 3, 4]
