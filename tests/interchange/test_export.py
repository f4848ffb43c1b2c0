"""The command bestrq2 export: what it refuses, and what is there after a failure."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import bestrq2
from bestrq2 import export
from bestrq2.config import config_to_dict, load_config
from bestrq2.interchange import published
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.interchange.xares import _open_class
from bestrq2.models import build_model
from bestrq2.runs.checkpoint import save_checkpoint

SMALL = ["model.encoder.depth=1", "model.encoder.width=32", "model.encoder.heads=2", "model.encoder.hidden=48"]


@pytest.fixture(scope="module")
def models():
    """Configuration and weights of two encoders of one shape."""
    config = load_config("best_rq2_tiny", SMALL)
    torch.manual_seed(0)
    return config, build_model(config).state_dict(), build_model(config).state_dict()


@pytest.fixture
def encoder(models, tmp_path):
    path = tmp_path / "in" / "encoder.safetensors"
    write_encoder_file(path, *models[:2])
    return str(path)


@pytest.fixture
def other(models, tmp_path):
    path = tmp_path / "in" / "other.safetensors"
    write_encoder_file(path, models[0], models[2])
    return str(path)


@pytest.fixture
def unchecked(monkeypatch):
    """Modules without their check, which starts a process and has tests of its own."""
    monkeypatch.setattr(export, "check_encoder_module", lambda path: [])


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAMES = [
    ("--published", "bad.pt", "ending in .safetensors"),
    ("--s3prl", "not-a-name", "function in hubconf.py"),
    ("--s3prl", "class", "function in hubconf.py"),
    ("--s3prl", "sys", "function in hubconf.py"),
    ("--xares", "my-encoder.py", "identifier"),
    ("--xares-llm", "encoder.txt", "identifier"),
    ("--torch-export", "new/bad.onnx", "ending in .pt2"),
    ("--onnx", "new/bad.pt2", "ending in .onnx"),
]


@pytest.mark.parametrize(("option", "name", "message"), NAMES)
def test_names_are_refused_before_anything_is_written(encoder, tmp_path, capsys, option, name, message):
    out = tmp_path / "out"
    assert export.main([encoder, "--hf", str(out / "hf"), option, str(out / name)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


FORMS = [
    ("--hf", "a"),
    ("--s3prl", "a"),
    ("--xares", "a.py"),
    ("--xares-llm", "a.py"),
    ("--published", "a.safetensors"),
]


@pytest.mark.parametrize(("option", "name"), FORMS)
def test_what_does_not_fit_leaves_the_former_export(
    encoder, other, tmp_path, capsys, limited_files, unchecked, option, name
):
    out = tmp_path / "out"
    arguments = [option, str(out / name), "--overwrite"]
    with limited_files(2000):
        assert export.main([encoder, *arguments]) == 2
    told = capsys.readouterr().err
    assert "File too large" in told
    assert ".partial" not in told
    assert not out.exists()
    assert export.main([encoder, *arguments]) == 0
    before = content(out)
    with limited_files(2000):
        assert export.main([other, *arguments]) == 2
    assert content(out) == before


@pytest.mark.parametrize(("option", "name"), FORMS)
def test_what_another_process_wrote_meanwhile_stays(encoder, tmp_path, monkeypatch, capsys, unchecked, option, name):
    opened = export.open_source
    out = tmp_path / "out" / name

    def slowly(*arguments, **named):
        for path in export.results_of(parsed(option, out))[option]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("of the other process")
        return opened(*arguments, **named)

    monkeypatch.setattr(export, "open_source", slowly)
    assert export.main([encoder, option, str(out)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err
    assert set(content(tmp_path / "out").values()) == {b"of the other process"}


def parsed(option, out):
    names = ("hf", "s3prl", "xares", "xares_llm", "published", "onnx", "torch_export")
    chosen = dict.fromkeys(names) | {option[2:].replace("-", "_"): out}
    return type("Options", (), chosen)()


def test_a_folder_is_written_by_one_process_at_a_time(encoder, tmp_path, capsys):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert export.main([encoder, "--hf", str(out)]) == 2
    finally:
        os.close(descriptor)
    assert "another process is writing to" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_a_module_that_fails_its_check_is_not_written(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "check_encoder_module", lambda path: ["it is wrong"])
    assert export.main([encoder, "--xares", str(tmp_path / "out" / "a.py")]) == 2
    assert "a.py: not written, it fails its check: it is wrong" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_become_an_export(models, tmp_path, capsys):
    """Its newest checkpoint would never be read again."""
    config, weights, _ = models
    run = tmp_path / "run"
    save_checkpoint(run / "checkpoints", 1, weights, {"a": torch.zeros(1)}, config_to_dict(config), {}, 1)
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step-00000001"):
        before = content(run)
        assert export.main([str(run), "--hf", str(folder), "--overwrite"]) == 2
        assert "choose another folder" in capsys.readouterr().err
        assert content(run) == before


def test_another_model_in_an_exported_folder_is_itself(models, encoder, other, tmp_path):
    out = tmp_path / "out"
    assert export.main([encoder, "--hf", str(out)]) == 0
    assert export.main([other, "--published", str(out / "theirs.safetensors")]) == 0
    waveform = 0.1 * torch.randn(1, 8000)
    expected, _ = bestrq2.load(other).encode(waveform)
    torch.testing.assert_close(bestrq2.load(out / "theirs.safetensors").encode(waveform)[0], expected)
    # A variant without metadata, as save_pretrained(variant="fp16") writes it, beside the weights of another encoder.
    save_file(
        {f"encoder.{n}" if not n.startswith("encoder.") else n: t for n, t in load_file(other).items()},
        out / "model.fp16.safetensors",
    )
    torch.testing.assert_close(bestrq2.load(out / "model.fp16.safetensors").encode(waveform)[0], expected)
    own, _ = bestrq2.load(encoder).encode(waveform)
    torch.testing.assert_close(bestrq2.load(out).encode(waveform)[0], own)


def test_the_class_of_a_file_that_was_replaced(encoder, other, tmp_path, unchecked):
    out = tmp_path / "a.py"
    names = []
    for source in (encoder, other):
        assert export.main([source, "--xares", str(out), "--overwrite"]) == 0
        names.append(_open_class(out).__name__)
        assert _open_class(out) is _open_class(out)
    assert names[0] != names[1]


def test_the_head_for_whole_clips_is_named_where_it_is_left_out(tmp_path):
    grid = ["model.front_end.normalize=none", "model.encoder.patch_height=16", "model.encoder.position=sincos"]
    for weight in (0.0, 0.5):
        config = load_config("best_rq2_tiny", [*SMALL, *grid, f"model.clip_weight={weight}"])
        _, _, notes = published.to_published(config, build_model(config).state_dict())
        assert any("model.clip_weight" in note for note in notes) is (weight > 0)
