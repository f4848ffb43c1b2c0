"""The next batch is copied and prepared while the device works on the present one."""

import contextlib
import shutil
from types import SimpleNamespace

import pytest
import torch

from bestrq2.data import Batch
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main
from bestrq2.training.feeder import Feeder, preparation
from bestrq2.training.trainer import Trainer

from .undisturbed import TINY

OPTIONS = [
    *TINY,
    "model.encoder.drop_path=0.3",
    "model.masking.ratio=[0.3,0.7]",
    "model.mixing.share=0.5",
    "train.accumulate=1",
    "train.steps=4",
    "train.save_every=2",
    "train.log_every=1",
    "data.workers=0",
]


def result(folder):
    checkpoint = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    tensors = {**checkpoint.weights(), **checkpoint.training_state()}
    return tensors, [row["loss"] for row in read_metrics(folder) if row.get("loss")]


def test_preparing_ahead_changes_no_bit(tmp_path, monkeypatch):
    """Losses, weights, optimizer and code usage; also of a run that is resumed."""
    arguments = ["--runs", str(tmp_path), *OPTIONS]
    assert main([*arguments, "--name", "plain"]) == 0
    tensors, losses = result(tmp_path / "plain")
    prepared = []
    real = Trainer._forward_backward

    def forward(self, part, *rest):
        prepared.append(part.prepared is not None)
        return real(self, part, *rest)

    monkeypatch.setattr(Trainer, "_forward_backward", forward)
    monkeypatch.setattr(Trainer, "_preparation", lambda self: preparation(self.model, self.device, self.autocast))
    assert main([*arguments, "--name", "ahead"]) == 0
    shutil.copytree(tmp_path / "ahead", tmp_path / "half", symlinks=True)
    shutil.rmtree(list_checkpoints(tmp_path / "half" / "checkpoints")[-1])
    assert main(["--resume", str(tmp_path / "half")]) == 0
    assert prepared == [True] * (4 + 2)
    for name in ("ahead", "half"):
        found, same = result(tmp_path / name)
        assert same == losses
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_only_whole_batches_on_a_gpu_are_prepared():
    def taken(device, ranks, accumulate):
        loop = SimpleNamespace(
            device=torch.device(device),
            ranks=SimpleNamespace(size=ranks),
            settings=SimpleNamespace(accumulate=accumulate),
            model=SimpleNamespace(prepare=None),
            autocast=None,
        )
        return Trainer._preparation(loop) is not None

    assert taken("cuda", 1, 1)
    assert not taken("cpu", 1, 1)
    assert not taken("cuda", 2, 1)
    assert not taken("cuda", 1, 2)
    assert preparation(torch.nn.Linear(1, 1), torch.device("cuda"), None) is None


def batch(number):
    return Batch(torch.full((2, 8), number, dtype=torch.int16), torch.tensor([8, 8]), torch.tensor([0, 1]))


def test_order_on_a_gpu(monkeypatch):
    """Copy, conversion and preparation of batch k + 1 are queued on their own stream, and only the step k + 1 waits."""
    events, current = [], ["training"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            events.append(f"{self.name} waits for {event}")

        def record_event(self):
            return f"event {sum(e.startswith('copy') for e in events)}"

    @contextlib.contextmanager
    def stream(entered):
        before, current[0] = current[0], entered.name
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "stream", stream)

    def to(self, device, non_blocking=False):
        assert non_blocking
        events.append(f"copy on {current[0]}")
        return self

    monkeypatch.setattr(Batch, "to", to)

    def prepare(batch, step):
        events.append(f"prepare {step} on {current[0]}")
        assert batch.waveform.dtype == torch.float32
        return batch

    feeder = Feeder(iter([batch(1), batch(2)]), torch.device("cuda"), prepare, step=7)
    feeder.prefetch()
    for _ in feeder:
        events.append("step")
        feeder.prefetch()
    assert events == [
        "side waits for training",
        "copy on side",
        "prepare 7 on side",
        "training waits for event 1",
        "step",
        "copy on side",
        "prepare 8 on side",
        "training waits for event 2",
        "step",
    ]


def test_memory_that_does_not_suffice_is_left_to_the_step():
    def prepare(batch, step):
        raise torch.OutOfMemoryError("simulated: out of memory") if step < 9 else ValueError("another error")

    feeder = Feeder(iter([batch(1), batch(2)]), torch.device("cpu"), prepare, step=8)
    steps = iter(feeder)
    assert next(steps).batch.prepared is None
    with pytest.raises(ValueError, match="another error"):
        next(steps)


def test_a_batch_that_does_not_fit_is_an_error_of_its_own_step(monkeypatch):
    """The step before it can still be finished and saved."""
    to = Batch.to

    def full(self, device, non_blocking=False):
        if self.waveform[0, 0] == 2:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return to(self, device, non_blocking)

    monkeypatch.setattr(Batch, "to", full)
    feeder = Feeder(iter([batch(1), batch(2)]), torch.device("cpu"))
    steps = iter(feeder)
    next(steps)
    feeder.prefetch()
    assert isinstance(feeder.error, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        next(steps)
