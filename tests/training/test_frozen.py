"""Training a head on a frozen encoder: alignment, cache, resume, and an encoder that does not change."""

import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from plain_training import leave_out

import bestrq2
from bestrq2 import train
from bestrq2.config import ConfigError, load_config
from bestrq2.data import tiny_dataset
from bestrq2.interchange import open_encoder, open_source
from bestrq2.interchange.tensors import module_digest, write_encoder_file
from bestrq2.interchange.xares import write_encoder_module
from bestrq2.models import build_model
from bestrq2.runs.checkpoint import newest_intact
from bestrq2.runs.folder import read_metrics
from bestrq2.training.embedding_cache import align

TARGETS = ["model.front_end.mean=-47", "model.front_end.std=31", "model.targets.codebook_size=32"]
HEAD = ["model.predictor.depth=1", "model.predictor.width=64", "model.predictor.hidden=96", "train.batch_size=8"]
QUICK = [*TARGETS, *HEAD, "train.steps=12", "train.save_every=4", "train.log_every=4"]


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(1)
    overrides = [*TARGETS, "model.encoder.depth=1", "model.encoder.width=64", "model.encoder.hidden=96"]
    config = load_config("best_rq2_tiny", overrides)
    write_encoder_file(path, config, build_model(config).state_dict())
    return path


def run(tmp_path, name, source, *overrides):
    assert train.main(["--runs", str(tmp_path), "--name", name, "--frozen-encoder", str(source), *overrides]) == 0
    return tmp_path / name


def weights(folder):
    checkpoint, _ = newest_intact(folder / "checkpoints")
    return checkpoint.weights()


def test_alignment_rule():
    features = torch.arange(8.0)[:, None] + 1
    assert align(features, 40, 8, 40)[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # Finer frames: the mean of those whose centres lie in the column.
    assert align(features, 20, 4, 40)[:, 0].tolist() == [1.5, 3.5, 5.5, 7.5]
    # Coarser frames: the frame in which the column's centre lies (20, 60, 100, 140, 180 ms).
    assert align(features[:2], 100, 5, 40)[:, 0].tolist() == [1, 1, 2, 2, 2]
    # Columns behind the last frame take it; frames behind the last column are left out.
    assert align(features[:2], 40, 4, 40)[:, 0].tolist() == [1, 2, 2, 2]
    assert align(features, 40, 2, 40)[:, 0].tolist() == [1, 2]


def test_one_of_several_ranks_tells_of_embeddings(encoder_file, tmp_path, nursery):
    from .undisturbed import PLAIN  # not above: another test runs this file outside of its package

    arguments = ["--runs", str(tmp_path), "--name", "run", "--frozen-encoder", str(encoder_file), *QUICK]
    code, output = nursery.run(tmp_path, [*arguments, "train.steps=1"], PLAIN, ranks=2)
    assert code == 0, output
    assert [line for line in output.splitlines() if line.startswith("Embeddings:")][1:] == [], output
    assert "1 of 1 shards computed" in output


def test_encoder_is_unchanged_and_resume_repeats(encoder_file, tmp_path, plain_training, capsys):
    before = hashlib.sha256(encoder_file.read_bytes()).hexdigest()
    plain_training.undo()  # with its report
    whole = run(tmp_path, "whole", encoder_file, *QUICK)
    leave_out(plain_training)
    assert hashlib.sha256(encoder_file.read_bytes()).hexdigest() == before
    proof = json.loads((whole / "frozen.json").read_text())
    assert proof["sha256_before"] == proof["sha256_after"] == module_digest(bestrq2.load(encoder_file))
    assert not any(name.startswith("encoder") for name in weights(whole))  # nothing of it is even in the run
    assert (whole / "report.png").exists()

    # Stop at step 8 by deleting the last checkpoint; damage the cache too: it is found and made again.
    again = run(tmp_path, "again", encoder_file, *QUICK)
    for name in ("step-00000012",):
        for file in (again / "checkpoints" / name).iterdir():
            file.unlink()
        (again / "checkpoints" / name).rmdir()
    shard = next(again.rglob("shard-00000.safetensors"))
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-4] + b"\1\2\3\4")
    capsys.readouterr()
    assert train.main(["--resume", str(again)]) == 0
    assert "1 of 1 shards computed" in capsys.readouterr().out
    assert shard.read_bytes() == intact
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(again)[name], tensor), name
    with pytest.raises(ConfigError, match=r"a head trained on a frozen encoder.*encoder\.safetensors"):
        bestrq2.load(whole)


