"""A small run with everything that must survive, and what "as if nothing had happened" means."""

from pathlib import Path

import torch

from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.metrics import read_metrics

TINY = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.encoder.depth=1",
    "model.encoder.dropout=0.1",
    "model.predictor.width=32",
    "model.predictor.hidden=48",
    "model.predictor.depth=1",
    "train.batch_size=4",
    "train.accumulate=2",
    "train.precision=bf16",
    "train.ema_decay=0.9",
    "train.steps=9",
    "train.save_every=3",
    "train.keep_last=2",
    "train.keep_best=1",
    "train.pictures_every=0",
]
# In front of every child: nothing that takes time and says nothing about faults.
PLAIN = """
from bestrq2.training import trainer
trainer.peak_flops = lambda *_: (1e12, "not measured")
trainer.save_report = lambda *_: None
"""
# Not the same twice: times, memory, and what is averaged since the process last wrote a row.
OF_THE_MACHINE = {"audio_seconds_per_second", "data_wait", "mfu", "memory_gib", "elapsed_seconds", "padding_share"}


def begin(folder: Path, *options: str) -> list[str]:
    return ["--runs", str(folder), "--name", "run", *TINY, *options]


def curve(run: Path):
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_metrics(run)]


def assert_same(run: Path, whole: Path):
    """Loss curve, and of the checkpoints that both keep the weights, their average, the optimizer and the counters."""
    assert curve(run) == curve(whole)
    found = list_checkpoints(run / "checkpoints")
    assert found[-1].name == "step-00000009"
    for folder in found:
        if not (whole / "checkpoints" / folder.name).is_dir():
            continue
        first, second = read_checkpoint(folder), read_checkpoint(whole / "checkpoints" / folder.name)
        for kind in ("weights", "averaged_weights", "training_state"):
            a, b = getattr(first, kind)(), getattr(second, kind)()
            assert a.keys() == b.keys()
            for name in a:
                assert torch.equal(a[name], b[name]), f"{folder.name}: {kind} {name}"
        ours, theirs = first.extra, second.extra
        assert ours | {"elapsed_seconds": 0} == theirs | {"elapsed_seconds": 0}
    hidden = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not hidden


def assert_equal_weights(run: Path, whole: Path):
    first, second = (read_checkpoint(list_checkpoints(p / "checkpoints")[-1]) for p in (run, whole))
    for kind in ("weights", "averaged_weights", "training_state"):
        a, b = getattr(first, kind)(), getattr(second, kind)()
        assert all(torch.equal(a[name], b[name]) for name in a | b)
