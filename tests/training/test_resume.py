"""Resuming compares, says what changes, refuses what cannot change, and only then writes."""

import dataclasses
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bestrq2.config import ConfigError, config_from_dict, load_config, with_overrides
from bestrq2.data import tiny_dataset
from bestrq2.durability import flush_file, flush_folder
from bestrq2.runs.changes import changed_keys, check_resume
from bestrq2.runs.checkpoint import list_checkpoints
from bestrq2.runs.folder import RunFolder
from bestrq2.train import main
from bestrq2.training.interrupt import StopSignal

QUICK = [
    "train.batch_size=2",
    "data.workers=0",
    "train.pictures_every=0",
    "data.crop_seconds=1",
    "train.save_every=1",
    "train.log_every=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    assert main(["--runs", str(runs), "--name", "run", "train.steps=2", *QUICK]) == 0
    return runs / "run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.width=64", "model.encoder.width: expected 128, with which this run began, got 64"),
        ("model.targets.seed=9", "model.targets.seed: expected .* it cannot change on resume"),
        ("model.front_end.hop_length=320", "model.front_end.hop_length: expected"),
        ("train.seed=3", "train.seed: expected .*, with which this run began, got 3"),
        ("train.steps=1", "train.steps: expected at least 2, which this run has done, got 1"),
        ("train.device=cuda:9", "train.device: 'cuda:9' cannot be used"),
        ("train.accumulate=99", "train.batch_size: expected .* train.accumulate=99"),
        ("optimizer.betas=[2,3]", "optimizer: Invalid beta"),
        ("optimizer.epsilon=-1", "optimizer.epsilon: expected 0 or more"),
        ("data.crop_seconds=2", "the clips of every step would be others .* data.crop_seconds: 1.0 -> 2.0"),
        ("frozen.source=elsewhere", "frozen.source: expected null"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_written(run, capsys, override, message):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    steps = [] if override.startswith("train.steps") else ["train.steps=3"]
    assert main(["--resume", str(run), *steps, override]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_changes_is_listed(run, capsys):
    assert main(["--resume", str(run), "train.steps=3", "optimizer.learning_rate=0.005", "train.keep_last=2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Changed on resume: ")]
    names = [line.removeprefix("Changed on resume: ").split(":")[0] for line in lines]
    assert names == [
        "optimizer.learning_rate",
        "train.steps",
        "train.keep_last",
        "the learning rate of the next step",
    ]
    assert "train.steps: 2 -> 3" in lines[1]
    assert "learning_rate: 0.005" in (run / "config.yaml").read_text()


def test_what_is_not_used_is_told_again(tmp_path, capsys):
    """A start told it, a resume did not, be it of the run or of what is new."""

    def notes():
        return [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]

    started = ["train.steps=1", "optimizer.cooldown=0.3", "model.targets.seed_candidates=2"]
    started += ["model.targets.fit_clips=9", "model.front_end.mean=-47", "model.front_end.std=31"]
    assert main(["--runs", str(tmp_path), "--name", "run", *started, *QUICK]) == 0
    assert notes() == ["optimizer.cooldown"]
    resumed = ["--resume", str(tmp_path / "run"), "train.steps=2", "probe.rows=mean"]
    assert main(resumed) == 0
    assert notes() == ["probe.rows", "optimizer.cooldown"]


def test_keys_of_the_users_recipe_that_are_not_used_are_told_again(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("based_on: best_rq_conformer_tiny\nmodel: {predictor: {depth: 3}}\n")
    options = ["--runs", str(tmp_path), "--config", str(recipe), "--name", "run", *QUICK, "model.encoder.depth=1"]
    assert main([*options, "train.steps=1"]) == 0
    note = "note: model.predictor.depth is not used with model.name=best_rq, which has no predictor"
    assert capsys.readouterr().out.splitlines().count(note) == 1
    for step in (2, 3):
        assert main(["--resume", str(tmp_path / "run"), f"train.steps={step}"]) == 0
        assert capsys.readouterr().out.splitlines().count(note) == 1
        (tmp_path / "run" / "chosen.json").write_text(
            '["train.steps", "model.predictor.depth", "model.predictor.depth"]'
        )
    for text in ("", "{}", "[1]"):
        (tmp_path / "run" / "chosen.json").write_text(text)
        assert main(["--resume", str(tmp_path / "run")]) == 0
        assert note not in capsys.readouterr().out


def test_a_replaced_file_is_named(tmp_path, capsys):
    folder = tmp_path / "audio"
    folder.mkdir()
    for item in tiny_dataset()[:3]:
        shutil.copyfile(item.path, folder / Path(item.path).name)
    names = sorted(path.name for path in folder.iterdir())
    options = ["--config", "best_rq2_tiny", "--data", str(folder), *QUICK]
    options += ["model.front_end.mean=-47", "model.front_end.std=31"]
    assert main(["--runs", str(tmp_path), "--name", "run", "train.steps=1", *options]) == 0
    shutil.copyfile(folder / names[0], folder / names[1])  # both have two seconds
    assert main(["--resume", str(tmp_path / "run"), "train.steps=2"]) == 0
    error = capsys.readouterr().err
    assert (
        f"warning: the content of {folder / names[1]} changed since the checkpoint was written (3 of 3 files" in error
    )
    again = ["--runs", str(tmp_path), "--name", "run", "--resume", "--config", "conformer.yaml", "train.steps=2"]
    assert main(again) == 0
    error = capsys.readouterr().err
    assert "changed since" not in error
    assert f"note: the configuration of {tmp_path / 'run'} is used, not --config conformer.yaml" in error


def test_changes_by_key():
    before = load_config("best_rq2_tiny", ["model.front_end.mean=0", "model.front_end.std=1"])
    after = with_overrides(before, ["train.batch_size=4", "model.masking.ratio=[0.2,0.3]"])
    assert changed_keys(before, after) == {
        "model.masking.ratio": (before.model.masking.ratio, [0.2, 0.3]),
        "train.batch_size": (before.train.batch_size, 4),
    }
    assert any("other clips make up a step" in line for line in check_resume(before, after, 10))
    assert check_resume(before, config_from_dict(dataclasses.asdict(before)), 10) == []
    with pytest.raises(ConfigError, match=r"model\.predictor\.depth"):
        check_resume(before, with_overrides(before, ["model.predictor.depth=7"]), 10)


def test_what_becomes_of_the_average_is_told():
    def told(old: float, new: float) -> list[str]:
        before, after = (load_config("best_rq2_tiny", [f"train.ema_decay={decay}"]) for decay in (old, new))
        return check_resume(before, after, 10)

    assert told(0.0, 0.9) == ["train.ema_decay: 0.0 -> 0.9 (the average begins with the present weights)"]
    assert told(0.9, 0.0) == ["train.ema_decay: 0.9 -> 0.0 (the average is not kept any more)"]
    assert told(0.9, 0.99) == ["train.ema_decay: 0.9 -> 0.99"]


@pytest.mark.parametrize("override", ["train.device=cuda:9", "train.accumulate=99", "optimizer.betas=[2,3]"])
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, override, capsys):
    assert main(["--runs", str(tmp_path), "train.steps=2", *QUICK, override]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_start_leaves_the_name_free(tmp_path, monkeypatch, capsys):
    def full(path, text, **options):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    config = load_config("best_rq2_tiny")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            RunFolder.create(tmp_path, "run", config)
    assert list(tmp_path.iterdir()) == []
    run = RunFolder.create(tmp_path, "run", config)
    before = (run.path / "config.yaml").read_bytes()
    (run.path / "metrics.csv").touch()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            RunFolder.create(tmp_path, "run", config, reuse=True)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoints",
        "chosen.json",
        "config.yaml",
        "metrics.csv",
    ]
    assert (run.path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_handler_only_notes_the_signal(name, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)  # any output would fail
    monkeypatch.setattr("sys.stdout", None)
    number = signal.Signals[name]
    with StopSignal() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)  # an echo
    assert (stop.requested, stop.name, stop.exit_code) == (True, name, 128 + number)


def test_signals_that_were_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_warning_that_is_repeated_ends_nothing_at_once(monkeypatch):
    monkeypatch.setattr("bestrq2.training.interrupt.DEBOUNCE_SECONDS", -1)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGXCPU)
        signal.raise_signal(signal.SIGXCPU)  # the next second of processor time
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    assert stop.exit_code == 128 + signal.SIGXCPU


def test_handlers_of_the_user_for_warnings_are_kept():
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGUSR1)
        assert (stop.requested, got) == (False, [1])
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_spares_the_workers(tmp_path, number):
    """As a closed terminal or a scheduler sends it; Python's tracker of semaphores is in the group, too."""
    command = [sys.executable, "-m", "bestrq2", "train", "--runs", str(tmp_path), "--name", "r", "train.steps=5000"]
    command += ["data.workers=1", *(x for x in QUICK if not x.startswith(("data.workers", "train.save_every")))]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=root, start_new_session=True
    ) as process:
        try:
            metrics = tmp_path / "r" / "metrics.csv"
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 2):
                assert process.poll() is None
                threading.Event().wait(0.1)
            os.killpg(process.pid, number)
            printed = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + number, printed
    assert "Traceback" not in printed
    assert "error" not in printed
    assert len(list_checkpoints(tmp_path / "r" / "checkpoints")) == 1


