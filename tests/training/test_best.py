"""The best checkpoints are kept, and losses are compared only where they mean the same."""

import json
import signal
from pathlib import Path

import pytest
import torch
from plain_training import SMALL_MODEL

from bestrq2 import load
from bestrq2.config import load_config
from bestrq2.data import tiny_dataset
from bestrq2.runs.best import read_best
from bestrq2.runs.checkpoint import list_checkpoints, read_state
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import read_metrics
from bestrq2.train import main
from bestrq2.training.saver import Saver
from bestrq2.training.state import Snapshot

from .undisturbed import PLAIN, begin

QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=6",
    "train.batch_size=4",
    "train.save_every=2",
    "train.pictures_every=0",
    *SMALL_MODEL,
]
MASKS = "model.masking.ratio=[0.2,0.2]"
HELD = "validation.source=/clips"


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (([], None), ([HELD], "a-2"), "(validation.source: null -> /clips)"),
        (([HELD], "a-2"), ([HELD], "b-2"), "(other files in validation.source)"),
        (([HELD], "a-2"), ([HELD, "validation.clips=9"], "a-9"), "(validation.clips: 256 -> 9)"),
        (([HELD], None), (["validation.source=/others"], "b-2"), "(validation.source: /clips -> /others)"),
        (([HELD], "a-2"), ([HELD, MASKS], "a-2"), "(model.masking.ratio: [0.5, 0.5] -> [0.2, 0.2])"),
        (([], None), (["model.encoder.dropout=0.1"], None), "(model.encoder.dropout: 0.0 -> 0.1)"),
    ],
)
def test_losses_that_do_not_compare(tmp_path, caplog, first, second, told):
    """A resumed run whose losses mean something else: the lower ones before tell nothing about the later ones."""
    caplog.set_level("INFO", "bestrq2")
    run = RunFolder(tmp_path)
    starts = ((first, {1: 2.0, 2: 2.5}), (second, {3: 3.0, 4: 3.5}), (second, {5: 3.2, 6: 3.3}))
    for (options, held_out), steps in starts:
        config = load_config("best_rq2_tiny", ["train.keep_best=1", "train.keep_last=1", *options])
        saver = Saver(run, config, min(steps) - 1, held_out=held_out)
        saver.begin()
        for step, value in steps.items():
            tensors = {"t": torch.zeros(3)}
            saver.save(Snapshot(step, tensors, tensors, None, {}), value, wait=True)
        saver.close()
    assert [read_state(folder)["step"] for folder in list_checkpoints(run.checkpoints)] == [1, 3, 6]
    assert read_best(run.checkpoints) == [(3.0, 3), (3.3, 6)]
    assert (run.checkpoints / "best").resolve().name == "step-00000003"
    assert caplog.text.count("begins anew") == 1
    assert f"{told}: train.keep_best begins anew, and the best before stays (step-00000001)" in caplog.text
    options, held_out = first
    Saver(run, load_config("best_rq2_tiny", ["train.keep_best=1", *options]), 6, held_out=held_out).begin()
    assert "train.keep_best goes on from step-00000001, and the best before stays (step-00000003)" in caplog.text


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([HELD], "a-2"), (["validation.source=/moved", "validation.clips=9"], "a-2")),
        (([HELD], None), ([HELD, "validation.every=9"], "a-2")),  # of a version that wrote no digest
        (([HELD], "a-2"), ([HELD, "model.encoder.dropout=0.1", "train.batch_size=8"], "a-2")),
    ],
)
def test_losses_that_compare(tmp_path, caplog, first, second):
    caplog.set_level("INFO", "bestrq2")
    run = RunFolder(tmp_path)
    for (options, held_out), (step, value) in ((first, (1, 2.0)), (second, (2, 3.0))):
        saver = Saver(run, load_config("best_rq2_tiny", ["train.keep_best=1", *options]), step - 1, held_out=held_out)
        saver.begin()
        saver.save(Snapshot(step, {}, {}, None, {}), value, wait=True)
        saver.close()
    assert read_best(run.checkpoints) == [(2.0, 1), (3.0, 2)]
    assert "begins anew" not in caplog.text