def test_cache_is_shared_and_depends_on_the_encoder(encoder_file, tmp_path, capsys):
    cache = f"frozen.cache={tmp_path / 'cache'}"
    run(tmp_path, "a", encoder_file, *QUICK, cache)
    capsys.readouterr()
    run(tmp_path, "b", encoder_file, *QUICK, cache, "frozen.every_frame=true")
    assert "0 of 1 shards computed" in capsys.readouterr().out
    run(tmp_path, "c", encoder_file, *QUICK, cache, "model.targets.seed=3")
    assert "1 of 1 shards computed" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 2


GRID = [*TARGETS, "model.encoder.patch_height=16", "model.encoder.depth=1", "model.encoder.width=32"]
SETTINGS = ["model.encoder.heads=2", "model.encoder.join_rows=concatenate", "model.front_end.floor_db=-70"]


def test_the_same_weights_with_other_settings_are_cached_apart(tmp_path, capsys):
    source, cache = tmp_path / "encoder.safetensors", f"frozen.cache={tmp_path / 'cache'}"
    for number, setting in enumerate(["model.encoder.heads=1", *SETTINGS, "model.encoder.heads=1"]):
        config = load_config("best_rq2_tiny", [*GRID, "model.encoder.hidden=48", setting])
        torch.manual_seed(1)
        write_encoder_file(source, config, build_model(config).state_dict())
        run(tmp_path, f"run{number}", source, *QUICK, "train.steps=1", cache)
        expected = "0 of 1 shards" if number > len(SETTINGS) else "1 of 1 shards"
        assert f"{expected} computed" in capsys.readouterr().out, setting


def test_a_resumed_run_tells_of_other_settings_of_its_encoder(encoder_file, tmp_path, caplog):
    source = shutil.copyfile(encoder_file, tmp_path / "encoder.safetensors")
    folder = run(tmp_path, "run", source, *QUICK, "train.steps=4")
    assert train.main(["--resume", str(folder), "train.steps=8"]) == 0
    assert "its settings" not in caplog.text
    opened = open_source(source)
    opened.config.model.front_end.floor_db = -60.0
    write_encoder_file(source, opened.config, opened.weights)
    assert train.main(["--resume", str(folder), "train.steps=12"]) == 0
    assert "has the weights that this run began with, but its settings" in caplog.text


def test_a_refused_encoder_is_not_left_in_the_configuration(encoder_file, tmp_path, capsys):
    folder = run(tmp_path, "run", encoder_file, *QUICK, "train.steps=4")
    other, before = tmp_path / "other.safetensors", (folder / "config.yaml").read_bytes()
    opened = open_source(encoder_file)
    write_encoder_file(other, opened.config, {name: tensor + 1 for name, tensor in opened.weights.items()})
    assert train.main(["--resume", str(folder), "--frozen-encoder", str(other), "train.steps=8"]) == 2
    assert "is not the encoder that this run began with" in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == before
    assert train.main(["--resume", str(folder), "train.steps=8"]) == 0
    assert "steps: 8" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["encoder.safetensors", "mine.py:Mine"])
def test_an_encoder_that_was_moved(name, encoder_file, tmp_path, capsys):
    file = name.partition(":")[0]
    source = shutil.copyfile(encoder_file, tmp_path / file)
    if file.endswith(".py"):
        source.write_text(CODE.replace("FACTOR", "1.0"))
    folder = run(tmp_path, "run", f"{tmp_path / name}", *QUICK, "train.steps=1")
    (tmp_path / "there").mkdir()
    source.rename(tmp_path / "there" / file)
    assert train.main(["--resume", str(folder), "train.steps=2"]) == 2
    assert "If it was moved, name the new place: --frozen-encoder PLACE" in capsys.readouterr().err
    arguments = ["--resume", str(folder), "--frozen-encoder", str(tmp_path / "there" / name), "train.steps=2"]
    assert train.main(arguments) == 0


def test_a_refused_encoder_leaves_no_embeddings(encoder_file, tmp_path, nursery):
    """On two ranks as on one: nothing is computed, and the run is as it was."""
    from .undisturbed import PLAIN  # not above: another test runs this file outside of its package

    folder = run(tmp_path, "run", encoder_file, *QUICK, "train.steps=4")
    other, before = tmp_path / "other.safetensors", sorted((folder / "embeddings").rglob("*"))
    opened = open_source(encoder_file)
    write_encoder_file(other, opened.config, {name: tensor + 1 for name, tensor in opened.weights.items()})
    arguments = ["--resume", str(folder), "--frozen-encoder", str(other), "train.steps=8"]
    assert train.main(arguments) == 2
    assert sorted((folder / "embeddings").rglob("*")) == before
    code, output = nursery.run(tmp_path, arguments, PLAIN, ranks=2)
    assert code != 0
    assert "is not the encoder that this run began with" in output, output
    assert "Embeddings:" not in output
    assert sorted((folder / "embeddings").rglob("*")) == before


