"""Options of targets, masks and mixing in real runs: they learn, resume, and are the same on any number of ranks."""

import csv
import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from plain_training import SMALL_MODEL

from bestrq2.config import ConfigError, config_from_dict, load_config
from bestrq2.interchange.opening import open_source, open_teacher
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.runs.checkpoint import list_checkpoints, read_checkpoint
from bestrq2.runs.folder import read_metrics
from bestrq2.train import main
from bestrq2.training.health import effective_rank

from .test_distributed import two_ranks  # noqa: F401  (a fixture)

pytestmark = pytest.mark.usefixtures("plain_training")

QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=12",
    "train.batch_size=8",
    "train.save_every=4",
    "train.pictures_every=0",
    *SMALL_MODEL,
    "model.targets.codebook_size=64",
    "model.targets.fit_clips=24",
]
FITTED = ["model.targets.projection=whitened_pca", "model.targets.centroid_steps=3", "model.targets.num_codebooks=2"]
CURVE = ("step", "loss", "accuracy", "unigram", "perplexity", "grad_norm", "touching_share", "clip_loss")


def train(runs: Path, name: str, *overrides: str) -> Path:
    assert main(["--runs", str(runs), "--name", name, *QUICK, *overrides]) == 0
    return runs / name


def curve(run: Path) -> list[tuple[str, ...]]:
    return [tuple(row.get(name, "") for name in CURVE) for row in read_metrics(run)]


def saved(run: Path, number: int = -1):
    return read_checkpoint(list_checkpoints(run / "checkpoints")[number])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("plain"), "plain", "train.health_every=5", "train.log_every=2")


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.masking.block_columns=4", "model.masking.kept=true", "model.masking.ratio=[0.8,0.8]"],
        ["model.masking.dispersion=1.0", "model.name=best_rq"],
        [*FITTED, "model.clip_weight=1.0", "model.mixing.share=0.5"],
        ["model.encoder.patch_height=16", "model.masking.block_rows=2", "model.masking.block_columns=2"],
    ],
    ids=["kept-spans", "dispersion", "fitted-clip-mixing", "grid-blocks"],
)
def test_every_option_learns(tmp_path, overrides):
    run = train(tmp_path, "learns", *overrides, "train.steps=30", "train.save_every=30", "optimizer.learning_rate=1e-2")
    rows = [row for row in read_metrics(run) if row["loss"]]
    losses = [float(row["loss"]) for row in rows]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert all(0 < float(row["touching_share"]) <= 1 for row in rows)
    if "model.clip_weight=1.0" in overrides:
        assert float(rows[-1]["clip_loss"]) < float(rows[0]["clip_loss"]) - 0.3