def test_best_checkpoints_are_kept(tmp_path, caplog):
    options = ["validation.source=DATA", "validation.every=2", "validation.clips=6", "train.keep_best=1"]
    data = tmp_path / "held_out"
    data.mkdir()
    for file in tiny_dataset()[:4]:
        (data / Path(file.path).name).write_bytes(Path(file.path).read_bytes())
    options = [option.replace("DATA", str(data)) for option in options]
    # A rate that ruins the model after some good steps: the best checkpoint is then not among the last.
    spoil = ["train.steps=10", "train.keep_last=1", "optimizer.schedule=constant", "optimizer.learning_rate=0.05"]
    assert main(["--runs", str(tmp_path), "--name", "run", *QUICK, *options, *spoil, "optimizer.warmup=0"]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    rows = [row for row in read_metrics(tmp_path / "run") if row.get("validation/loss")]
    found = {int(row["step"]): float(row["validation/loss"]) for row in rows}
    assert list(found) == [0, 2, 4, 6, 8, 10]
    best = min((step for step in found if step), key=found.__getitem__)
    assert json.loads((checkpoints / "best.json").read_text()) == [
        {"value": pytest.approx(found[best], rel=1e-6), "step": best}
    ]
    assert (checkpoints / "best").resolve().name == f"step-{best:08d}"
    assert load(checkpoints / "best").output_dim == 32
    assert {path.name for path in list_checkpoints(checkpoints)} == {f"step-{best:08d}", "step-00000010"}
    (data / "another.ogg").write_bytes(Path(tiny_dataset()[9].path).read_bytes())
    with caplog.at_level("INFO"):
        assert main(["--resume", str(tmp_path / "run"), "train.steps=12"]) == 0
    assert "(other files in validation.source): train.keep_best begins anew" in caplog.text
    assert [entry["step"] for entry in json.loads((checkpoints / "best.json").read_text())] == [12]
    assert {path.name for path in list_checkpoints(checkpoints)} == {f"step-{best:08d}", "step-00000012"}


def test_best_checkpoints_are_compared_where_the_held_out_loss_was_measured(tmp_path, caplog):
    data = str(Path(tiny_dataset()[0].path).parent)  # what is trained on
    options = [f"validation.source={data}", "validation.every=4", "validation.clips=2", "train.keep_best=9"]
    saves = ["train.steps=12", "train.save_every=3", "train.keep_last=1"]
    with caplog.at_level("INFO"):
        assert main(["--runs", str(tmp_path), "--name", "run", *QUICK, *options, *saves]) == 0
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert [entry["step"] for entry in best] == [12], "3, 6 and 9 have the loss of an earlier step"
    assert "train.keep_best compares the checkpoints of every 12 steps" in caplog.text
    assert "24 of 24 clips of validation.source are also trained on" in caplog.text


STOP = """
import signal
from bestrq2.training import trainer
real = trainer.Trainer._step
def step(self, *rest):
    if self.state.progress.step + 1 in {steps}:
        signal.raise_signal(signal.SIGTERM)
    return real(self, *rest)
trainer.Trainer._step = step
"""


def test_interruptions_leave_the_best_training_loss_as_it_is(nursery, tmp_path, whole):
    """The mean over a few easy batches must not push out the best checkpoint of the run."""
    run = tmp_path / "run"
    code, output = nursery.run(tmp_path, begin(tmp_path), PLAIN + STOP.format(steps=[4]))
    assert code == 128 + signal.SIGTERM, output
    for steps in ([6, 7], [8], []):
        code, output = nursery.run(
            tmp_path, ["--resume", str(run), "train.keep_last=9"], PLAIN + STOP.format(steps=steps)
        )
        assert code == (128 + signal.SIGTERM if steps else 0), output
    scores = {
        state["step"]: state["extra"]["score"] for state in map(read_state, list_checkpoints(run / "checkpoints"))
    }
    assert {step for step, value in scores.items() if value is None} == {step for step in scores if step % 3}
    assert len(scores) > 3
    assert read_best(run / "checkpoints")[:2] == read_best(whole / "checkpoints")


def test_a_few_last_steps_are_not_the_best(tmp_path):
    def best(*options: str) -> list[int]:
        assert main(["--runs", str(tmp_path), "--name", "-".join(options), *QUICK, "train.keep_best=9", *options]) == 0
        return sorted(step for _, step in read_best(tmp_path / "-".join(options) / "checkpoints"))

    assert best("train.steps=7", "train.save_every=3") == [3, 6]
    assert best("train.steps=8", "train.save_every=3") == [3, 6, 8]
    assert best("train.steps=2", "train.save_every=9") == [2], "there is no other"
