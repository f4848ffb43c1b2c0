"""The log: columns that appear later, kills, full disks, TensorBoard events, W&B."""

import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bestrq2.config import ConfigError
from bestrq2.errors import TrainingError
from bestrq2.hardware import memory_metrics, peak_resident_bytes
from bestrq2.runs.metrics import MetricsLog, read_metrics, series, skip_metrics


def events(folder):
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_columns_grow_and_old_rows_stay(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1 / 3})
    log.write({"step": 1, "validation/loss": 2.5, "validation/accuracy": float("nan")})
    log.write({"step": 2, "loss": 0.25, "skipped_files": 3, "perplexity/0": 10.0})
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == ["1", "1", "2"]
    assert np.float32(rows[0]["loss"]) == np.float32(1 / 3)
    assert rows[1]["loss"] == rows[2]["validation/loss"] == ""
    assert rows[1]["validation/accuracy"] == "nan"
    assert rows[2]["skipped_files"] == "3"
    steps, losses = series(rows, "loss")
    assert steps.tolist() == [1, 2]
    assert losses[1] == 0.25
    assert series(rows, "unknown")[0].size == 0
    board = events(tmp_path)
    assert [(e.step, e.value) for e in board.Scalars("validation/loss")] == [(1, 2.5)]
    assert {"loss", "perplexity/0", "skipped_files"} <= set(board.Tags()["scalars"])


def test_resumed_log_drops_the_lost_stretch_and_knows_old_columns(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,of_old\n1,0.5,7\n2,0.4,8\n3,0.3,9\n4,0.")
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 0.25, "probe/accuracy": 0.9})
    log.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"], row["of_old"], row["probe/accuracy"]) for row in rows] == [
        ("1", "0.5", "7", ""),
        ("2", "0.4", "8", ""),
        ("3", "0.25", "", "0.9"),
    ]


def test_tensorboard_forgets_the_lost_stretch(tmp_path):
    for last, steps in ((0, (1, 2, 3)), (1, (2,))):
        log = MetricsLog(tmp_path, last)
        for step in steps:
            log.write({"step": step, "loss": float(step + 10 * last)})
        log.close()
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 12.0)]


WRITER = """
import sys
from pathlib import Path
from bestrq2.runs.metrics import MetricsLog
log = MetricsLog(Path(sys.argv[1]), 0)
print("ready", flush=True)
step = 0
while True:
    step += 1
    log.write({"step": step, "loss": 1.0 / step, f"column/{step // 7}": float(step)})
"""


def test_kill_at_any_moment_leaves_whole_rows(tmp_path):
    # Every seventh step adds a column, so that kills also hit the moments in which the file is replaced.
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    seen = 0
    while seen < 40:
        assert process.poll() is None
        found = len(read_metrics(tmp_path))  # reading beside the writer never fails, and never loses rows
        assert found >= seen
        seen = found
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read_metrics(tmp_path)
    assert len(rows) >= seen
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        step = int(row["step"])
        assert float(row["loss"]) == pytest.approx(1 / step, rel=1e-8)
        assert row[f"column/{step // 7}"] == str(step)


class FullDisk:
    """A file on a disk that takes ``room`` more bytes, then fails until there is room again."""

    def __init__(self, file):
        self.file, self.room = file, 0

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()

    def write(self, data):
        taken = min(self.room, len(data))
        if taken == 0:
            raise OSError(28, "No space left on device")
        self.room -= taken
        return self.file.write(bytes(data[:taken]))


