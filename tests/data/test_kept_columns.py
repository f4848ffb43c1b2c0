"""Packing and listing keep the columns of their source: names and values, exactly, and never as another audio."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from bestrq2 import manifest, shards
from bestrq2.data import collect, read_manifest
from bestrq2.data.columns import LARGEST
from bestrq2.data.manifest import read_rows
from bestrq2.data.parts import load_clip
from bestrq2.probing import ProbeTask
from bestrq2.probing.labels import read_clips

BASE = {"duration", "sampling_rate", "domain"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, name in enumerate(("a.wav", "b.wav")):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, 16000)
        soundfile.write(tmp_path / name, noise, 16000)
    return tmp_path


def packed(source, out) -> list[dict]:
    """The .json of every clip beside what each has."""
    assert shards.main([str(source), "--out", str(out)]) == 0
    with tarfile.open(out / "shards-000000.tar") as tar:
        rows = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    return [{name: value for name, value in row.items() if name not in BASE} for row in rows]


def listed(source, out) -> list[dict]:
    """Rows of the manifest of a source, without path, duration and so on."""
    if out.suffix == ".csv":
        assert manifest.main([str(source), "--out", str(out), "--overwrite"]) == 0
    rows = [row for _, row in read_rows(out if out.suffix == ".csv" else out / "manifest.csv")]
    return [{name: value for name, value in row.items() if name not in BASE | {"path"}} for row in rows]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def notes(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "not kept" in line]


def test_labels_of_a_table(folder, capsys):
    (folder / "lab.csv").write_text(
        "path,kind,rec,label,Split,recording,empty\na.wav,dog,r1, x ,,7,\nb.wav, cat,,y,train,08,\n"
    )
    rows = [
        {"label": "x", "kind": "dog", "rec": "r1", "Split": "", "recording": "7", "empty": ""},
        {"label": "y", "kind": " cat", "rec": "", "Split": "train", "recording": "08", "empty": ""},
    ]
    assert packed(folder / "lab.csv", folder / "sh") == rows
    assert packed(folder / "sh", folder / "again") == rows
    assert packed(folder / "sh" / "manifest.csv", folder / "of_list") == rows
    assert not notes(capsys.readouterr().out)
    for row in rows:
        row["split"] = row["Split"]  # read_rows adds the name that is known
    assert listed(folder / "lab.csv", folder / "m.csv") == rows
    assert listed(None, folder / "sh") == listed(None, folder / "again") == rows


VALUES = {
    "text": 'Grüße, "you"',
    "whole": 12345678901234567890,
    "number": 0.1,
    "small": -1e-300,
    "yes": True,
    "none": None,
    "list": ["dog", "wind, rain", None, 3],
    "object": {"deep": [1.5, {"x": "y"}]},
    "": "no name",
    "text of lines": "first\nsecond, with, many, commas,,,,,,,,,,,,,,,,,,\nthird\r\nfourth",
}
CELLS = {
    **VALUES,
    "whole": "12345678901234567890",
    "number": "0.1",
    "small": "-1e-300",
    "yes": "True",
    "none": "",
    "list": '["dog", "wind, rain", null, 3]',
    "object": '{"deep": [1.5, {"x": "y"}]}',
}


def test_values_of_every_kind(folder):
    (folder / "m.jsonl").write_text(lines([{"path": "a.wav", **VALUES}, {"path": "b.wav", "label": ["x", "y"]}]))
    rows = [{"label": "", **VALUES}, {"label": ["x", "y"]}]
    assert packed(folder / "m.jsonl", folder / "sh") == packed(folder / "sh", folder / "again") == rows
    cells = [{"label": "", **CELLS}, {"label": '["x", "y"]', **dict.fromkeys(CELLS, "")}]
    assert listed(folder / "m.jsonl", folder / "m.csv") == listed(None, folder / "sh") == cells
    assert listed(folder / "sh", folder / "of_shards.csv") == cells
    assert [item.label for item in collect(folder / "sh")[0]] == ["", '["x", "y"]']


def test_probes_find_labels_groups_and_splits_in_what_was_packed(folder):
    rows = [
        {"path": "a.wav", "tags": ["dog", "wind"], "speaker": 1, "set": "train"},
        {"path": "b.wav", "tags": ["dog"], "speaker": 1, "set": "dev"},
    ]
    (folder / "m.jsonl").write_text(lines(rows))
    (folder / "none.jsonl").write_text(lines(rows[:1]))
    packed(folder / "none.jsonl", folder / "train")
    assert manifest.main([str(folder / "m.jsonl"), "--out", str(folder / "m.csv")]) == 0
    assert [row["set"] for _, row in read_rows(folder / "m.csv")] == ["train", "dev"]
    for place, targets in ((folder / "train" / "manifest.csv", [[1, 1]]), (folder / "m.csv", [[1, 1], [1, 0]])):
        clips = read_clips(ProbeTask(str(place), "multilabel", "tags", group="speaker"))
        assert clips.classes == ["dog", "wind"]
        assert clips.targets.tolist() == targets
    packed(folder / "train", folder / "again")
    assert collect(folder / "again", split="validation")[0]
    packed(folder / "m.jsonl", folder / "both")
    for place in (folder / "both", folder / "both" / "manifest.csv", folder / "m.csv"):
        assert [Path(item.path).stem[-1] for item in collect(place)[0]] == ["a"]  # training on it
        assert [Path(item.path).stem[-1] for item in collect(place, split="validation")[0]] == ["b"]


def test_lists_as_labels(folder):
    """A probe reads in the CSV that was made of a source what it reads in the source."""
    labels = [["dog", 'it\'s; "wind"'], ["rain"]]
    rows = [{"path": f"{name}.wav", "label": label} for name, label in zip("ab", labels)]
    (folder / "m.jsonl").write_text(lines(rows))
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"audio": ["a.wav", "b.wav"], "label": labels})
    parquet.write_table(table, folder / "t.parquet")
    packed(folder / "m.jsonl", folder / "sh")
    for number, source in enumerate((folder / "m.jsonl", folder / "t.parquet", folder / "sh")):
        assert [json.loads(row["label"]) for row in listed(source, folder / f"{number}.csv")] == labels
        for place in (folder / f"{number}.csv", folder / "m.jsonl"):
            clips = read_clips(ProbeTask(str(place), "multilabel", "label"))
            assert clips.classes == ["dog", 'it\'s; "wind"', "rain"]


def test_splits_that_names_say_are_kept_as_a_column(folder):
    """Of folders, and of shards, where a column ``split`` that means something else is renamed."""
    for split, name in (("train-clean", "a"), ("test", "b")):
        (folder / "corpus" / split).mkdir(parents=True)
        (folder / f"{name}.wav").rename(folder / "corpus" / split / f"{name}.wav")
    (folder / "m.jsonl").write_text(lines([{"path": "corpus/test/b.wav", "split": "seven"}]))
    assert [row["split"] for row in packed(folder / "corpus", folder / "sh")] == ["test", "train"]
    assert [row["split"] for row in listed(folder / "corpus", folder / "m.csv")] == ["test", "train"]
    for place in (folder / "corpus", folder / "sh", folder / "sh" / "manifest.csv", folder / "m.csv"):
        assert len(collect(place)[0]) == len(collect(place, split="test")[0]) == 1

    packed(folder / "m.jsonl", folder / "of_test")
    packed(folder / "corpus" / "train-clean", folder / "of_train")
    (folder / "shards").mkdir()
    for split in ("train", "test"):
        (folder / f"of_{split}" / "shards-000000.tar").rename(folder / "shards" / f"{split}-000000.tar")
    assert packed(folder / "shards", folder / "again") == [
        {"label": "", "source_split": "seven", "split": "test"},
        {"label": "", "split": "train"},
    ]


def test_parts_are_cut_once(folder):
    (folder / "m.csv").write_text("path,label,start,end,t0,t1,length_sec\na.wav,x,0.25,0.75,3,4,0.5\nb.wav,y,,,,,\n")
    place = {"source_path": "a.wav", "source_start": 0.25, "source_end": 0.75}
    rows = [
        {"label": "x", "source_t0": "3", "source_t1": "4", **place},
        {"label": "y", "t0": "", "t1": "", "length_sec": ""},
    ]
    assert packed(folder / "m.csv", folder / "sh") == packed(folder / "sh", folder / "again") == rows
    (whole, _) = read_manifest(folder / "m.csv")
    for source in (folder / "sh", folder / "sh" / "manifest.csv", folder / "again"):
        files, _ = collect(source)
        assert [(item.is_part, item.duration) for item in files] == [(False, 0.5), (False, 1.0)]
        np.testing.assert_array_equal(load_clip(files[0]), load_clip(whole))
    assert manifest.main([str(folder / "m.csv"), "--out", str(folder / "out.csv")]) == 0
    assert [(item.start, item.end) for item in collect(folder / "out.csv")[0]] == [(0.25, 0.75), (0.0, None)]
    assert "source_path" not in listed(folder / "m.csv", folder / "out.csv")[0]
    # A part of a part is another place, and the recording stays.
    (address, *_), _ = collect(folder / "sh")
    (folder / "n.jsonl").write_text(lines([{"path": address.path, "start": 0.0, "end": 0.25, "source_path": "a.wav"}]))
    (row,) = packed(folder / "n.jsonl", folder / "twice")
    assert row == {
        "label": "",
        "source_path": "a.wav",
        "source_source_path": "a.flac",
        "source_source_start": 0.0,
        "source_source_end": 0.25,
    }


def test_lists_of_whole_files_say_nothing_of_places(folder):
    (folder / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1.0, "channel": 0, "Label": "x"}\n')
    assert packed(folder / "m.jsonl", folder / "of_list") == [{"label": "x", "channel": 0}]
    assert packed(folder, folder / "sh") == [{"label": ""}, {"label": ""}]


def test_neutral_numbers_keep_their_names(folder):
    """In archives a gain of 1 was called source_gain, and in manifests it was left out."""

    def both(gains):
        rows = [{"tempo": 1.0, "gain": gain} for gain in gains]
        names = ("a.wav", "b.wav")
        (folder / "m.jsonl").write_text(lines([{"path": name} | row for name, row in zip(names, rows)]))
        with tarfile.open(folder / "s.tar", "w") as tar:
            for name, row in zip(names, rows):
                for member, content in ((name, (folder / name).read_bytes()), (name[:2] + "json", json.dumps(row))):
                    content = content.encode() if isinstance(content, str) else content
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        return [{"label": ""} | row for row in rows]

    rows = both([1.0, 0.0])
    for source, out in (("m.jsonl", "of_list"), ("s.tar", "of_shard"), ("of_shard", "again")):
        assert packed(folder / source, folder / out) == rows
        assert listed(folder / source, folder / "out.csv") == listed(None, folder / out)
        assert listed(None, folder / out) == [{k: str(v) for k, v in row.items()} for row in rows]
    both([1.0, 0.5])  # one column stays one, under a name that is not followed
    kept = [{"label": "", "tempo": 1.0, "source_gain": gain} for gain in (1.0, 0.5)]
    assert packed(folder / "s.tar", folder / "mixed") == packed(folder / "mixed", folder / "mixed again") == kept


def test_what_is_beside_clips_of_shards(folder):
    row = {"offset": 3.5, "audio_filepath": "x.wav", "channel": 1, "timestamp": "2024-01-01", "label": 0, "id": [1]}
    with tarfile.open(folder / "s.tar", "w") as tar:
        members = {"a.wav": (folder / "a.wav").read_bytes(), "a.json": json.dumps(row).encode(), "a.txt": b"words \n"}
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    kept = {
        "label": 0,
        "txt": "words \n",
        "source_offset": 3.5,
        "source_audio_filepath": "x.wav",
        "source_channel": 1,
        "timestamp": "2024-01-01",
        "id": [1],
    }
    assert packed(folder / "s.tar", folder / "sh") == [kept]
    assert packed(folder / "sh", folder / "again") == [kept]
    (cells,) = listed(folder / "s.tar", folder / "m.csv")
    assert cells == {name: value if isinstance(value, str) else json.dumps(value) for name, value in kept.items()}
    assert collect(folder / "m.csv")[0][0].duration == 1.0
    assert collect(folder / "s.tar")[0][0].columns is None  # training does not hold them


def test_cuts_of_lhotse(folder):
    source = {"type": "file", "channels": [0], "source": "a.wav"}
    recording = {"id": "r", "sources": [source], "sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    said = [{"id": "s", "recording_id": "r", "start": 0.0, "duration": 0.5, "text": "hi"}]
    cut = {"id": "c", "start": 0.25, "duration": 0.5, "channel": 0, "supervisions": said, "recording": recording}
    (folder / "c.jsonl").write_text(lines([cut | {"type": "MonoCut"}]))
    place = {"source_path": "a.wav", "source_start": 0.25, "source_end": 0.75}
    assert packed(folder / "c.jsonl", folder / "sh") == [{"label": "", "id": "c", "supervisions": said, **place}]
    assert collect(folder / "sh" / "manifest.csv")[0][0].duration == 0.5


def test_common_voice(folder):
    """Its table is beside ``clips``; a list made of it names that folder, and is read as it is written."""
    (folder / "clips").mkdir()
    (folder / "a.wav").rename(folder / "clips" / "a.wav")
    (folder / "t.tsv").write_text("client_id\tpath\tsentence\nx1\ta.wav\tHello\n")
    rows = [{"label": "", "client_id": "x1", "sentence": "Hello"}]
    assert listed(folder / "t.tsv", folder / "m.csv") == rows
    assert [item.path for item in read_manifest(folder / "m.csv")] == [str(folder / "clips" / "a.wav")]


def test_what_cannot_be_kept_is_named(folder, capsys):
    long = {"path": "a.wav", "kind": "dog", "long": "x" * LARGEST, "half": "\ud800", "zero": "\0", "more": "é" * 9000}
    (folder / "m.jsonl").write_text(lines([long, {"path": "b.wav", "long": "y"}]))
    rows = [{"label": "", "kind": "dog", "more": "é" * 9000}, {"label": "", "long": "y"}]
    assert packed(folder / "m.jsonl", folder / "sh") == rows
    (note,) = notes(capsys.readouterr().out)
    assert note.startswith("note: 3 columns not kept, or not of all clips: half, zero, long. ")
    assert listed(folder / "m.jsonl", folder / "m.csv") == [
        {"label": "", "kind": "dog", "more": "é" * 9000, "long": ""},
        {"label": "", "kind": "", "more": "", "long": "y"},
    ]
    assert len(notes(capsys.readouterr().out)) == 1


def test_columns_of_hdf5(folder, capsys):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "x.h5", "w") as file:
        file["waveform"] = np.ones((2, 800), np.int16) * np.array([[500], [600]], np.int16)
        file["target"] = np.array([[0, 128], [3, 255]], np.uint8)
        file["audio_name"] = np.array([b"Y1.wav", b"Y2.wav"])
        file["speaker"] = ["ä", ""]
        file["start"] = np.array([1.5, 2.5])
        file["table"] = np.zeros(3)
    rows = [
        {"label": "", "audio_name": "Y1.wav", "speaker": "ä", "source_start": 1.5, "target": [0, 128]},
        {"label": "", "audio_name": "Y2.wav", "speaker": "", "source_start": 2.5, "target": [3, 255]},
    ]
    assert packed(folder / "x.h5", folder / "sh") == packed(folder / "sh", folder / "again") == rows
    (note,) = notes(capsys.readouterr().out)
    assert "1 column not kept, or not of all clips: table. " in note


def test_columns_of_parquet(folder, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = [(folder / name).read_bytes() for name in ("a.wav", "b.wav")]
    classes = {"names": ["dog", "wind"], "_type": "ClassLabel"}
    features = {"tags": {"feature": classes, "_type": "Sequence"}, "kind": classes}
    table = pyarrow.table(
        {
            "audio": pyarrow.array(
                [{"bytes": content, "path": None} for content in contents],
                pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
            ),
            "tags": pyarrow.array([[0, 1], None], pyarrow.list_(pyarrow.int64())),
            "kind": [1, 0],
            "day": pyarrow.array([1, None], pyarrow.timestamp("ns")),
            "price": pyarrow.array(["1.50", "2.25"]).cast(pyarrow.decimal128(5, 2)),
            "single": pyarrow.array([0.5, float("nan")], pyarrow.float32()),
            "end": [3.5, 4.5],
            "raw": [b"x", b"y"],
        }
    ).replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    parquet.write_table(table, folder / "x.parquet", row_group_size=1)
    day = "1970-01-01 00:00:00.000000001"
    rows = [
        {"label": "", "tags": ["dog", "wind"], "kind": "wind", "day": day, "price": "1.50", "single": 0.5},
        {"label": "", "tags": None, "kind": "dog", "day": None, "price": "2.25", "single": None},
    ]
    rows = [row | {"source_end": end} for row, end in zip(rows, (3.5, 4.5))]
    assert packed(folder / "x.parquet", folder / "sh") == packed(folder / "sh", folder / "again") == rows
    assert ": raw. " in notes(capsys.readouterr().out)[0]
    with pyarrow.OSFile(str(folder / "x.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert packed(folder / "x.arrow", folder / "of_arrow") == rows
    names = table.drop_columns(["audio", "raw", "end"]).append_column("audio", [["a.wav", "b.wav"]])
    features["audio"] = {"_type": "Audio"}
    names = names.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    parquet.write_table(names, folder / "y.parquet")
    for row in rows:
        del row["source_end"]
    assert packed(folder / "y.parquet", folder / "of_names") == rows