def test_training_in_another_thread(tmp_path):
    codes = []
    worker = threading.Thread(
        target=lambda: codes.append(main(["--runs", str(tmp_path), "--name", "t", "train.steps=1", *QUICK]))
    )
    worker.start()
    worker.join()
    assert codes == [0]


def test_ctrl_c_into_a_closed_pipe_saves(tmp_path):
    command = [sys.executable, "-m", "bestrq2", "train", "--runs", str(tmp_path), "--name", "r", "train.steps=5000"]
    command += [setting for setting in QUICK if "save_every" not in setting]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root) as process:
        while b"Targets:" not in process.stdout.readline():
            pass
        process.stdout.close()  # `| tee log` is gone
        while not (tmp_path / "r" / "metrics.csv").read_bytes().count(b"\n") > 2:
            assert process.poll() is None
            threading.Event().wait(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 129
    assert len(list_checkpoints(tmp_path / "r" / "checkpoints")) == 1


def test_file_systems_that_cannot_flush(monkeypatch, tmp_path):
    (tmp_path / "a").write_text("a")

    def refuse(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.fsync", refuse)
    flush_file(tmp_path / "a")
    flush_folder(tmp_path)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    flush_folder(tmp_path)
    with pytest.raises(OSError, match="No space"):
        flush_file(tmp_path / "a")