def test_fitted_targets_are_stored_and_resumed(tmp_path):
    options = [*FITTED, "model.mixing.share=0.5", "model.clip_weight=0.5", "model.masking.dispersion=0.5"]
    whole = train(tmp_path, "whole", *options)
    half = tmp_path / "half"
    shutil.copytree(whole, half, symlinks=True)
    for checkpoint in list_checkpoints(half / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    assert main(["--resume", str(half)]) == 0
    assert curve(half) == curve(whole)
    first, last = saved(whole, 0).weights(), saved(whole).weights()
    for name in ("quantizer.projection", "quantizer.codebook", "quantizer.center"):
        assert torch.equal(first[name], last[name]), name
        assert torch.equal(saved(half).weights()[name], last[name]), name
    assert not torch.equal(first["head.weight"], last["head.weight"])
    # They are a function of data and configuration: fitting again gives the same, another seed others.
    again = train(tmp_path, "again", *options, "train.steps=1")
    assert torch.equal(saved(again).weights()["quantizer.codebook"], last["quantizer.codebook"])
    other = train(tmp_path, "other", *options, "train.steps=1", "model.targets.seed=5")
    assert not torch.equal(saved(other).weights()["quantizer.codebook"], last["quantizer.codebook"])


def test_the_seed_with_the_most_even_codes_is_chosen_and_kept(tmp_path, capsys):
    run = train(tmp_path, "chosen", "model.targets.seed_candidates=6", "train.steps=1")
    line = next(line for line in capsys.readouterr().out.splitlines() if "candidates" in line)
    best, lowest = float(line.split("candidates, ")[1].split()[0]), float(line.split("lowest ")[1].split(",")[0])
    assert best > lowest + 0.05
    targets = config_from_dict(saved(run).config).model.targets
    assert targets.seed_candidates == 1
    assert f"seed {targets.seed} of 6" in line
    # The run's own first look agrees that it is better than the seed it began with.
    before = train(tmp_path, "given", "train.steps=1")
    perplexities = [float(read_metrics(folder)[0]["perplexity"]) for folder in (before, run)]
    assert targets.seed != config_from_dict(saved(before).config).model.targets.seed
    assert perplexities[1] > perplexities[0]
    again = train(tmp_path, "again", "model.targets.seed_candidates=6", "train.steps=1")
    assert config_from_dict(saved(again).config).model.targets.seed == targets.seed


def test_a_sample_that_does_not_suffice_is_one_line(tmp_path, capsys):
    arguments = [*QUICK, "model.targets.centroid_steps=1", "model.targets.fit_clips=1"]
    assert main(["--runs", str(tmp_path), *arguments]) == 2
    assert "error: model.targets cannot be fitted: centroids of 64 codes need a sample of at least 128 patches" in (
        capsys.readouterr().err
    )


def test_second_iteration_records_its_teacher_and_refuses_another(tmp_path, plain, capsys):
    options = [f"model.targets.encoder={plain}", "model.targets.layer=0", "model.targets.normalize=patch"]
    run = train(tmp_path, "second", *options)
    out = capsys.readouterr().out
    config = config_from_dict(saved(run).config)
    assert f"output of block 0, digest {config.model.targets.digest[:16]}" in out
    assert not any(name.startswith("teacher") for name in saved(run).weights())
    assert saved(run).weights()["quantizer.projection"].shape[1] == 32
    losses = [float(row["loss"]) for row in read_metrics(run) if row["loss"]]
    assert losses[-1] < losses[0]
    # Resumed with the teacher, the curve goes on as it was.
    half = tmp_path / "half"
    shutil.copytree(run, half, symlinks=True)
    shutil.rmtree(list_checkpoints(half / "checkpoints")[-1])
    assert main(["--resume", str(half)]) == 0
    assert curve(half) == curve(run)
    # Another layer, another run, no run at all.
    for override, message in (
        ("model.targets.layer=1", "model.targets.layer: expected 0, with which this run began"),
        (f"model.targets.encoder={run}", "not the encoder or layer that made the targets so far"),
        (f"model.targets.encoder={tmp_path / 'none'}", f"model.targets.encoder: {tmp_path / 'none'}: no such file"),
    ):
        capsys.readouterr()
        assert main(["--resume", str(half), "train.steps=14", override]) == 2
        assert message in capsys.readouterr().err
    config_text = (half / "config.yaml").read_text()
    assert f"encoder: {plain}" in config_text  # a refused override leaves the run as it was
    capsys.readouterr()
    assert main(["--runs", str(tmp_path), *QUICK, *options, "model.front_end.hop_length=320"]) == 2
    assert "a frame every 80 ms" in capsys.readouterr().err


def test_a_teacher_with_other_settings_is_refused(tmp_path, plain):
    """The same weights with another floor of the spectrogram give other targets."""
    source = open_source(plain)
    file = tmp_path / "teacher.safetensors"
    write_encoder_file(file, source.config, source.weights)
    config = load_config("best_rq2_tiny", [f"model.targets.encoder={file}"])
    whole = open_teacher(config).digest()
    assert open_teacher(load_config("best_rq2_tiny", [f"model.targets.encoder={plain}"])).digest() == whole
    for recorded, floor, refused in ((whole, -100.0, False), (whole, -60.0, True), (whole[:64], -60.0, False)):
        config.model.targets.digest = recorded  # the last is that of runs before settings were recorded
        source.config.model.front_end.floor_db = floor
        write_encoder_file(file, source.config, source.weights)
        with pytest.raises(ConfigError, match="with other settings") if refused else nullcontext():
            open_teacher(config)


def test_two_ranks_agree_on_everything_that_is_drawn_or_fitted(tmp_path, plain, two_ranks):  # noqa: F811
    options = [
        *QUICK,
        "train.steps=4",
        f"model.targets.encoder={plain}",
        "model.targets.layer=0",
        "model.targets.seed_candidates=3",
        *FITTED,
        "model.targets.codebook_dim=8",
        "model.mixing.share=0.6",
        "model.clip_weight=1.0",
        "model.masking.dispersion=1.0",
        "model.masking.block_columns=2",
        "train.health_every=2",
    ]
    assert main(["--runs", str(tmp_path), "--name", "one", *options]) == 0
    two_ranks(["--runs", str(tmp_path), "--name", "two", *options])
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for name in (*CURVE, "health/rms/1", "health/effective_rank"):
        for first, second in zip(one, two, strict=True):
            assert (first[name] == "") == (second[name] == ""), name
            if first[name]:
                assert float(second[name]) == pytest.approx(float(first[name]), rel=2e-4, abs=1e-6), name
    for name in ("quantizer.codebook", "quantizer.center"):
        assert torch.equal(saved(tmp_path / "one").weights()[name], saved(tmp_path / "two").weights()[name])
    accumulated = train(tmp_path, "parts", *options[len(QUICK) :], "train.accumulate=2")
    for first, second in zip(one, read_metrics(accumulated), strict=True):
        if first["loss"]:
            assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=2e-4)
            assert float(second["touching_share"]) == pytest.approx(float(first["touching_share"]), rel=1e-6)