def test_full_disk_keeps_rows_until_there_is_room(tmp_path, caplog):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0})
    log._file = disk = FullDisk(log._file)
    disk.room = 5  # a part of a line
    log.write({"step": 2, "loss": 2.0})
    log.write({"step": 3, "loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == ["1"]
    assert caplog.text.count("No space left on device") == 1
    disk.room = 10_000
    log.write({"step": 4, "loss": 4.0})
    log.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == ["1", "2", "3", "4"]


def test_failing_tensorboard_does_not_stop_the_csv(tmp_path, caplog, monkeypatch):
    log = MetricsLog(tmp_path, 0)

    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._board, "add_scalar", broken)
    log.write({"step": 1, "loss": 1.0})
    log.write({"step": 2, "loss": 1.0})
    log.image("pictures/codes", 2, np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert len(read_metrics(tmp_path)) == 2
    assert caplog.text.count("TensorBoard stopped: OSError") == 1


def test_a_folder_that_tensorboard_cannot_name(tmp_path, caplog):
    folder = tmp_path / "l\udce4t"
    folder.mkdir()
    log = MetricsLog(folder, 0)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert len(read_metrics(folder)) == 1
    assert "TensorBoard stopped: UnicodeEncodeError" in caplog.text


def test_unwritable_folder_is_said(tmp_path):
    with pytest.raises(TrainingError, match=r"the log cannot be written: .*No such file or directory"):
        MetricsLog(tmp_path / "vanished", 0)


def test_image_reaches_tensorboard(tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    log = MetricsLog(tmp_path, 0)
    log.image("pictures/codes", 5, tmp_path / "picture.png")
    log.image("pictures/codes", 6, pixels)
    log.close()
    found = events(tmp_path).Images("pictures/codes")
    assert [(image.step, image.width, image.height) for image in found] == [(5, 30, 20), (6, 30, 20)]
    assert found[0].encoded_image_string == found[1].encoded_image_string


class FakeRun:
    def __init__(self):
        self.rows, self.finished = [], False

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def starts(monkeypatch):
    """Options and run of every start of W&B, which a stand-in replaces."""
    starts = []

    def init(**options):
        starts.append((options, FakeRun()))
        return starts[-1][1]

    fake = types.SimpleNamespace(init=init, Image=lambda pixels: ("image", pixels.shape))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return starts


def test_wandb_gets_the_rows_and_a_resumed_run_the_same_id(tmp_path, starts):
    for last in (0, 1):
        log = MetricsLog(tmp_path, last, wandb="sounds", config={"recipe": "x"})
        log.write({"step": last + 1, "loss": 0.5})
        log.image("pictures/codes", last + 1, np.zeros((4, 6, 3), np.uint8))
        log.close()
    (first, run), (second, _) = starts
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"], first["config"]) == ("sounds", "allow", {"recipe": "x"})
    assert run.rows == [(1, {"loss": 0.5}), (1, {"pictures/codes": ("image", (4, 6, 3))})]
    assert run.finished


def test_a_copied_run_folder_has_its_own_wandb_run(tmp_path, starts, caplog):
    caplog.set_level("INFO", "bestrq2")

    def identifier(name):
        MetricsLog(tmp_path / name, 0, wandb="sounds").close()
        return starts[-1][0]["id"]

    (tmp_path / "run").mkdir()
    first = identifier("run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copied = identifier("copy")
    assert copied != first
    assert caplog.text.count(f"is a copy of {tmp_path / 'run'}, which W&B knows as {first}: the copy gets its own") == 1
    assert (identifier("copy"), identifier("run")) == (copied, first)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (identifier("moved"), identifier("moved")) == (first, first)
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    assert identifier("link") == first
    for name in ("run", "other"):  # what has taken the place of a moved folder is another run
        (tmp_path / "moved").rename(tmp_path / "kept")
        (tmp_path / "moved").mkdir()
        (tmp_path / "moved" / "wandb.json").write_text({"run": '{"id": "x"}', "other": "[]"}[name])
        assert identifier("kept") == first
        shutil.rmtree(tmp_path / "moved")
        (tmp_path / "kept").rename(tmp_path / "moved")
    (tmp_path / "moved" / "wandb.json").write_text(f'{{"id": "{first}", "project": "sounds"}}\n')  # of version 0.1
    assert identifier("moved") == first
    assert caplog.text.count("copy of") == 1


@pytest.mark.parametrize("found", [None, types.ModuleType("wandb")], ids=["nothing", "a folder wandb"])
def test_missing_wandb_is_one_clear_error(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", found)
    with pytest.raises(ConfigError, match=r"train.wandb=sounds: the package wandb cannot be imported.*pip install"):
        MetricsLog(tmp_path, 0, wandb="sounds")
    assert not (tmp_path / "metrics.csv").exists()


def test_peak_memory_moves_with_a_large_allocation():
    before = memory_metrics(torch.device("cpu"))["memory_gib"]
    ballast = np.ones(int(before * 2**30 / 8) + 2**25)
    after = memory_metrics(torch.device("cpu"))["memory_gib"]
    assert after - before > 0.2
    assert after < 64
    assert ballast[-1] == 1
    assert peak_resident_bytes() > 2**20


def test_skips_become_columns():
    assert skip_metrics({"too short": 2, "missing": 1, "silent": 0}) == {"skipped/too_short": 2, "skipped/missing": 1}


def test_lines_that_do_not_fit_the_header_are_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2\n3,0.5,7\nx,0.5\n4,0.x\n5,0.25\n")
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == ["1", "4", "5"]
    assert series(rows, "loss")[1].tolist() == [0.5, 0.25]
