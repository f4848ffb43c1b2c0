"""python -m bestrq2.probe from a manifest to results beside their baselines."""

import csv
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from bestrq2 import load, probe
from bestrq2.config import ConfigError, load_config
from bestrq2.data import AudioFile, load_audio
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.layers import LogMel
from bestrq2.models import build_model
from bestrq2.outputs import alone_in
from bestrq2.probing import report
from bestrq2.probing.evaluation import Outcome, clip_rows
from bestrq2.probing.experiment import Experiment
from bestrq2.probing.features import Reading, clip_statistics, extract, frame_statistics, log_mel_frames
from bestrq2.probing.labels import LabelledClips
from bestrq2.probing.task import ProbeTask

SMALL = ["model.front_end.mean=-47", "model.front_end.std=31", "model.encoder.depth=1", "model.encoder.width=64"]


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(1)
    config = load_config("best_rq2_tiny", SMALL)
    write_encoder_file(path, config, build_model(config).state_dict())
    return path


def test_packaged_clips(encoder_file, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert probe.main([str(encoder_file), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "24 clips, 20 groups" in printed
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["classes"] == ["env", "music", "speech"]
    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(document["results"]) == {"encoder", "random initialisation", "log-mel statistics"}
    for name, entry in document["results"].items():
        for kind in ("linear", "knn"):
            recalls = [
                np.mean([row[f"{name} {kind}"] == label for row in rows if row["label"] == label])
                for label in document["classes"]
            ]
            value = entry[kind]["balanced_accuracy"]
            assert value["value"] == pytest.approx(np.mean(recalls))
            assert value["low"] <= value["value"] <= value["high"]
            assert f"{value['value']:.3f} [" in printed
            assert ("encoder_minus_this" in value) == (name != "encoder")
            assert [row["recall"] for row in entry[kind]["per_class"]] == pytest.approx(recalls)
    own, other = (document["results"][name]["knn"]["mAP"] for name in ("encoder", "log-mel statistics"))
    assert other["encoder_minus_this"]["value"] == pytest.approx(own["value"] - other["value"])
    with (tmp_path / "out" / "results.csv").open() as file:
        table = {(row["features"], row["head"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(table) == 3 * 2 * 4
    for (name, head, metric), row in table.items():
        assert float(row["value"]) == document["results"][name][head][metric]["value"]
    assert (tmp_path / "out" / "confusion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_own_manifest(encoder_file, tmp_path, capsys):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    rows = ["path,kind,take"]
    for i in range(12):
        time = np.arange(8000) / 16000
        tone = np.sin(2 * np.pi * (200 if i % 2 else 3000) * time) + 0.1 * rng.normal(size=8000)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * tone, 16000)
        rows.append(f"{i}.wav,{'low' if i % 2 else 'high'},{i // 2}")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows += ["broken.wav,low,9", "0.wav,,9"]
    manifest = tmp_path / "clips.csv"
    manifest.write_text("\n".join(rows))
    arguments = [
        str(encoder_file),
        str(manifest),
        "--label",
        "kind",
        "--out",
        str(tmp_path / "out"),
        "--pooling",
        "mean+std",
    ]
    assert probe.main([*arguments, "--group", "take"]) == 0
    printed = capsys.readouterr()
    assert "broken.wav" in printed.err
    assert "1 row without a label" in printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["clips"] == 12
    assert all(entry["linear"]["balanced_accuracy"]["value"] == 1.0 for entry in results["results"].values())
    assert probe.main([*arguments, "--overwrite"]) == 0
    assert "no --group" in capsys.readouterr().err
    assert probe.main([*arguments, "--group", "singer", "--overwrite"]) == 2
    assert "no column 'singer'; its columns are ['path', 'kind', 'take']" in capsys.readouterr().err


def test_without_sklearn(encoder_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert probe.main([str(encoder_file), "--out", str(tmp_path)]) == 2
    assert "pip install 'bestrq2[probe]'" in capsys.readouterr().err


def test_statistics_by_hand():
    noise = 0.1 * np.random.default_rng(0).normal(size=16000).astype(np.float32)
    log_mel = LogMel(n_fft=1024, win_length=400, hop_length=160, num_mels=64)
    frames = log_mel(torch.from_numpy(noise)[None])[0][0].numpy()
    rows = log_mel_frames(noise, log_mel)
    expected = [frames.mean(0), frames.std(0), [np.mean(np.abs(band[1:] - band[:-1])) for band in frames.T]]
    np.testing.assert_allclose(clip_statistics(rows), np.concatenate(expected), rtol=1e-4, atol=1e-4)
    # Frames of 40 ms: the 10 ms frames 4 .. 7 lie in the second. The last one of 101 lies behind 25 of them.
    blocks = frame_statistics(rows, 25, 0.04)
    second = frames[4:8]
    change = np.abs(frames[4:8] - frames[3:7])
    np.testing.assert_allclose(blocks[1], np.concatenate((second.mean(0), second.std(0), change.mean(0))), atol=1e-3)
    # Frames of 4 ms: most have no 10 ms frame of their own and take the nearest.
    fine = frame_statistics(rows, 250, 0.004)
    np.testing.assert_allclose(fine[3, :64], frames[1], atol=1e-3)
    np.testing.assert_allclose(fine[4, :64], frames[2], atol=1e-3)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """24 clips of 2 s in 8 takes: a low tone, a high tone or both at known times, over noise."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    clips, events = ["path,tags,take,tone,part"], ["path,onset,offset,label"]
    for i in range(24):
        time = np.arange(32000) / 16000
        wave, tags = 0.01 * rng.normal(size=32000), []
        for name, pitch, wanted in (("low", 300, i % 3 != 1), ("high", 3000, i % 3 != 0)):
            if wanted:
                onset = 0.25 * rng.integers(0, 5)
                wave += 0.2 * np.sin(2 * np.pi * pitch * time) * ((time >= onset) & (time < onset + 0.5))
                tags.append(name)
                events.append(f"{i}.wav,{onset},{onset + 0.5},{name}")
        soundfile.write(folder / f"{i}.wav", wave, 16000)
        clips.append(f"{i}.wav,{';'.join(tags)},{i // 3},{i % 3},{'query' if i < 12 else 'gallery'}")
    (folder / "clips.csv").write_text("\n".join(clips))
    (folder / "events.csv").write_text("\n".join(events))
    return folder


def run_kind(encoder_file, sounds, out, *options):
    arguments = [str(encoder_file), str(sounds / "clips.csv"), "--out", str(out), *options]
    assert probe.main(arguments) == 0
    return json.loads((out / "results.json").read_text())


def test_multilabel(encoder_file, sounds, tmp_path):
    options = ["--kind", "multilabel", "--label", "tags", "--group", "take", "--head", "linear,mlp", "--folds", "2"]
    document = run_kind(encoder_file, sounds, tmp_path, *options, "--pooling", "mean+std")
    assert document["classes"] == ["high", "low"]
    assert document["chance"] == pytest.approx(16 / 24)
    for entry in document["results"].values():
        for head in ("linear", "mlp"):
            assert entry[head]["mAP"]["value"] > 0.95
            assert entry[head]["macro_F1"]["value"] > 0.7
    with (tmp_path / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 24 * 2
    assert (tmp_path / "per_class.png").read_bytes()[:4] == b"\x89PNG"


def test_events(encoder_file, sounds, tmp_path, capsys):
    options = ["--kind", "events", "--events", str(sounds / "events.csv"), "--group", "take", "--folds", "3"]
    document = run_kind(encoder_file, sounds, tmp_path, *options, "--segment-seconds", "0.5")
    assert "frames of 40 ms" in capsys.readouterr().out
    assert document["rows"] == 24 * 50
    assert document["chance"] == pytest.approx(16 * 0.5 / (24 * 2), rel=0.05)
    for entry in document["results"].values():
        scores = entry["linear"]
        assert scores["frame_mAP"]["value"] > 0.9
        assert scores["frame_macro_F1"]["value"] > 0.7
        assert scores["segment_macro_F1"]["value"] > 0.7
        assert {row["class"] for row in scores["per_class"]} == {"high", "low"}
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 * 50 * 2
    assert rows[2]["onset"] == "0.040"


def test_retrieval(encoder_file, sounds, tmp_path, capsys):
    options = ["--kind", "retrieval", "--label", "tone", "--split", "part"]
    document = run_kind(encoder_file, sounds, tmp_path, *options)
    assert "12 in the gallery, 12 queries" in capsys.readouterr().out
    assert document["chance"] == pytest.approx(1 / 3)
    scores = document["results"]["log-mel statistics"]["cosine"]
    assert scores["R@1"]["value"] == 1.0
    assert scores["mAP"]["value"] > 0.7


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_predictions_keep_their_digits(tmp_path, kind):
    """Metrics can be computed again from the file, also those of dates and of rare labels."""
    numbers = np.array([1700000001.25, 1700000002.5, 20230115, 1e-9]) if kind == "regression" else np.eye(4, 1) > 0
    files = [AudioFile(f"{i}.wav") for i in range(4)]
    clips = LabelledClips(files, numbers, [] if kind == "regression" else ["rare"], np.arange(4), None)
    rows = clip_rows(clips, np.arange(4))
    scores = (numbers + 0.5 if kind == "regression" else np.array([4e-7, 3e-7, 2e-5, 1e-9])).reshape(4, 1)
    experiment = Experiment(ProbeTask(kind=kind), clips, np.arange(4), rows, {}, [1.0] * 4)
    path = report._predictions(tmp_path, {"encoder": {"linear": Outcome({}, scores=scores)}}, experiment)
    with path.open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["label"]) for row in written] == numbers.ravel().tolist()
    assert [float(row["encoder linear"]) for row in written] == pytest.approx(scores[:, 0].tolist(), rel=1e-11)


def test_regression_and_layers(encoder_file, sounds, tmp_path):
    options = ["--kind", "regression", "--label", "tone", "--group", "take", "--folds", "3", "--layers", "all"]
    document = run_kind(encoder_file, sounds, tmp_path, *options, "--head", "linear", "--pooling", "mean+std")
    names = ["encoder, layer 0", "encoder", "random initialisation, layer 0", "random initialisation"]
    means = [f"{name}, mean of layers" for name in names[1::2]]
    assert set(document["results"]) == {*names, *means, "log-mel statistics"}
    assert list(document["results"])[-1] == "log-mel statistics"
    assert document["results"]["log-mel statistics"]["linear"]["R2"]["value"] > 0.5
    first, last = (document["results"][name]["linear"]["R2"]["value"] for name in names[:2])
    assert first != last
    gap = document["results"]["random initialisation, layer 0"]["linear"]["R2"]["encoder_minus_this"]["value"]
    assert gap == pytest.approx(first - document["results"][names[2]]["linear"]["R2"]["value"])


def test_mean_of_layers(encoder_file, sounds):
    encoder = load(encoder_file)
    waveform = load_audio(sounds / "0.wav")
    source = lambda: iter([(AudioFile("0.wav"), waveform)])  # noqa: E731
    choices = {"sampling_rate": 16000, "hop": 0.04, "pooling": None, "with_log_mel": False}
    mean = Reading(", mean of layers", (0, None))
    each = [Reading(", layer 0", (0,)), Reading("", (None,))]
    both = extract(source(), {"e": encoder}, wanted=[*each, mean], **choices).of
    alone = extract(source(), {"e": encoder}, wanted=[mean], **choices).of
    expected = sum(torch.nn.functional.layer_norm(torch.tensor(both[n][0]), (64,)) for n in ("e, layer 0", "e")) / 2
    np.testing.assert_allclose(both["e, mean of layers"][0], expected, atol=1e-3)
    assert list(alone) == ["e, mean of layers"]
    assert (alone["e, mean of layers"][0] == both["e, mean of layers"][0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "7"], "--layers: expected all"),
        (["--layers", "0", "--layer", "0"], "--layer and --layers: give one of them"),
        (["--head", "svm"], "--head: expected some of linear, ridge, mlp, knn, got 'svm'"),
        (["--where", "tags"], "--where: expected COLUMN=VALUE"),
        (["--kind", "events"], "a table of events"),
        (["--batch-size", "0"], "--batch-size"),
        (["--kind", "regression"], "'tags' is no number: 'low'"),
        (["--where", "tone=0,1", "--group", "tone"], "do not occur in two groups"),
        (
            ["--label", "take", "--split", "part", "--split-values", "query", "gallery"],
            "do not occur in training, so",
        ),
    ],
)
def test_bad_options(encoder_file, sounds, tmp_path, capsys, options, message):
    arguments = [str(encoder_file), str(sounds / "clips.csv"), "--out", str(tmp_path), *options]
    assert probe.main([*arguments, *([] if "--label" in options else ["--label", "tags"])]) == 2
    assert message in capsys.readouterr().err


def test_spaces_around_values_of_an_option():
    options = probe.parse(["encoder", "m.csv", "--label", "a", "--where", "lang = it, fr", "--head", "linear, knn"])
    task = probe.task_of(options)
    assert task.where == (("lang", ("it", "fr")),)
    assert probe.heads_of(options, task) == ["linear", "knn"]


def test_spaces_around_values_of_a_split():
    options = probe.parse(["encoder", "m.csv", "--label", "a", "--split", "fold", "--split-values", "1, 2,3 , 4", " 5"])
    task = probe.task_of(options)
    assert (task.train_values, task.test_values) == (("1", "2", "3", "4"), ("5",))
    options.split_values = ["1,2, 4", "4,5"]
    with pytest.raises(ConfigError, match=r"^--split-values: '4' on both sides"):
        probe.task_of(options)


EVENTS, RETRIEVAL = ["--kind", "events", "--events", "t.csv"], ["--kind", "retrieval"]
NEEDED = {
    "--separator": ([";"], ["--kind", "multilabel"]),
    "--events": (["t.csv"], ["--kind", "events"]),
    "--label": (["tags"], []),
    "--split-values": (["a", "b"], ["--split", "part"]),
    "--folds": (["3"], []),
    "--head": (["linear"], []),
    "--regularisation": (["1"], ["--head", "ridge"]),
    "--threshold": (["0.7"], ["--kind", "multilabel"]),
    "--segment-seconds": (["2"], EVENTS),
    "--scaling": (["sides"], RETRIEVAL),
    "--pooling": (["max"], []),
    "--combine": (["average"], ["--layers", "middle"]),
}
USELESS = {"--label": EVENTS, "--folds": RETRIEVAL, "--head": RETRIEVAL, "--pooling": EVENTS}


@pytest.mark.parametrize("option", NEEDED)
def test_options_without_a_use_are_told(option):
    values, use = NEEDED[option]
    for others, told in ((use, []), (USELESS.get(option, ["--head", "knn"]), [option])):
        options = probe.parse(["encoder", "clips.csv", *others, option, *values])
        task = probe.task_of(options)
        notes = probe.unused(options, task, probe.heads_of(options, task))
        assert [note.split()[0] for note in notes] == told


def test_a_folder_that_another_process_writes_to_is_refused(encoder_file, sounds, tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = [str(encoder_file), str(sounds / "clips.csv"), "--label", "tone", "--group", "take", "--head", "knn"]
    with alone_in(tmp_path, ConfigError("")):
        assert probe.main([*arguments, "--folds", "2", "--out", str(tmp_path)]) == 2
    assert "--out: another process is writing to" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_another_encoder(sounds, tmp_path):
    """A module by file and name, whose baseline is itself with weights drawn anew."""
    (tmp_path / "tiny.py").write_text(
        "import torch\n"
        "class Tiny(torch.nn.Module):\n"
        "    sampling_rate, output_dim, hop_size_in_ms = 16000, 8, 10.0\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(5)\n"
        "        self.layer = torch.nn.Conv1d(1, 8, 400, stride=160, padding=200)\n"
        "    def forward(self, audio):\n"
        "        return self.layer(audio[:, None]).abs().transpose(1, 2)[:, : audio.shape[1] // 160]\n"
    )
    source = f"{tmp_path}/tiny.py:Tiny"
    document = run_kind(source, sounds, tmp_path / "out", "--label", "tone", "--group", "take", "--head", "linear")
    own, other = (document["results"][name]["linear"]["mAP"]["value"] for name in ("encoder", "random initialisation"))
    assert own != other


@pytest.mark.parametrize("family", ["Wav2Vec2", "Whisper"])
def test_transformers_baseline_is_built_anew(family, tmp_path):
    """By the model's own initialisation, not by that of its parts: norms of 1, no bias, and other weights."""
    transformers = pytest.importorskip("transformers")
    from bestrq2.interchange import open_encoder
    from bestrq2.probing.features import encode, untrained_copy

    if family == "Wav2Vec2":
        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        conv = {"conv_dim": (16,) * 3, "conv_kernel": (10, 8, 4), "conv_stride": (10, 8, 4)}
        more = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
        model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **conv, **more))
        transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2}
        sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        model = transformers.WhisperModel(transformers.WhisperConfig(**sizes))
        transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.05)
    model.save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    state = torch.get_rng_state()
    first, second, other = (untrained_copy(encoder, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    norms = [p for name, p in first.named_parameters() if "layer_norm.weight" in name]
    assert norms
    assert all((p == 1).all() for p in norms)
    clip = [np.random.default_rng(0).normal(size=16000).astype(np.float32)]
    values = [encode(e, clip, [0, None])[0] for e in (first, second, other, encoder)]
    assert (values[0] == values[1]).all()
    assert (values[0] != values[2]).any()
    assert values[3].shape == values[0].shape == (2, 1, values[0].shape[2], 32)
    assert np.isfinite(values[0]).all()


def test_one_class_is_refused_before_clips_are_encoded(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    path = tmp_path / "one.csv"
    path.write_text("path,label\n" + "".join(f"{number}.wav,dog\n" for number in range(4)))
    monkeypatch.setattr(probe, "open_pair", None)
    assert probe.main(["encoder", str(path), "--label", "label", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: expected at least two different labels that can be tested, got ['dog']\n"
    )
