"""The training command on the sources and batchings of bestrq2.data: the same curve from every container."""

import re
import shutil
from pathlib import Path

import pytest
from plain_training import SMALL_MODEL

from bestrq2.config import Config, load_config
from bestrq2.console import console_log
from bestrq2.data import collect, tiny_dataset, write_manifest
from bestrq2.data.shards import pack
from bestrq2.errors import Skip
from bestrq2.runs.folder import RunFolder, read_metrics
from bestrq2.train import main
from bestrq2.training.open_data import open_dataset

pytestmark = pytest.mark.usefixtures("plain_training")

QUICK = [
    "model.front_end.mean=-47.5",
    "model.front_end.std=31.8",
    "train.steps=4",
    "train.batch_size=4",
    "train.log_every=1",
    "data.crop_seconds=1.5",
    "data.workers=0",
    *SMALL_MODEL,
]
CURVE = ("step", "loss", "accuracy", "perplexity", "grad_norm", "padding_share", "audio_seconds")


def _curve(run: Path) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in CURVE) for row in read_metrics(run)]


def _train(runs: Path, name: str, source: Path | str, *options: str) -> list[tuple[str, ...]]:
    assert (
        main(
            ["--runs", str(runs), "--name", name, "--config", "best_rq2_tiny", "--data", str(source), *QUICK, *options]
        )
        == 0
    )
    return _curve(runs / name)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of clips of several lengths and domains, a manifest of it, and shards of it."""
    import soundfile

    root = tmp_path_factory.mktemp("sources")
    for number, item in enumerate(tiny_dataset()):
        folder = root / "audio" / item.domain
        folder.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(item.path, dtype="int16")
        soundfile.write(folder / f"{number:02d}.flac", samples[: 12000 + 800 * number], rate)
    files, _ = collect(root / "audio")
    write_manifest(root / "clips.csv", files)
    shards = pack(collect(root / "clips.csv")[0], root / "shards", max_bytes=200_000).shards
    assert len(shards) > 3
    return root


def test_the_same_curve_from_a_manifest_and_from_shards(sources, tmp_path):
    """Equal to the last bit; and a run of one may go on with the other."""
    by_manifest = _train(tmp_path, "manifest", sources / "clips.csv", "train.save_every=2", "train.keep_last=5")
    count = len(list((sources / "shards").glob("*.tar")))
    pattern = f"{sources}/shards/shards-{{000000..{count - 1:06d}}}.tar"
    assert _train(tmp_path, "pattern", pattern) == by_manifest
    shutil.rmtree(tmp_path / "manifest" / "checkpoints" / "step-00000004")
    assert main(["--runs", str(tmp_path), "--resume", str(tmp_path / "manifest"), f"data.source={pattern}"]) == 0
    assert _curve(tmp_path / "manifest") == by_manifest


def test_a_damaged_shard_is_said(sources, tmp_path, capsys):
    shutil.copytree(sources / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / "shards-000001.tar"
    shard.write_bytes(shard.read_bytes()[:70_000])
    _train(tmp_path, "damaged", tmp_path / "shards")
    printed = capsys.readouterr().err
    assert "1 truncated" in printed
    assert "1 damaged archive" in printed
    assert "the shard was cut, and members may be lost" in printed


def test_buckets_and_domain_weights(sources, tmp_path, capsys):
    """Resumed in the middle, the curve is that of the whole run; padding stays small."""
    options = (
        "data.batching=buckets",
        "data.batch_seconds=8",
        "data.domain_weights={speech: 0.5, music: 0.3, env: 0.2}",
        "train.save_every=2",
    )
    whole = _train(tmp_path, "whole", sources / "shards", *options)
    _train(tmp_path, "part", sources / "clips.csv", *options)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000004")
    assert main(["--runs", str(tmp_path), "--resume", str(tmp_path / "part")]) == 0
    assert _curve(tmp_path / "part") == whole
    assert main(["--resume", str(tmp_path / "part"), "train.steps=9", "train.batch_size=2"]) == 2  # of other seconds
    assert re.search(r"the clips of every step would be others .*train\.batch_size: \d+ -> 2", capsys.readouterr().err)
    assert all(float(row["padding_share"]) < 0.15 for row in read_metrics(tmp_path / "whole")[1:])


def test_shards_beside_audio_are_not_used_silently(sources, tmp_path, capsys):
    shutil.copytree(sources / "audio", tmp_path / "both")
    shutil.copy(sources / "shards" / "shards-000000.tar", tmp_path / "both")
    with console_log():
        open_dataset(load_config("best_rq2_tiny", [f"data.source={tmp_path / 'both'}"]))
    printed = capsys.readouterr().out
    assert "Data: 24 files" in printed
    assert "ignored 1 .tar next to audio files" in printed


def test_several_sources(sources, tmp_path, capsys):
    names = f"[{sources / 'audio' / 'speech'},{sources / 'shards' / 'shards-000000.tar'}]"
    assert (
        main(
            [
                "--runs",
                str(tmp_path),
                "--name",
                "two",
                "--config",
                "best_rq2_tiny",
                f"data.source={names}",
                *QUICK,
                "train.steps=1",
            ]
        )
        == 0
    )
    assert "shards-000000.tar" in capsys.readouterr().out


def test_own_audio_has_a_recipe_of_its_own(sources, tmp_path, capsys):
    """Without --config: fitted targets for --data, the small recipe for the clips of the package."""
    for arguments, recipe in (
        (["--data", "x"], "best_rq2_transfer_small"),
        (["data.source=x"], "best_rq2_transfer_small"),
        ([], "best_rq2_tiny"),
        (["--data", "x", "--frozen-encoder", "y"], "best_rq2_tiny"),
        (["--data", "x", "--config", "best_rq2_small"], "best_rq2_small"),
    ):
        assert main([*arguments, "--show-config"]) == 0
        assert f"recipe: {recipe} " in capsys.readouterr().out.replace("\n", " ")
    few = ["train.steps=2", "train.batch_size=4", "model.targets.fit_clips=16", "train.pictures_every=0"]
    assert main(["--runs", str(tmp_path), "--name", "own", "--data", str(sources / "audio"), *few]) == 0
    assert "bits of code entropy" in capsys.readouterr().out


@pytest.fixture
def short_clips(tmp_path):
    """Six clips of one patch each, at 16 kHz and patches of 4 frames of 160 samples."""
    import soundfile
    import torch

    (tmp_path / "short").mkdir()
    for number in range(6):
        noise = 0.1 * torch.randn(900, generator=torch.Generator().manual_seed(number))
        soundfile.write(tmp_path / "short" / f"{number}.wav", noise.numpy(), 16000)
    return tmp_path / "short"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.encoder.patch_width=128"], "data: no clip is longer than 1.5 s, which is a single patch"),
        (["data.source=short", "data.join_short=false"], "data: no clip is longer than 0.05625 s, which is a single"),
        (["validation.source=short"], "validation.source: no clip is longer than 0.05625 s, which is a single patch"),
    ],
)
def test_clips_of_one_patch_are_refused(short_clips, tmp_path, monkeypatch, capsys, options, message):
    """Nothing is masked in them, so that every loss would be 0."""
    monkeypatch.chdir(tmp_path)
    assert main(["--name", "run", "--config", "best_rq2_tiny", *QUICK, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run" / "metrics.csv").exists()


def test_some_clips_of_one_patch_are_said(short_clips, tmp_path, caplog):
    import soundfile

    samples, rate = soundfile.read(tiny_dataset()[0].path, dtype="int16")
    for number in range(6):
        soundfile.write(short_clips / f"long-{number}.wav", samples[:16000], rate)
    _train(tmp_path, "some", short_clips, "data.join_short=false")
    found = re.search(r"(\d+) of the first 64 clips are a single patch", caplog.text)
    assert found
    assert 0 < int(found[1]) < 64


def test_a_file_that_cannot_be_read_is_told_once(tmp_path, caplog):
    run, skip = RunFolder.create(tmp_path, "run", Config()), Skip("a.wav", "empty file")
    for _ in range(3):
        run.report_skips([skip, skip])
    run.report_skips([Skip("b.wav", "empty file")])
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["skipped a.wav: empty file", "skipped b.wav: empty file"]
