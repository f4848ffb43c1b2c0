"""The training command end to end: learning, resuming after SIGKILL, damaged checkpoints, full disks, bad input."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from plain_training import SMALL_MODEL, leave_out

import bestrq2
from bestrq2 import train as train_module
from bestrq2.data import tiny_dataset
from bestrq2.errors import CheckpointError
from bestrq2.runs import checkpoint as checkpoint_module
from bestrq2.runs.checkpoint import list_checkpoints
from bestrq2.runs.folder import RunFolder, read_metrics
from bestrq2.train import main

QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=12",
    "train.batch_size=4",
    "train.save_every=4",
    *SMALL_MODEL,
    "model.encoder.drop_path=0.2",
    "model.encoder.dropout=0.1",
]
CURVE = ("step", "loss", "accuracy", "unigram", "perplexity", "grad_norm", "learning_rate", "mask_ratio")


def curve(run: Path):
    return [tuple(row[name] for name in CURVE) for row in read_metrics(run)]


def last_weights(run: Path):
    return checkpoint_module.read_checkpoint(list_checkpoints(run / "checkpoints")[-1]).weights()


def assert_same_weights(first: Path, second: Path):
    a, b = last_weights(first), last_weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, plain_training) -> Path:
    """With pictures, report and the measured rate, which the others leave out."""
    runs = tmp_path_factory.mktemp("runs")
    plain_training.undo()
    assert main(["--runs", str(runs), "--name", "whole", *QUICK]) == 0
    leave_out(plain_training)
    return runs / "whole"


def test_run_folder(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert {"config.yaml", "versions.json", "metrics.csv", "report.png", "tensorboard", "checkpoints"} <= names
    rows = read_metrics(uninterrupted)
    assert [int(row["step"]) for row in rows] == list(range(13))
    assert rows[0]["loss"] == ""
    assert float(rows[0]["perplexity"]) > 1  # usage is known before the first update
    for row in rows[1:]:  # wide: the rate that mfu refers to was measured in another moment of a shared machine
        assert 0 < float(row["mfu"]) < 20, row
        assert 0 <= float(row["data_wait"]) <= 1.1, row
    assert [p.name for p in list_checkpoints(uninterrupted / "checkpoints")] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]
    assert (uninterrupted / "report.png").stat().st_size > 10_000


def test_learns_above_the_unigram_baseline(tmp_path):
    overrides = ["train.steps=60", "train.batch_size=8", "train.save_every=60", "model.targets.codebook_size=64"]
    assert main(["--runs", str(tmp_path), "--name", "learn", *overrides]) == 0
    tail = read_metrics(tmp_path / "learn")[-10:]
    accuracy = sum(float(row["accuracy"]) for row in tail) / len(tail)
    unigram = sum(float(row["unigram"]) for row in tail) / len(tail)
    assert accuracy > unigram + 0.1, f"{accuracy:.3f} against {unigram:.3f}"


def test_killed_run_continues_as_if_nothing_happened(tmp_path, uninterrupted):
    """Killed by another process; ``test_faults.py`` kills at chosen moments, with and without a worker."""
    command = [sys.executable, "-m", "bestrq2.train", "--runs", str(tmp_path), "--name", "killed", *QUICK]
    process = subprocess.Popen(
        [*command, "data.workers=1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    checkpoints = tmp_path / "killed" / "checkpoints"
    # between the saves of step 4, which is written beside training, and of step 8
    while len(read_metrics(tmp_path / "killed")) < 7 or not list_checkpoints(checkpoints):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list_checkpoints(checkpoints)[-1].name != "step-00000012", "killed too late for this test"
    assert main(["--resume", str(tmp_path / "killed")]) == 0
    assert curve(tmp_path / "killed") == curve(uninterrupted)
    assert_same_weights(tmp_path / "killed", uninterrupted)


def test_sigterm_saves_and_says_how_to_continue(tmp_path, uninterrupted):
    command = [sys.executable, "-m", "bestrq2.train", "--runs", str(tmp_path), "--name", "stopped", *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while len(read_metrics(tmp_path / "stopped")) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "continue with: bestrq2 train --resume" in output
    assert main(["--resume", str(tmp_path / "stopped")]) == 0
    assert curve(tmp_path / "stopped") == curve(uninterrupted)
    assert_same_weights(tmp_path / "stopped", uninterrupted)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("model.safetensors", "flipped"), ("training.safetensors", "truncated"), ("state.json", "flipped")],
)
def test_damaged_last_checkpoint_is_passed_over_and_said(tmp_path, uninterrupted, capsys, name, damage):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(uninterrupted), str(run)], check=True)
    file = run / "checkpoints" / "step-00000012" / name
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b'"step": 12') if name == "state.json" else len(content) // 2
        flip = b'"stop": 12' if name == "state.json" else bytes([content[middle] ^ 1])
        file.write_bytes(content[:middle] + flip + content[middle + len(flip) :])
    assert main(["--resume", str(run)]) == 0
    captured = capsys.readouterr()
    assert "skipped a damaged checkpoint" in captured.err
    assert "from step 8" in captured.out
    assert curve(run) == curve(uninterrupted)
    assert_same_weights(run, uninterrupted)


def test_full_disk_at_save(tmp_path, monkeypatch, capsys):
    def full(tensors, path, *_, **__):
        Path(path).write_bytes(b"partial")
        raise OSError(28, "No space left on device")

    real = checkpoint_module.save_file
    calls = []

    def save(tensors, path, *rest, **options):
        calls.append(path)
        return (full if len(calls) > 2 else real)(tensors, path, *rest, **options)

    monkeypatch.setattr(checkpoint_module, "save_file", save)
    assert main(["--runs", str(tmp_path), "--name", "full", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "could not save the checkpoint of step 12" in error
    assert "No space left on device" in error
    assert "B needed" in error
    left = [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()]
    assert left == ["step-00000004"]
    checkpoint_module.read_checkpoint(tmp_path / "full" / "checkpoints" / "step-00000004")
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "full")]) == 0


def test_own_folder_with_bad_files(tmp_path, capsys):
    data = tmp_path / "audio" / "nested: [a] = {b}"
    data.mkdir(parents=True)
    clips = [file.path for file in tiny_dataset()][:4]
    for number, (rate, suffix) in enumerate([(44100, "wav"), (16000, "flac"), (8000, "ogg"), (22050, "mp3")]):
        samples, _ = soundfile.read(clips[number])
        soundfile.write(data / f"clip {number}.{suffix}", np.stack([samples, samples], 1), rate)
    (data / "empty.wav").touch()
    (data / "noise.flac").write_bytes(os.urandom(2000))
    (data / "notes.txt").write_text("not audio")
    soundfile.write(data / "blip.wav", np.zeros(50), 16000)
    assert main(["--runs", str(tmp_path / "runs"), "--config", "best_rq2_tiny", "--data", str(data), *QUICK]) == 0
    captured = capsys.readouterr()
    assert "4 files" in captured.out
    for reason in ("3 skipped", "empty", "not decodable", "too short"):
        assert reason in captured.err
    (run,) = (tmp_path / "runs").iterdir()
    assert len((run / "skipped.txt").read_text().splitlines()) == 3


def test_nan_audio_is_skipped_counted_and_reported(tmp_path, capsys):
    data = tmp_path / "audio"
    data.mkdir()
    for number in range(3):
        samples, rate = soundfile.read(tiny_dataset()[number].path)
        if number == 1:
            samples[16000] = np.nan
        soundfile.write(data / f"{number}.wav", samples, rate, subtype="FLOAT")
    assert (
        main(["--runs", str(tmp_path), "--name", "nan", "--config", "best_rq2_tiny", "--data", str(data), *QUICK]) == 0
    )
    assert int(read_metrics(tmp_path / "nan")[-1]["skipped_files"]) > 0
    assert "not finite" in (tmp_path / "nan" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "EMPTY"], "no usable audio|no audio"),
        (["--data", "MISSING"], "does not exist"),
        (["validation.source=/missing", "train.steps=1"], "validation.source: /missing does not exist"),
        (["--data", "COLUMNS"], "column"),
        (["--config", "unknown"], "expected a YAML file or one of"),
        (["train.stepps=3"], "did you mean 'train.steps'"),
        (["train.device=quantum"], "train.device: 'quantum' cannot be used"),
        (["--resume", "MISSING"], "expected a run folder"),
        (["--resume"], "no run with a checkpoint"),
        (["--config", "best_rq2_smal"], "did you mean 'best_rq2_small'"),
        (["model.front_end.normalize=global", "model.targets.normalize=global"], "already standardises"),
        (["data.crop_seconds=0.01"], "data: "),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("name,seconds\na.wav,1\n")
    places = {
        "EMPTY": str(tmp_path / "empty"),
        "MISSING": str(tmp_path / "missing"),
        "COLUMNS": str(tmp_path / "columns.csv"),
    }
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main(["--runs", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "there"], "--name there: .*there exists; use --resume .*there to continue it"),
        (["--name", "a/b"], "--name a/b: expected a name without folders; --runs FOLDER"),
        (["--name", ".."], "expected a name without folders"),
        (["--name", "l\udce4t"], r"--name, --runs: expected names in UTF-8, got .*l\\xe4t"),
        (["--runs", "FILE"], "--runs .*file: .*file is not a folder"),
        (["--runs", "FILE/below"], "--runs .*below: .*file is not a folder"),
        (["train.device=gpu"], "train.device: 'gpu' cannot be used: .*; expected auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_what_ends_a_run_is_refused_before_the_data_are_read(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(train_module, "open_dataset", lambda config: pytest.fail("the data were read"))
    (tmp_path / "runs" / "there").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments = [text.replace("FILE", str(tmp_path / "file")) for text in arguments]
    assert main(["--runs", str(tmp_path / "runs"), *arguments]) == 2
    assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_resumed_by_its_name(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").touch()
    assert RunFolder.existing(tmp_path, "one").path == tmp_path / "one"
    assert RunFolder.existing(tmp_path / "elsewhere", str(tmp_path / "one")).path == tmp_path / "one"


def test_a_name_in_place_of_an_encoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"did you mean runs/one\?"):
        bestrq2.load("one")
    with pytest.raises(CheckpointError, match="this is a recipe, which is trained first: bestrq2 train --config best_"):
        bestrq2.load("best_rq2_small")
    (tmp_path / "a.onnx").touch()
    with pytest.raises(CheckpointError, match=r"a\.onnx: expected a run folder or a checkpoint, got an exported graph"):
        bestrq2.load("a.onnx")


def test_changed_data_is_refused(tmp_path, capsys):
    data = tmp_path / "audio"
    data.mkdir()
    for number in range(3):
        samples, rate = soundfile.read(tiny_dataset()[number].path)
        soundfile.write(data / f"{number}.wav", samples, rate)
    assert (
        main(["--runs", str(tmp_path), "--name", "run", "--config", "best_rq2_tiny", "--data", str(data), *QUICK]) == 0
    )
    (data / "2.wav").unlink()
    assert main(["--resume", str(tmp_path / "run"), "train.steps=14"]) == 2
    told = capsys.readouterr().err
    assert "training data changed" in told
    assert "2 files instead of 3; the content of 1 is gone" in told
    # A change that decides over no clip is not what is told, nor is another place.
    assert main(["--resume", str(tmp_path / "run"), "train.steps=14", "data.workers=1"]) == 2
    assert "2 files instead of 3; the content of 1 is gone" in capsys.readouterr().err
    moved = data.rename(tmp_path / "moved")
    assert main(["--resume", str(tmp_path / "run"), "train.steps=14"]) == 2
    assert f"name the new place: bestrq2 train --resume {tmp_path / 'run'} --data PLACE" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "run"), "train.steps=14", "--data", str(moved)]) == 2
    told = capsys.readouterr().err
    assert f"data.source: {data} -> {moved}: 2 files instead of 3; the content of 1 is gone. Restore them" in told
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert main(["--resume", str(tmp_path / "run"), "--data", str(tmp_path / "typo")]) == 2
    assert "the data of this run" not in capsys.readouterr().err


def test_non_finite_steps_stop_with_advice(tmp_path, capsys):
    blow_up = ["optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null", "train.max_bad_steps=2"]
    assert main(["--runs", str(tmp_path), "--name", "bad", *QUICK, *blow_up, "optimizer.warmup=0"]) == 2
    assert "Lower optimizer.learning_rate" in capsys.readouterr().err


def test_weights_that_are_not_finite_push_out_no_checkpoint(tmp_path, capsys):
    run = tmp_path / "bad"
    often = ["train.save_every=1", "train.keep_last=2", "train.keep_best=0", "optimizer.max_grad_norm=null"]
    assert main(["--runs", str(tmp_path), "--name", "bad", *QUICK, *often, "train.steps=2"]) == 0
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    huge = ["optimizer.learning_rate=1e38", "optimizer.warmup=0", "optimizer.schedule=constant", "train.steps=20"]
    assert main(["--resume", str(run), *huge]) == 2
    told = capsys.readouterr().err
    assert "weights are not finite any more (" in told
    assert f"--resume {run}" in told
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert main(["--resume", str(run), "optimizer.learning_rate=1e-3", "train.steps=3"]) == 0


def test_steps_that_are_not_finite_push_out_no_checkpoint(tmp_path, capsys, monkeypatch):
    """Weights of 1e30 are finite, and nothing that is computed with them is."""
    run = tmp_path / "bad"
    often = ["train.save_every=1", "train.keep_last=2", "optimizer.warmup=0", "optimizer.schedule=constant"]
    assert main(["--runs", str(tmp_path), "--name", "bad", *QUICK, *often, "train.steps=2"]) == 0
    assert main(["--resume", str(run), "optimizer.learning_rate=1e30", "train.steps=8"]) == 0
    told = capsys.readouterr()
    assert (
        "the last 5 steps were not finite and changed nothing: the weights are those of step 3" in told.err + told.out
    )
    kept = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    assert kept == [2, 3, 8]
    # The count goes on: 5 and 2 more.
    assert main(["--resume", str(run), "optimizer.learning_rate=1e-3", "train.steps=20", "train.max_bad_steps=7"]) == 2
    assert "7 steps in a row were not finite. Lower optimizer.learning_rate" in capsys.readouterr().err
    assert all((run / "checkpoints" / f"step-{step:08d}").is_dir() for step in kept)


def test_existing_name_is_refused(tmp_path, uninterrupted, capsys):
    assert main(["--runs", str(uninterrupted.parent), "--name", "whole", *QUICK]) == 2
    assert "use --resume" in capsys.readouterr().err


def test_bf16_autocast_and_compile(tmp_path):
    # Encoder and predictor are compiled once each. A second length or dropped paths, which would compile them again,
    # are in test_compilation.py, without inductor.
    options = ["train.precision=bf16", "train.compile=true", "train.steps=1", "model.encoder.drop_path=0"]
    assert main(["--runs", str(tmp_path), "--name", "bf16", *QUICK, *options]) == 0
    assert all(np.isfinite(float(row["loss"])) for row in read_metrics(tmp_path / "bf16")[1:])


def test_interrupted_before_the_first_step(tmp_path, monkeypatch, capsys):
    def train(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "start", train)
    assert main(["--runs", str(tmp_path), "--name", "s2", *QUICK]) == 130
    run = tmp_path / "s2"
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"nothing was saved yet, {run} is removed; the same command starts again",
        "interrupted",
    ]
    assert not run.exists()
