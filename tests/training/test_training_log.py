"""Rows of a run: nothing before the log is opened, and rates of training alone."""

from bestrq2.config import load_config
from bestrq2.data import CropDataset, tiny_dataset
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import read_metrics
from bestrq2.train import seeded_model
from bestrq2.training import training_log
from bestrq2.training.distributed import Ranks
from bestrq2.training.step import StepTotals
from bestrq2.training.trainer import Trainer

from .undisturbed import TINY


def make_trainer(folder):
    config = load_config("best_rq2_tiny", [*TINY, "train.health_every=0"])
    return Trainer(config, seeded_model(config), CropDataset(tiny_dataset()), RunFolder(folder), Ranks.start(), None)


def test_a_trainer_writes_nothing_before_it_trains(tmp_path):
    make_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rates_leave_out_what_was_measured_beside_training(tmp_path, monkeypatch):
    log = make_trainer(tmp_path).log
    log.open(-1)
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    totals = StepTotals(audio_seconds=12.0, waited=1.0, flops=2e12)
    for began in (100.0, 107.0):  # the second interval begins with the row of the first
        now = began
        if began == 100.0:
            log.begin()
        now = began + 1.0
        with log.paused():
            now = began + 4.0
        now = began + 7.0
        log.add(totals)
        log.write_step(totals, learning_rate=0.1, grad_norm=2.0)
    log.close()
    for row in read_metrics(tmp_path):
        assert (row["audio_seconds_per_second"], row["data_wait"], row["mfu"]) == ("3", "0.25", "0.5")