def test_embeddings_of_a_replaced_file_are_made_again(encoder_file, tmp_path, capsys):
    """Folders are not in the name of the cache: files of the same names and lengths must not share embeddings."""
    folder, cache = tmp_path / "audio", f"frozen.cache={tmp_path / 'cache'}"
    folder.mkdir()
    for item in tiny_dataset()[:2]:
        shutil.copyfile(item.path, folder / Path(item.path).name)
    run(tmp_path, "a", encoder_file, "--data", str(folder), *QUICK, "train.steps=1", cache)
    shard = next((tmp_path / "cache").rglob("shard-00000.safetensors"))
    first, names = shard.read_bytes(), sorted(path.name for path in folder.iterdir())
    shutil.copytree(folder, tmp_path / "other" / "audio")
    shutil.copyfile(folder / names[0], tmp_path / "other" / "audio" / names[1])
    capsys.readouterr()
    run(tmp_path, "b", encoder_file, "--data", str(tmp_path / "other/audio"), *QUICK, "train.steps=1", cache)
    assert "1 of 1 shards computed" in capsys.readouterr().out
    assert next((tmp_path / "cache").rglob("shard-00000.safetensors")).read_bytes() != first


def test_an_edit_in_the_middle_of_a_file_is_noticed(encoder_file, tmp_path, capsys):
    """Of the same size, and between the pieces that short digests take; a newer file of equal content is no edit."""
    folder, cache = tmp_path / "audio", f"frozen.cache={tmp_path / 'cache'}"
    folder.mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(48000)
    soundfile.write(folder / "a.wav", noise, 16000)
    arguments = [encoder_file, "--data", str(folder), *QUICK, "train.steps=1", cache]
    run(tmp_path, "a", *arguments)
    capsys.readouterr()
    os.utime(folder / "a.wav", (1, 1))
    for name in ("b", "c"):
        run(tmp_path, name, *arguments)
        assert "0 of 1 shards computed" in capsys.readouterr().out
    noise[8000:12000] = 0
    soundfile.write(folder / "a.wav", noise, 16000)
    run(tmp_path, "d", *arguments)
    assert "1 of 1 shards computed" in capsys.readouterr().out


def test_embeddings_of_a_replaced_parquet_are_made_again(encoder_file, tmp_path, capsys):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    arguments = [encoder_file, "--data", str(path), *QUICK, "train.steps=1", f"frozen.cache={tmp_path / 'cache'}"]
    for number in range(2):  # two clips of equal length
        parquet.write_table(pyarrow.table({"audio": [Path(tiny_dataset()[number].path).read_bytes()]}), path)
        for made in (1, 0):
            run(tmp_path, f"{number}{made}", *arguments)
            assert f"{made} of 1 shards computed" in capsys.readouterr().out


CODE = """
import torch
class Mine(torch.nn.Module):
    sampling_rate, output_dim, hop_size_in_ms = 16000, 1, 20.0
    def encode(self, waveform, lengths):
        counts = (lengths + 319) // 320
        padded = torch.nn.functional.pad(waveform, (0, -waveform.shape[1] % 320))
        return FACTOR * padded.unflatten(1, (-1, 320)).mean(-1, keepdim=True), counts
"""


def test_embeddings_of_other_code_are_made_again(tmp_path, capsys, caplog):
    source, cache = tmp_path / "mine.py", f"frozen.cache={tmp_path / 'cache'}"
    source.write_text(CODE.replace("FACTOR", "1.0"))
    folder = run(tmp_path, "a", f"{source}:Mine", *QUICK, "train.steps=1", cache)
    capsys.readouterr()
    source.write_text(CODE.replace("FACTOR", "2.0"))
    run(tmp_path, "b", f"{source}:Mine", *QUICK, "train.steps=1", cache)
    assert "1 of 1 shards computed" in capsys.readouterr().out
    assert train.main(["--resume", str(folder), "train.steps=2"]) == 0
    assert "its settings or code" in caplog.text


PARTS = {
    "function": "import helped\nclass Two(helped.Mine):\n    pass\n",
    "late": "def Two():\n    import helped\n    return helped.Mine()\n",  # not among the names of the file
}


