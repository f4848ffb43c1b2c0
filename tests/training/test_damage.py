"""Damage to the files of a run: read-only folders, torn and foreign files, other settings. Nothing is lost or run."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bestrq2.errors import CheckpointError
from bestrq2.runs.checkpoint import _digest, _sha256, find_checkpoint, list_checkpoints, newest_intact, read_checkpoint
from bestrq2.runs.metrics import read_metrics
from bestrq2.train import main
from bestrq2.training.trainer import Trainer

from .undisturbed import PLAIN, TINY, assert_equal_weights, assert_same, begin, curve

pytestmark = pytest.mark.fault


AS_A_USER = """
import ctypes
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc.capget(header, sets)
sets[0] &= ~0b110  # not even the superuser may write what is read-only: CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
libc.capset(header, sets)
from bestrq2.train import main
for arguments in {commands}:
    print("exit code", main(arguments), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are of Linux")
def test_read_only_folder(half, nursery, tmp_path):
    def state():
        return sorted((str(path), path.lstat().st_mtime_ns) for path in half.rglob("*"))

    folders = [path for path in [half.parent, half, *half.rglob("*")] if path.is_dir() and not path.is_symlink()]
    files = [path for path in half.rglob("*") if path.is_file()]
    log = tmp_path / "child.log"
    log.touch()
    for path in [*files, *folders]:
        path.chmod(0o555)
    before = state()
    resume = ["--resume", str(half)]
    commands = [resume, [*resume, "train.steps=12"], ["--runs", str(half.parent), "--name", "new", *TINY]]
    try:
        code, output = nursery.run(tmp_path, code=PLAIN + AS_A_USER.format(commands=commands))
    finally:
        for path in folders:
            path.chmod(0o755)
    assert code == 0, output
    assert output.count("exit code 2") == 3, output
    # The superuser is told by the attempt, others by access(2) before it.
    parent = "cannot make a run folder" if os.geteuid() == 0 else f"{half.parent} cannot be written"
    for message in ("the log cannot be written", "config.yaml cannot be written", parent):
        assert message in output, output
    assert "Permission denied" in output
    assert "Traceback" not in output
    assert state() == before


@pytest.mark.parametrize("damage", ["gone", "empty", "half", "binary", "not a mapping"])
def test_damaged_configuration(half, whole, damage, capfd):
    """A configuration cut short would be valid YAML with defaults for the rest."""
    path = half / "config.yaml"
    text = path.read_text()
    path.write_bytes(
        {
            "gone": b"",
            "empty": b"",
            "half": text[: text.index("train:") + 60].rsplit("\n", 1)[0].encode(),
            "binary": bytes(300) + b"\xff\xfe",
            "not a mapping": b"- a\n- b\n",
        }[damage]
    )
    if damage == "gone":
        path.unlink()
    assert main(["--resume", str(half)]) == 0
    assert "config.yaml is damaged or cut short" in capfd.readouterr().err
    assert_same(half, whole)


@pytest.mark.parametrize(("folder", "message"), [(True, "checkpoints is gone"), (False, "holds no checkpoint: bring")])
def test_deleted_checkpoints(half, folder, message, capfd):
    """The run does not begin again over its curves."""
    for step in list_checkpoints(half / "checkpoints"):
        shutil.rmtree(step)
    if folder:
        shutil.rmtree(half / "checkpoints")
    log = (half / "metrics.csv").read_bytes()
    assert main(["--resume", str(half)]) == 2
    assert message in capfd.readouterr().err
    assert (half / "metrics.csv").read_bytes() == log


def test_an_older_checkpoint_is_not_taken_in_silence(whole, tmp_path, caplog):
    shutil.copytree(whole, run := tmp_path / "run", symlinks=True)
    newest = list_checkpoints(run / "checkpoints")[-1]
    os.truncate(newest / "model.safetensors", 100)
    with caplog.at_level("WARNING", "bestrq2"):
        found = find_checkpoint(run)
    assert found.folder != newest
    assert f"skipped a damaged checkpoint: {newest / 'model.safetensors'}: damaged" in caplog.text
    assert f"{found.folder.name} is used" in caplog.text


def test_torn_log_and_damaged_notes(half, whole, capfd):
    log = half / "metrics.csv"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:8]) + b"\xff\xfe\x00garbage\n" + lines[8][:30])
    (half / "checkpoints" / "best.json").write_text("[{")
    (half / "versions.json").write_text("{")
    (half / "checkpoints" / "best").unlink()
    for name in (".writing-step-00000007", ".discarded-step-00000003"):
        (half / "checkpoints" / name).mkdir()
        (half / "checkpoints" / name / "model.safetensors").write_bytes(b"half")
    assert main(["--resume", str(half)]) == 0
    assert "metrics.csv is damaged: its readable rows are kept, and the file as metrics.damaged.csv" in (
        capfd.readouterr().err
    )
    assert_same(half, whole)
    for name in ("best.json", "best/state.json"):
        assert (half / "checkpoints" / name).read_text() == (whole / "checkpoints" / name).read_text() or "/" in name
    assert os.readlink(half / "checkpoints" / "best") == os.readlink(whole / "checkpoints" / "best")


