"""Saves at every moment of a kill, and what is kept: no training, small tensors."""

import argparse
import errno
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import bestrq2
from bestrq2.errors import CheckpointError
from bestrq2.runs.best import read_best
from bestrq2.runs.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    newest_intact,
    read_checkpoint,
    read_state,
    save_checkpoint,
)
from bestrq2.runs.folder import RunFolder
from bestrq2.train import folder_to_resume, main

pytestmark = pytest.mark.fault

VALUES = {4: 3.0, 8: 1.0, 12: 2.0}
# For every number (every fourth where saves run beside this) until nothing is left to interrupt: a child saves three
# times and dies before the call ``number`` of what writes to the disk; another child, in a copy of the folder, goes on
# from there.
KILLS = """
import os, shutil, signal
from pathlib import Path
import torch
from bestrq2.runs import checkpoint
from bestrq2.runs.checkpoint import clear_leftovers, newest_intact
from bestrq2.config import load_config
from bestrq2.runs.folder import RunFolder
from bestrq2.training.saver import Saver
from bestrq2.training.state import Snapshot

config = load_config("best_rq2_tiny", ["train.keep_last=1", "train.keep_best=1", "train.async_save={asynchronous}"])
calls, deadly = [], 0
def counted(real):
    def call(*arguments, **options):
        calls.append(real)
        if len(calls) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call
os.fsync = lambda descriptor: None  # the system lives on: only the moment matters
for module, names in ((os, "fsync rename replace symlink unlink mkdir rmdir"), (checkpoint, "save_file _sha256")):
    for name in names.split():
        setattr(module, name, counted(getattr(module, name)))

def train(folder):
    run = RunFolder(folder)
    clear_leftovers(run.checkpoints)
    newest, problems = newest_intact(run.checkpoints)
    assert not problems, problems
    start = 0 if newest is None else newest.step
    calls.clear()
    saver = Saver(run, config, start)
    saver.begin()
    for step, value in {values}.items():
        if step > start:
            tensors = {{"t": torch.full((1000,), float(step))}}
            saver.save(Snapshot(step, tensors, tensors, tensors, {{"data": "x"}}), value, wait=step == 12)
            if not {asynchronous}:
                (folder / "done").write_text(str(step))
    saver.close()

def status(folder, number):
    global deadly
    child = os.fork()
    if child == 0:
        deadly = number
        try:
            train(folder)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

code, number, stride = -9, 0, 4 if {asynchronous} else 1
while code == -9:
    number += stride
    folder = Path({folder!r}) / str(number)
    folder.mkdir()
    code = status(folder, number)
    resumed = shutil.copytree(folder, folder.with_name(f"{{number}}-resumed"), symlinks=True)
    print("killed", number, code)
    print("resumed", number, status(resumed, 0), flush=True)
"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kill_at_every_write(nursery, tmp_path, asynchronous):
    """Whatever call the kill comes before: the last finished checkpoint is there, and the rest ends the same."""
    code, output = nursery.run(
        tmp_path, code=KILLS.format(folder=str(tmp_path), values=VALUES, asynchronous=asynchronous)
    )
    assert code == 0, output
    words = [line.split() for line in output.splitlines()]
    killed = [int(number) for word, number, code in words if (word, code) == ("killed", "-9")]
    assert killed[-1] > 50
    assert [word[0::2] for word in words[-2:]] == [["killed", "0"], ["resumed", "0"]]
    assert all(code == "0" for word, _, code in words if word == "resumed"), output
    for number in killed:
        folder = tmp_path / str(number)
        newest, problems = newest_intact(folder / "checkpoints")
        assert not problems, number
        if not asynchronous:
            done = int((folder / "done").read_text()) if (folder / "done").exists() else 0
            assert done <= (newest.step if newest else 0) <= done + 4, number
        saved = [step for step in VALUES if newest and step <= newest.step]
        if saved:  # the best so far is still there
            best = min(saved, key=VALUES.__getitem__)
            assert read_checkpoint(folder / "checkpoints" / f"step-{best:08d}").extra["score"] == VALUES[best], number
        parent = tmp_path / f"{number}-resumed" / "checkpoints"
        names = {path.name for path in parent.iterdir()}
        # Killed when all was saved, before the last deletion: nothing is saved any more that would delete it.
        assert names - {"step-00000004"} == {"best", "best.json", "step-00000008", "step-00000012"}, number
        assert (parent / "best").resolve().name == "step-00000008"
        for step in (8, 12):
            tensor = read_checkpoint(parent / f"step-{step:08d}").weights()["t"]
            assert torch.equal(tensor, torch.full((1000,), float(step)))


def save(parent: Path, step: int, keep_last: int = 1) -> Path:
    tensors = {"t": torch.full((10,), float(step))}
    return save_checkpoint(parent, step, tensors, tensors, {}, {"data": "x"}, keep_last)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_of_a_checkpoint_have_the_permissions_of_other_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        folder = save(tmp_path, 4)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ("model.safetensors", "state.json", "training.safetensors"), mode
    )


def test_a_damaged_newer_checkpoint_does_not_push_out_the_new_one(tmp_path):
    save(tmp_path, 4)
    for step in (8, 12):
        save(tmp_path, step, keep_last=9)
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"damaged")
    checkpoint, problems = newest_intact(tmp_path)
    assert (checkpoint.step, len(problems)) == (4, 2)
    save(tmp_path, 5)  # stopped by a signal soon after it was resumed
    assert newest_intact(tmp_path)[0].step == 5
    save(tmp_path, 8)
    save(tmp_path, 12)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000012"]
    assert newest_intact(tmp_path)[1] == []


def test_copies_of_the_user_are_left_alone(tmp_path):
    first = save(tmp_path, 4)
    for name in ("step-00000004-copy", "step-00000004.bak", "step-good", "mine"):
        shutil.copytree(first, tmp_path / name)
    save(tmp_path, 8)
    save(tmp_path, 100_000_000)
    save(tmp_path, 100_000_004, keep_last=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mine", "step-00000004-copy", "step-00000004.bak", "step-100000000", "step-100000004", "step-good"]
    assert newest_intact(tmp_path)[0].step == 100_000_004


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not the state"),
        ('{"state": {}}', "checksum differs"),
        ("SIGNED {}", "expected format"),
        ('SIGNED {"format": "bestrq2-checkpoint-1"}', "step: expected int"),
        ('SIGNED {"format": "bestrq2-checkpoint-1", "step": 1, "files": []}', "files: expected dict"),
    ],
)
def test_foreign_state_is_one_clear_error(tmp_path, text, message):
    import json

    from bestrq2.runs.checkpoint import _digest

    if text.startswith("SIGNED"):
        state = json.loads(text.removeprefix("SIGNED"))
        text = json.dumps({"sha256": _digest(state), "state": state})
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "model.safetensors"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch, name):
    tensors = {"t": torch.zeros(3)}
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, tensors, tensors, {}, {}, keep_last=2)
    refused = tmp_path / "checkpoints" / "step-00000002" / name
    real = Path.open

    def opened(path, *arguments, **options):  # root may read everything
        if path == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_bytes", lambda path: path.open("rb").read())
    for look in (find_checkpoint, lambda run: newest_intact(run / "checkpoints")):
        with pytest.raises(CheckpointError) as caught:
            look(tmp_path)
        assert str(caught.value).startswith(f"{refused} cannot be read for want of permission; let this user read it")


def test_a_folder_of_checkpoints_that_may_not_be_read_is_not_empty(tmp_path, monkeypatch):
    """Nothing begins again, and no other run or file is taken instead."""
    tensors = {"t": torch.zeros(3)}
    for name in ("old", "new"):
        save_checkpoint(tmp_path / name / "checkpoints", 1, tensors, tensors, {}, {"score": 1.0}, keep_last=2)
        (tmp_path / name / "config.yaml").touch()
    new = tmp_path / "new"
    assert {RunFolder.existing(tmp_path, None).path} <= {tmp_path / "old", new}
    refused = new / "checkpoints"
    real = os.scandir

    def listed(path="."):  # root may read everything
        if os.fspath(path) == os.fspath(refused):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", listed)
    calls = (
        lambda: find_checkpoint(new),
        lambda: newest_intact(refused),
        lambda: read_best(refused),
        lambda: bestrq2.load(new),
        lambda: RunFolder.existing(tmp_path, None),
        lambda: folder_to_resume(argparse.Namespace(resume="", name="new", runs=tmp_path, config=None)),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=re.escape(f"{refused} cannot be read for want of permission")):
            call()
    assert main(["--resume", "--runs", str(tmp_path)]) == 2
    assert main(["--resume", str(new)]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