@pytest.mark.parametrize("kind", PARTS)
def test_embeddings_of_other_code_in_a_file_that_is_imported_are_made_again(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "two.py").write_text(PARTS[kind])
    (tmp_path / "helped.py").write_text("from factors import scale\n" + CODE.replace("FACTOR", "scale()"))
    arguments = [f"{tmp_path / 'two.py'}:Two", *QUICK, "train.steps=1", f"frozen.cache={tmp_path / 'cache'}"]
    for factor, made in ((1.0, 1), (1.0, 0), (2.0, 1)):
        for name in ("factors", "helped"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "factors.py").write_text(f"def scale():\n    return {factor}\n")
        importlib.invalidate_caches()
        run(tmp_path, f"{kind}{factor}{made}", *arguments)
        assert f"{made} of 1 shards computed" in capsys.readouterr().out


@pytest.mark.slow
def test_head_learns(encoder_file, tmp_path):
    """Every frame of the audio is in its own embedding, even of a random encoder."""
    steps = ["train.steps=80", "train.log_every=80", "train.save_every=80", "frozen.every_frame=true"]
    row = read_metrics(run(tmp_path, "learns", encoder_file, *QUICK[:-3], *steps))[-1]
    assert float(row["accuracy"]) > float(row["unigram"]) + 0.1


class CoarseEncoder(torch.nn.Module):
    """Any module with the interface: 100 ms energies in two channels."""

    sampling_rate, output_dim, hop_size_in_ms = 16000, 2, 100.0

    def encode(self, waveform, lengths=None):
        frames = waveform[:, : waveform.shape[1] // 1600 * 1600].unflatten(1, (-1, 1600)).square().mean(2)
        return torch.stack((frames, frames.sqrt()), -1), lengths // 1600


def test_other_sources(encoder_file, tmp_path, monkeypatch, capsys):
    source = bestrq2.interchange.open_source(encoder_file)
    write_encoder_module(tmp_path / "mine.py", source.config, source.weights, "xares")
    waveform = 0.1 * torch.randn(2, 20000)
    lengths = torch.tensor([20000, 9000])
    features, frames = open_encoder(str(tmp_path / "mine.py")).encode(waveform, lengths)
    expected, expected_frames = bestrq2.load(encoder_file).encode(waveform, lengths)
    assert frames.tolist() == expected_frames.tolist()
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)

    (tmp_path / "coarse_module.py").write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('frozen_case', {__file__!r})\n"
        "case = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(case)\nmake = case.CoarseEncoder\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path, "coarse", "coarse_module:make", *QUICK, "train.steps=2")
    assert weights(tmp_path / "coarse")["predictor.input_proj.weight"].shape[1] == 2


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("nowhere", [], "no such file or folder"),
        ("torch.nn:Identity", [], "has no encode, sampling_rate"),
        ("torch.nn:Nothing", [], "Nothing"),
        ("missing.py", [], "no such file"),
        ("FILE", ["model.encoder.patch_height=16"], "strips over all bands"),
        ("FILE", ["model.targets.seed_candidates=5"], "null with model.targets.seed_candidates, which needs"),
        ("FILE", ["model.predictor.share=0.5"], "null with model.predictor.share, which needs pretraining"),
        ("FILE", ["model.masking.shared_per_batch=true"], "null with model.masking.shared_per_batch, which needs"),
        ("FILE", ["model.predictor.depth=0"], "model.predictor: "),
    ],
)
def test_refusals(source, overrides, message, encoder_file, tmp_path, capsys):
    source = str(encoder_file) if source == "FILE" else source
    assert train.main(["--runs", str(tmp_path), "--frozen-encoder", source, *QUICK, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_head_is_trained_by_the_loop_of_pretraining(encoder_file, tmp_path):
    """Micro-batches, averaged weights and the columns of the log are those of every run."""
    options = [*QUICK, "train.precision=fp32", "train.ema_decay=0.9", f"frozen.cache={tmp_path / 'cache'}"]
    whole = run(tmp_path, "whole", encoder_file, *options)
    halves = run(tmp_path, "halves", encoder_file, *options, "train.accumulate=2")
    rows = [[float(row["loss"]) for row in read_metrics(folder)] for folder in (whole, halves)]
    assert rows[0] == pytest.approx(rows[1], abs=2e-5)
    averaged, last = (
        newest_intact(folder / "checkpoints")[0].folder / name
        for folder, name in ((whole, "ema.safetensors"), (whole, "model.safetensors"))
    )
    assert averaged.read_bytes() != last.read_bytes()
    assert 0 < float(read_metrics(whole)[-1]["mask_ratio"]) < 1


def test_options_of_an_encoder_in_training_are_refused(encoder_file, tmp_path, capsys):
    for option in ("probe.every=5", "validation.source=x", "model.mixing.share=0.5"):
        assert train.main(["--runs", str(tmp_path), "--frozen-encoder", str(encoder_file), *QUICK, option]) == 2
        assert "frozen.source: expected null with" in capsys.readouterr().err
