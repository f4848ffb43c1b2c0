"""The log of the library: silent unless asked, on a terminal through the commands."""

import io
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bestrq2.console import ConsoleHandler, console_log, progress_bar
from bestrq2.train import main

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["train.steps=2", "train.batch_size=2", "train.pictures_every=0", "model.encoder.width=16", "train.device=cpu"]
SMALL = ["model.encoder.heads=2", "model.encoder.depth=1", "model.predictor.depth=1", "model.predictor.width=16"]


def test_messages_go_to_output_and_warnings_to_error(capsys):
    logger = logging.getLogger("bestrq2.somewhere")
    with console_log():
        with console_log():  # a command that calls another does not say things twice
            logger.info("100 % done")
        logger.warning("the disk is slow")
        logger.debug("not shown")
    logger.info("after the command")
    output = capsys.readouterr()
    assert output.out == "100 % done\n"
    assert output.err == "warning: the disk is slow\n"
    assert not any(isinstance(handler, ConsoleHandler) for handler in logging.getLogger("bestrq2").handlers)


def test_output_that_was_closed_raises_nothing(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with console_log():
        logging.getLogger("bestrq2").info("x")


def test_progress_in_a_file_is_not_a_line_for_every_step(capsys):
    for _ in progress_bar(range(20), miniters=1):
        time.sleep(0.02)
    assert capsys.readouterr().err.count("\r") <= 3


def test_progress_without_standard_error(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]


def test_a_program_that_trains_by_library_calls_can_be_silent(tmp_path):
    """Everything below the entry points is logged, so one line silences it."""
    code = f"""
import logging
from bestrq2.config import load_config
from bestrq2.runs.folder import RunFolder
from bestrq2.train import seeded_model
from bestrq2.training.distributed import Ranks
from bestrq2.training.open_data import fill_statistics, open_dataset
from bestrq2.training.trainer import Trainer
from pathlib import Path

logging.getLogger("bestrq2").setLevel(logging.CRITICAL)
config = load_config("best_rq2_tiny", {[*QUICK, *SMALL, "model.predictor.heads=2"]!r})
dataset = open_dataset(config)
config = fill_statistics(config, dataset)
run = RunFolder.create(Path({str(tmp_path)!r}), "run", config)
Trainer(config, seeded_model(config), dataset, run, Ranks.start(), None).train()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_the_command_still_says_what_it_does(tmp_path, capsys):
    assert main(["--runs", str(tmp_path), *QUICK, *SMALL, "model.predictor.heads=2"]) == 0
    assert "Done: 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["info", "error"])
def test_levels(level, capsys):
    with console_log():
        getattr(logging.getLogger("bestrq2"), level)("%s of %d", level, 3)
    output = capsys.readouterr()
    assert (output.out, output.err) == (("info of 3\n", "") if level == "info" else ("", "error: error of 3\n"))