class Marker:
    """Unpickling it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "ema.safetensors", "state.json"])
def test_foreign_pickle_is_refused_without_running_it(half, whole, tmp_path, file, capfd):
    """Even with a state.json that vouches for it."""
    for folder in list_checkpoints(half / "checkpoints"):
        torch.save({"state": Marker(str(tmp_path / "executed"))}, folder / file)
        if file != "state.json":
            state = json.loads((folder / "state.json").read_text())["state"]
            state["files"][file] = _sha256(folder / file)
            (folder / "state.json").write_text(json.dumps({"sha256": _digest(state), "state": state}))
    if file == "ema.safetensors":  # what training needs of it is in training.safetensors
        with pytest.raises(CheckpointError, match=r"ema\.safetensors: cannot be read"):
            find_checkpoint(folder / file).weights()
    else:
        assert main(["--resume", str(half)]) == 2
        error = capfd.readouterr().err
        assert f"{file}: cannot be read" in error
        assert "Traceback" not in error
    assert not (tmp_path / "executed").exists()
    with open(folder / file, "rb") as opened, pytest.raises((pickle.UnpicklingError, RuntimeError, AttributeError)):
        torch.load(opened, weights_only=True)  # it is one indeed


def test_other_shapes_are_refused_by_their_key(half, capfd):
    assert main(["--resume", str(half), "model.encoder.width=64", "model.encoder.hidden=96"]) == 2
    error = capfd.readouterr().err
    assert "model.encoder.width: expected 32, with which this run began, got 64" in error
    assert "Traceback" not in error


def test_settings_changed_midway(half, whole, tmp_path, capfd):
    other = Path(shutil.copytree(half, tmp_path / "other", symlinks=True))
    assert main(["--resume", str(half), "data.workers=0", "train.async_save=false", "train.log_every=1"]) == 0
    assert curve(half) == curve(whole)
    assert_equal_weights(half, whole)
    changes = ["train.accumulate=1", "train.precision=fp32", "train.ema_decay=0", "train.keep_best=0"]
    assert main(["--resume", str(other), *changes, "data.workers=0"]) == 0
    last = read_checkpoint(list_checkpoints(other / "checkpoints")[-1])
    assert last.averaged_weights() is None
    assert len(read_metrics(other)) == 10
    assert main(["--resume", str(other), "train.ema_decay=0.9", "train.steps=11", "data.workers=0"]) == 0
    last = read_checkpoint(list_checkpoints(other / "checkpoints")[-1])
    assert last.extra["ema_updates"] == 2
    assert last.averaged_weights() is not None
    assert capfd.readouterr().err.count("Traceback") == 0


def test_two_processes_in_one_folder(half, whole, nursery, tmp_path, capfd):
    import fcntl

    with open(half / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = nursery.run(tmp_path, ["--resume", str(half)], PLAIN)
        assert code == 2
        assert "another process trains in this run folder" in output
    assert nursery.run(tmp_path, ["--resume", str(half)], PLAIN)[0] == 0
    assert_same(half, whole)


def test_a_run_folder_that_is_moved_while_it_is_trained_into(tmp_path, caplog, monkeypatch):
    """Checkpoints go where the folder was, which is told, and training goes on from there."""
    real, run = Trainer._count, tmp_path / "run"

    def count(self, *arguments):
        real(self, *arguments)
        if self.state.progress.step == 2:
            run.rename(tmp_path / "moved")

    monkeypatch.setattr(Trainer, "_count", count)
    assert main([*begin(tmp_path), "data.workers=0"]) == 0
    assert f"the log {run / 'metrics.csv'} is gone: if the folder was moved" in caplog.text
    assert newest_intact(run / "checkpoints")[0].step == 9
    assert [int(row["step"]) for row in read_metrics(tmp_path / "moved")] == list(range(10))
    assert main(["--resume", str(run), "train.steps=10"]) == 0
