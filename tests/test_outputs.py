"""No command replaces what is there unless it is told to, and files are whole or as they were."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bestrq2 import export, manifest, probe, report, stats, stream
from bestrq2.config import Config
from bestrq2.data import tiny_dataset
from bestrq2.durability import whole_file, write_array
from bestrq2.errors import CheckpointError, ConfigError, TrainingError
from bestrq2.interchange import tensors
from bestrq2.outputs import check_new, check_writable, numbered
from bestrq2.runs import report as runs_report
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import MetricsLog

CLIP = tiny_dataset()[0].path


@pytest.mark.parametrize(
    ("command", "arguments", "there"),
    [
        (manifest, [CLIP, "--out", "clips.csv"], "clips.csv"),
        (manifest, [CLIP, "--out", "clips.csv"], "clips.skipped.csv"),
        (stats, ["--out", "stats.yaml"], "stats.yaml"),
        (stream, ["run", CLIP, "--out", "features"], "features.npy"),
        (probe, ["run", "--out", "probe"], "probe/results.json"),
        (probe, ["run", "--out", "probe"], "probe/confusion.png"),
        (export, ["run", "--hf", "folder"], "folder/config.json"),
        (export, ["run", "--hf", "folder"], "folder/preprocessor_config.json"),
        (export, ["run", "--s3prl", "upstream"], "upstream/expert.py"),
        (export, ["run", "--s3prl", "upstream"], "upstream/__init__.py"),
        (export, ["run", "--xares", "encoder.py"], "encoder.safetensors"),
        (export, ["run", "--onnx", "encoder.onnx"], "encoder.onnx"),
        (export, ["run", "--published", "encoder.safetensors"], "encoder.safetensors"),
    ],
)
def test_what_is_there_stays(tmp_path, monkeypatch, capsys, command, arguments, there):
    monkeypatch.chdir(tmp_path)
    Path(there).parent.mkdir(exist_ok=True)
    Path(there).write_text("edited by hand")
    assert command.main(arguments) == 2
    shown = capsys.readouterr()
    assert f"{there} exists; choose another name, or replace it with --overwrite" in shown.err
    assert [str(p) for p in Path().rglob("*") if p.is_file()] == [there]
    assert Path(there).read_text() == "edited by hand"


def test_a_manifest_is_replaced_when_asked(tmp_path, capsys):
    out = tmp_path / "clips.csv"
    out.write_text("old")
    assert manifest.main([CLIP, "--out", str(out), "--overwrite"]) == 0
    assert Path(CLIP).name in out.read_text()


def test_what_another_process_wrote_meanwhile_stays(tmp_path, monkeypatch, capsys):
    out, collect = tmp_path / "clips.csv", manifest.collect

    def collected(*arguments, **options):
        out.write_text("of another process")
        return collect(*arguments, **options)

    monkeypatch.setattr(manifest, "collect", collected)
    assert manifest.main([CLIP, "--out", str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err
    assert out.read_text() == "of another process"


def test_a_comparison_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "both.html").write_text("-")
    monkeypatch.setattr(report, "RunRecord", lambda folder: _Run(tmp_path))
    with pytest.raises(ConfigError, match=r"both.html exists"):
        report.report([tmp_path, tmp_path], tmp_path / "both.html")


class _Run:
    def __init__(self, folder):
        self.folder, self.rows, self.name, self.step = folder, [{"step": 1}], "run", 1
        (folder / "config.yaml").touch()

    def setting(self, name, default):
        return default


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file/below/x.csv: .*file is not a folder"):
        check_new("--out", [tmp_path / "file" / "below" / "x.csv"])
    with pytest.raises(ConfigError, match="is a folder, expected the name of a file"):
        check_new("--out", [tmp_path], overwrite=True)
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # also where the tests run as root
    with pytest.raises(ConfigError, match="cannot be written: change its permissions"):
        check_new("--out", [tmp_path / "new" / "x.csv"])
    with pytest.raises(ConfigError, match=r"^--out x.csv: the current folder cannot be written: "):
        check_new("--out", [Path("x.csv")])
    with pytest.raises(ConfigError, match=r"^results in the current folder: it cannot be written: "):
        check_writable("results in", Path())
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(ConfigError, match="cannot be written: its file system is read-only, use another folder"):
        check_new("--out", [tmp_path / "new" / "x.csv"])


def test_a_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with pytest.raises(ConfigError, match=f"{name} is a device or pipe, expected the name of a file"):
            check_new("--out", [tmp_path / name], overwrite=True)


@pytest.mark.parametrize(
    ("options", "both"),
    [
        (["--xares", "a/best.py", "--published", "a/../a/best.safetensors"], "--published and --xares"),
        (["--xares", "best.py", "--xares-llm", "best.py"], "--xares-llm and --xares"),
    ],
)
def test_two_forms_of_an_export_in_one_place(tmp_path, monkeypatch, capsys, options, both):
    monkeypatch.chdir(tmp_path)
    assert export.main(["run", *options]) == 2
    assert f"{both} would both write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interrupted_tensors_leave_nothing(tmp_path, monkeypatch):
    def interrupted(values, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tensors.write_tensors(tmp_path / "x.safetensors", {}, {})
    assert not list(tmp_path.iterdir())


def test_numbers_of_folders(tmp_path):
    assert [numbered(str(tmp_path / "deep" / "probe")).name for _ in range(2)] == ["probe-001", "probe-002"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_is_whole_or_as_it_was(tmp_path, error):
    path = tmp_path / "x.csv"
    path.write_text("before")

    def fail():
        with whole_file(path) as file:
            file.write("half")
            file.flush()
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert getattr(raised.value, "filename", str(path)) == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]
    assert path.read_text() == "before"
    with whole_file(path, "wb") as file:
        file.write(b"after")
    assert path.read_bytes() == b"after"


def test_tensors_that_do_not_fit(tmp_path, limited_files):
    with limited_files(4096), pytest.raises(CheckpointError) as raised:
        tensors.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(5000)}, {})
    assert str(raised.value).startswith(
        f"{tmp_path / 'x.safetensors'}: cannot be written: File too large; the limit of"
    )


def test_a_run_that_cannot_be_written(tmp_path, monkeypatch):
    def refused(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(ConfigError) as raised:
        RunFolder(tmp_path).write_config(Config())
    assert str(raised.value) == (
        f"{tmp_path / 'config.yaml'} cannot be written: Read-only file system; use a folder that can be written"
    )


def test_reports_that_do_not_fit_leave_nothing(tmp_path, monkeypatch, limited_files):
    monkeypatch.setattr(runs_report, "draw_curves", lambda path, *_: path.write_bytes(bytes(4000)) > 0)
    monkeypatch.setattr(runs_report, "page", lambda *_: "x" * 10_000)
    with limited_files(4096), pytest.raises(OSError, match="too large") as raised:
        runs_report.write_report([], tmp_path / "report.html", "")
    assert raised.value.filename == str(tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    with limited_files(2048), pytest.raises(OSError, match="too large") as raised:
        runs_report.write_report([], tmp_path / "report.html", "")
    assert raised.value.filename == str(tmp_path / "report.png")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_a_log_that_does_not_fit_leaves_nothing(tmp_path, limited_files):
    with limited_files(50), pytest.raises(TrainingError, match="the log cannot be written"):
        MetricsLog(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_an_array_that_does_not_fit(tmp_path, limited_files):
    """numpy's own words for it are "6400 requested and 4064 written"."""
    path = tmp_path / "x.npy"
    with limited_files(4096), pytest.raises(OSError, match="File too large") as raised:
        write_array(path, np.arange(1600, dtype=np.float32))
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))
    assert not list(tmp_path.iterdir())
    write_array(path, np.arange(1600).reshape(40, 40).T)
    assert np.array_equal(np.load(path), np.arange(1600).reshape(40, 40).T)
