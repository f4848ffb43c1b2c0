"""embed and stats: files in, features out, the same alone and in a batch."""

import csv
import os
import shutil

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import embed, load, stats, train
from bestrq2.config import load_config
from bestrq2.data import load_audio, tiny_dataset
from bestrq2.data.files import from_text
from bestrq2.errors import printable, tabular
from bestrq2.models import build_encoder
from bestrq2.outputs import alone_in
from bestrq2.probing.controls import LogMelEncoder

QUICK = ["train.steps=2", "train.batch_size=2", "model.encoder.depth=2", "model.front_end.mean=-47.5"]


SMALL = [
    "model.front_end.mean=-45",
    "model.front_end.std=20",
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.encoder.depth=1",
    "model.encoder.heads=4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, plain_training):
    runs = tmp_path_factory.mktemp("runs")
    assert train.main(["--runs", str(runs), "--name", "run", "model.front_end.std=31.8", *QUICK]) == 0
    return runs / "run"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "audio" / "deep er"
    folder.mkdir(parents=True)
    paths = [file.path for file in tiny_dataset()][:3]
    for path in paths:
        shutil.copy(path, folder)
    long = np.concatenate([soundfile.read(path)[0] for path in paths])
    soundfile.write(folder / "long.wav", np.stack([long, long], 1), 16000, subtype="FLOAT")
    soundfile.write(folder / "blip.flac", long[:50], 16000)
    (folder / "broken.ogg").write_bytes(b"OggS not really")
    return tmp_path / "audio"


def test_npy(run, folder, tmp_path, capsys):
    assert embed.main([str(run), str(folder), "--out", str(tmp_path / "out"), "--batch-size", "3"]) == 0
    assert "5 files embedded, 1 skipped" in (captured := capsys.readouterr()).out
    assert "broken.ogg" in captured.err
    encoder = load(run)
    clips = np.load(tmp_path / "out" / "clips.npy")
    with (tmp_path / "out" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(clips) == 5
    for row, clip in zip(rows, clips):
        features = np.load(tmp_path / "out" / row["features"])
        waveform = torch.from_numpy(load_audio(row["path"]))[None]
        with torch.no_grad():
            expected, count = encoder.encode(waveform)
        assert features.shape == (int(row["frames"]), encoder.output_dim) == (int(count), 128)
        np.testing.assert_allclose(features, expected[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(clip, np.concatenate((features.mean(0), features.std(0))), atol=1e-5)
        assert abs(float(row["seconds"]) * 1000 - features.shape[0] * float(row["hop_ms"])) <= 2 * float(row["hop_ms"])
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_an_encoder_without_weights(folder, tmp_path):
    """The log-mel baseline ended in a traceback."""
    name = "bestrq2.probing.controls:LogMelEncoder"
    assert embed.main([name, str(folder / "deep er" / "long.wav"), "--out", str(tmp_path / "out")]) == 0
    waveform = torch.from_numpy(load_audio(folder / "deep er" / "long.wav"))[None]
    (features,) = (tmp_path / "out" / "features").iterdir()
    expected, _ = LogMelEncoder().encode(waveform)
    np.testing.assert_allclose(np.load(features), expected[0].numpy(), atol=1e-3)


def test_parquet_equals_npy(run, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert embed.main([str(run), str(folder), "--out", str(tmp_path / "p"), "--format", "parquet"]) == 0
    assert embed.main([str(run), str(folder), "--out", str(tmp_path / "n"), "--batch-size", "1"]) == 0
    table = parquet.read_table(tmp_path / "p" / "features.parquet").to_pylist()
    for row in table:
        features = np.load(tmp_path / "n" / "features" / f"{row['name']}.npy")
        np.testing.assert_allclose(np.reshape(row["features"], (row["frames"], row["width"])), features, atol=1e-5)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_leaves_no_features_of_other_files(run, folder, tmp_path, capsys):
    first, second = (str(next(folder.rglob(name))) for name in ("long.wav", "blip.flac"))
    out = tmp_path / "out"
    assert embed.main([str(run), first, "--out", str(out)]) == 0
    (out / "features" / "mine.npy").write_bytes(b"of the user")
    (out / ".features.partial" / "features").mkdir(parents=True)  # a killed process
    (out / ".features.partial" / "features" / "cut.npy").touch()
    assert embed.main([str(run), second, "--out", str(out), "--overwrite"]) == 0
    names = {str(name) for name in contents(out)}
    assert names == {"index.csv", "clips.npy", "features/blip.flac.npy", "features/mine.npy"}
    (out / "index.csv").unlink()
    (out / "clips.npy").unlink()
    assert embed.main([str(run), second, "--out", str(out)]) == 2
    assert "features holds files; choose another name" in capsys.readouterr().err


def test_two_processes_do_not_write_into_one_folder(run, folder, tmp_path, capsys):
    (out := tmp_path / "out").mkdir()
    with alone_in(out, RuntimeError()):
        assert embed.main([str(run), str(folder), "--out", str(out)]) == 2
    assert f"--out: another process is writing to {out}; wait for it" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_names_in_the_index_are_those_of_the_files(run, tmp_path):
    """A table can hold a line break; only bytes that are not UTF-8 are escaped."""
    audio = tmp_path / "audio"
    audio.mkdir()
    names = ["line\nbreak.wav", "line\\nbreak.wav", "tab\t.wav", 'quote", ".wav', "cr\r.wav"]
    for name in names:
        soundfile.write(audio / name, np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    assert embed.main([str(run), str(audio), "--out", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "index.csv", newline="", encoding="utf-8") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {str(audio / name) for name in names}
    assert tabular("a\udce9\n") == "a\\xe9\n"


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_an_interrupted_call_changes_no_results(run, folder, tmp_path, monkeypatch, capsys, format):
    """Those of the call before stay as they are, and nothing of this one is among them."""
    pytest.importorskip("pyarrow")
    blip = str(next(folder.rglob("blip.flac")))
    arguments = [str(run), blip, blip, "--out", str(tmp_path / "out"), "--format", format]
    assert embed.main(arguments) == 0
    assert embed.main(arguments) == 2
    assert "exists; choose another name, or replace it with --overwrite" in capsys.readouterr().err
    whole, before = embed.embed, contents(tmp_path / "out")

    def interrupted(*arguments, **options):
        yield next(whole(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "embed", interrupted)
    assert embed.main([*arguments, "--overwrite"]) == 130
    assert contents(tmp_path / "out") == before


def test_same_names_from_two_folders_are_kept_apart(run, folder, tmp_path):
    single = str(next(folder.rglob("long.wav")))
    assert embed.main([str(run), single, single, "--out", str(tmp_path / "out"), "--layer", "0"]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "features").iterdir())
    assert names == ["long.wav-2.npy", "long.wav.npy"]


def test_parts_of_a_file_are_told_apart(run, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    (tmp_path / "m.csv").write_text("path,start,end\na.wav,0,1\na.wav,,\na.wav,0,2\n")
    assert embed.main([str(run), str(tmp_path / "m.csv"), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "index.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a.wav@0.000-1.000", "a.wav", "a.wav@0.000-2.000"]


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_places_and_labels_are_in_the_index(run, tmp_path, format):
    pytest.importorskip("pyarrow")
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 48000), 16000)
    (tmp_path / "m.csv").write_text("path,start,end,label\na.wav,0.5,1,dog\na.wav,2.5,,\na.wav,,,cat\n")
    out = tmp_path / "out"
    assert embed.main([str(run), str(tmp_path / "m.csv"), "--out", str(out), "--format", format]) == 0
    if format == "npy":
        rows = list(csv.DictReader((out / "index.csv").read_text().splitlines()))
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(out / "features.parquet").to_pylist()
    found = [(float(row["start"]), float(row["end"]), row["label"]) for row in rows]
    assert found == [(0.5, 1.0, "dog"), (2.5, 3.0, ""), (0.0, 3.0, "cat")]


def test_layers_and_pooling(run, folder, tmp_path):
    for name, options in (
        ("all", ["--layers", "all", "--pool", "mean+std"]),
        ("one", ["--layer", "1", "--pooling", "max"]),
        ("joined", ["--layers", "middle", "--combine", "concatenate"]),
        ("averaged", ["--layers", "0,1", "--combine", "average"]),
    ):
        assert embed.main([str(run), str(folder), "--out", str(tmp_path / name), *options]) == 0
    with (tmp_path / "all" / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row[n] for n in ("layers", "combine", "rows", "pooling")) for row in rows} == {
        ("0 1 final", "each", "", "mean+std")
    }
    encoder, clips = load(run), np.load(tmp_path / "all" / "clips.npy")
    assert clips.shape == (5, 3, 256)
    for number, row in enumerate(rows):
        features = np.load(tmp_path / "all" / row["features"])
        assert features.shape == (3, int(row["frames"]), 128)
        waveform = torch.from_numpy(load_audio(row["path"]))[None]
        for layer in (0, 1, None):
            with torch.no_grad():
                expected = encoder.encode(waveform, layer=layer)[0][0].numpy()
            np.testing.assert_allclose(features[-1 if layer is None else layer], expected, atol=1e-5)
        np.testing.assert_allclose(clips[number, :, :128], features.mean(1), atol=1e-6)
        np.testing.assert_allclose(clips[number, :, 128:], features.std(1), atol=1e-6)
        one = np.load(tmp_path / "one" / row["features"])
        np.testing.assert_allclose(one, features[1], atol=1e-5)
        np.testing.assert_allclose(np.load(tmp_path / "one" / "clips.npy")[number], one.max(0), atol=1e-6)
        joined = np.load(tmp_path / "joined" / row["features"])
        np.testing.assert_allclose(joined, np.concatenate(features[:2], -1), atol=1e-5)
        averaged = torch.nn.functional.layer_norm(torch.from_numpy(features[:2]), (128,)).mean(0)
        np.testing.assert_allclose(np.load(tmp_path / "averaged" / row["features"]), averaged, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "missing.wav"], "missing.wav"),
        (["nowhere", "AUDIO"], "no such file or folder"),
        (["RUN", "AUDIO", "--layer", "9"], r"--layer: expected 0..1, got 9"),
        (["RUN", "AUDIO", "--layers", "0,2"], r"expected all, middle, or 0..1 and final separated by commas, got '2'"),
        (["RUN", "AUDIO", "--layers", "all", "--layer", "0"], "give one of them"),
        (["RUN", "AUDIO", "--layers", "0,1,0"], "0 is named twice in '0,1,0'"),
        (["RUN", "AUDIO", "--out", "RUN"], "is a run folder; name a folder for features"),
        (["RUN", "BROKEN"], "no usable audio"),
        (["RUN", "AUDIO", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_input(run, folder, tmp_path, capsys, arguments, message):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.wav").touch()
    places = {"RUN": str(run), "AUDIO": str(folder), "BROKEN": str(broken)}
    assert embed.main(["--out", str(tmp_path / "out"), *(places.get(a, a) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_combining_one_layer_is_told(run, folder, tmp_path, capsys):
    for number, layers in enumerate(([], ["--layers", "0"], ["--layers", "all"])):
        arguments = [str(run), str(folder), "--out", str(tmp_path / str(number)), "--combine", "average", *layers]
        assert embed.main(arguments) == 0
        assert ("--combine is not used" in capsys.readouterr().err) is (layers[1:] != ["all"])


def test_names_in_a_locale_without_them(tmp_path, monkeypatch):
    """In a C or Latin-1 locale, what cannot be a name of a file is escaped."""
    name = from_text("\u97f3.wav")  # bytes, where the tests themselves run in such a locale
    for file in ("plain.wav", name):
        soundfile.write(os.fsencode(tmp_path / file), np.zeros(1600), 16000)
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    escaped = printable(name).encode("ascii", "backslashreplace").decode()
    assert [name for name, _ in embed.find_files([str(tmp_path)])[0]] == ["plain.wav", escaped]


def test_averaged_rows_of_a_grid_are_told(folder, tmp_path, monkeypatch, capsys):
    """Averaging loses the frequency axis: a user who chose it neither here nor in the recipe hears of it."""
    command = ["grid", str(folder), "--out", str(tmp_path / "out"), "--overwrite", "--pooling", "mean"]
    for joined, rows, told, width in (
        ("average", [], True, 32),
        ("average", ["--rows", "average"], False, 32),
        ("average", ["--rows", "concatenate"], False, 128),
        ("concatenate", [], False, 128),
        ("concatenate", ["--rows", "average"], False, 32),
    ):
        changes = ["model.encoder.patch_height=16", f"model.encoder.join_rows={joined}"]
        grid = build_encoder(load_config("best_rq2_tiny", [*SMALL, *changes]).model, 1.0).eval()
        monkeypatch.setattr(embed, "open_encoder", lambda *arguments, grid=grid, **options: grid)
        assert embed.main([*command, *rows]) == 0
        assert ("the 4 frequency rows of this encoder are averaged" in capsys.readouterr().err) is told
        assert np.load(tmp_path / "out" / "clips.npy").shape[1] == width
        (row, *_) = csv.DictReader((tmp_path / "out" / "index.csv").read_text().splitlines())
        assert row["rows"] == (rows or ["", joined])[1]


@pytest.mark.parametrize("options", [[], ["--layers", "all"]])
def test_constant_features_are_told(run, folder, tmp_path, monkeypatch, capsys, options):
    """Those of an encoder that diverged are the same in every frame; one frame of another clip is not constant."""
    encoder = load(run)
    intact = encoder.encode_layers
    monkeypatch.setattr(embed, "open_encoder", lambda *arguments, **options: encoder)
    command = ["it", str(folder), "--out", str(tmp_path / "out"), "--overwrite", *options]

    def encode_layers(waveform, lengths, *arguments, **options):
        features, frames = intact(waveform, lengths, *arguments, **options)
        features[-1, lengths < case["shorter"]] = case["value"]
        return features, frames

    monkeypatch.setattr(encoder, "encode_layers", encode_layers)
    case = {}
    for shorter, value, told in ((0, 0.0, ""), (100, 0.0, "1 of 5"), (10**9, 0.0, "5 of 5"), (10**9, 0.5, "5 of 5")):
        case.update(shorter=shorter, value=value)
        assert embed.main(command) == 0
        error = capsys.readouterr().err
        assert (f"warning: {told} files embedded have constant features" in error) is bool(told)
        assert ("constant features" in error) is bool(told)


def test_load_is_frozen(run):
    encoder = load(run)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_stats_match_numpy(tmp_path, capsys):
    out = tmp_path / "stats.yaml"
    overrides = ["data.crop_seconds=3"]  # longer than the clips, so that all of every clip is measured
    assert stats.main(["--out", str(out), *overrides]) == 0
    from bestrq2.config import load_config
    from bestrq2.models import build_encoder

    log_mel = build_encoder(load_config("best_rq2_tiny").model).front_end
    frames = [log_mel(torch.from_numpy(load_audio(file.path))[None])[0][0].numpy() for file in tiny_dataset()]
    values = np.concatenate(frames).astype(np.float64)
    text = out.read_text()
    assert f"mean: {round(values.mean(), 4)}" in text
    assert f"std: {round(values.std(), 4)}" in text
    # The file is a recipe layer: it goes straight into --config.
    out.write_text("based_on: best_rq2_tiny\n" + text)
    assert load_config(str(out)).model.front_end.mean == round(values.mean(), 4)