def test_mixing_needs_pairs_on_every_rank(tmp_path, capsys):
    assert main(["--runs", str(tmp_path), *QUICK, "train.batch_size=3", "model.mixing.share=0.5"]) == 2
    assert "train.batch_size: expected pairs of clips" in capsys.readouterr().err


def test_health_is_logged_when_it_is_due(plain):
    rows = {int(row["step"]): row for row in read_metrics(plain)}
    measured = [step for step, row in rows.items() if row["health/effective_rank"]]
    assert measured == [0, 6, 10, 12]  # every 5 steps, in rows of every second step, and the last
    for step in measured:
        assert 1 < float(rows[step]["health/effective_rank"]) < 32
        assert all(float(rows[step][f"health/rms/{block}"]) > 0 for block in (0, 1))
    assert float(rows[12]["health/rms/1"]) != float(rows[0]["health/rms/1"])


def test_effective_rank():
    torch.manual_seed(0)
    assert effective_rank(torch.randn(4000, 16)) == pytest.approx(16, rel=0.01)
    assert effective_rank(torch.randn(4000, 3) @ torch.linalg.qr(torch.randn(16, 16)).Q[:3]) == pytest.approx(3, 0.01)
    assert effective_rank(torch.randn(50, 1) @ torch.ones(1, 16) + 7) == pytest.approx(1, 1e-3)
    assert effective_rank(torch.ones(50, 16)) == 0.0
    assert effective_rank(torch.randn(5, 400)) <= 4.001  # five points span four directions about their mean
    assert math.isnan(effective_rank(torch.full((5, 4), float("nan"))))


def test_a_log_from_before_the_new_columns_goes_on(tmp_path, plain):
    run = tmp_path / "older"
    shutil.copytree(plain, run, symlinks=True)
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])
    rows = read_metrics(run)
    kept = [name for name in rows[0] if name != "touching_share" and not name.startswith("health/")]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert main(["--resume", str(run)]) == 0
    found = read_metrics(run)
    assert [row["step"] for row in found] == [row["step"] for row in rows]
    assert [row["loss"] for row in found] == [row["loss"] for row in rows]
    assert found[1]["touching_share"] == ""
    assert found[-1]["touching_share"] == rows[-1]["touching_share"]
