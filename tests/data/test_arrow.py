"""Hugging Face datasets on disk, read without that library: rows at random, bytes as they are."""

import contextlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from bestrq2.data import (
    AudioError,
    AudioFile,
    CropDataset,
    DataError,
    ManifestError,
    batches,
    collect,
    load_audio,
    tiny_dataset,
    write_manifest,
)
from bestrq2.data.parts import load_clip
from bestrq2.data.shards import pack

from .conftest import encoded

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FEATURES = {
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "label": {"names": ["low", "high"], "_type": "ClassLabel"},
    "domain": {"dtype": "string", "_type": "Value"},
}


def _table(items, with_bytes=True):
    """As ``datasets`` 5.2 lays out a table with an Audio column."""
    audio = [{"bytes": Path(i.path).read_bytes() if with_bytes else None, "path": i.path} for i in items]
    table = pyarrow.table(
        {
            "audio": pyarrow.array(audio, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})),
            "label": [n % 2 for n in range(len(items))],
            "domain": [item.domain for item in items],
        }
    )
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()})


def _save(folder: Path, items, shards: int = 2, **options) -> Path:
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for number, name in enumerate(names):
        table = _table(items[len(items) * number // shards : len(items) * (number + 1) // shards], **options)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "cache-1234.arrow").write_bytes(b"of a map()")
    return folder


def _check(files, items):
    assert [(item.domain, item.label) for item in files] == [
        (item.domain, ("low", "high")[n % 2]) for n, item in enumerate(items)
    ]
    for item, gold in zip(files, items, strict=True):
        np.testing.assert_array_equal(load_audio(item.path), load_audio(gold.path))


def test_saved_dataset(tmp_path):
    items = tiny_dataset()[4:12]
    folder = _save(tmp_path / "saved", items)
    files, report = collect(folder)
    assert [item.path for item in files[3:5]] == [
        f"{folder}/data-00000-of-00002.arrow::3",
        f"{folder}/data-00001-of-00002.arrow::0",
    ]
    assert len(report) == 0
    _check(files, items)
    np.testing.assert_array_equal(
        load_audio(files[0].path, start=0.5, duration=0.5), load_audio(items[0].path)[8000:16000]
    )


def test_rows_that_name_files(tmp_path):
    items = tiny_dataset()[:4]
    files, _ = collect(_save(tmp_path / "saved", items, with_bytes=False))
    assert [item.path for item in files] == [item.path for item in items]


def test_parquet(tmp_path):
    items = tiny_dataset()[:10]
    parquet.write_table(_table(items), tmp_path / "0000.parquet", row_group_size=3)
    files, _ = collect(tmp_path / "*.parquet")
    _check(files, items)
    assert collect(tmp_path)[0] == files  # a folder without audio files
    unknown = _table(items).set_column(1, "label", pyarrow.array([-1, None, 0, 1, *[-1] * 6]))
    parquet.write_table(unknown, tmp_path / "unknown.parquet")
    assert [item.label for item in collect(tmp_path / "unknown.parquet")[0]] == ["", "", "low", "high", *[""] * 6]
    plain = _table(items).replace_schema_metadata(None).rename_columns(["sound", "n", "domain"])
    parquet.write_table(plain, tmp_path / "plain.parquet")
    np.testing.assert_array_equal(load_audio(f"{tmp_path}/plain.parquet::7"), load_audio(items[7].path))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_training_batches_manifest_and_shards(tmp_path):
    items = [AudioFile(item.path, item.duration, item.sampling_rate, item.domain) for item in tiny_dataset()[:6]]
    files, _ = collect(_save(tmp_path / "saved", items))
    write_manifest(tmp_path / "m.csv", files)
    sources = [items, files, collect(tmp_path / "m.csv")[0], pack(files, tmp_path / "shards").files]
    streams = [list(batches(CropDataset(found, 0.7), 4, num_steps=4)) for found in sources]
    streams.append(list(batches(CropDataset(files, 0.7), 4, num_steps=4, workers=2)))
    for stream in streams[1:]:
        for batch, gold in zip(stream, streams[0], strict=True):
            assert torch.equal(batch.waveform, gold.waveform)


def test_faults_are_named(tmp_path):
    items = tiny_dataset()[:6]
    folder = _save(tmp_path / "saved", items)
    first = folder / "data-00000-of-00002.arrow"
    for name in ("3", "-1", "x"):
        with pytest.raises(AudioError, match=r"missing \(the file has rows 0 to 2\)"):
            load_audio(f"{first}::{name}")
    # a cut file: rows before the cut are used, the rest is counted
    table = _table(tiny_dataset())
    with pyarrow.OSFile(str(tmp_path / "cut.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=4)
    content = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    files, report = collect(tmp_path / "cut.arrow")
    assert 4 <= len(files) <= 12
    assert len(files) % 4 == 0
    assert "rows can be read, then: " in str(report.skips[0])
    _check(files, tiny_dataset()[: len(files)])
    for name, bad, reason in (
        ("text.parquet", b"hello", "damaged archive .text instead of the file: hello"),
        ("text.arrow", b"\1hello", "damaged archive"),
        ("zero.arrow", b"", "empty file"),
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=reason):
            collect(tmp_path / name)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"no audio column: .*; the columns are text \(string\)"):
        collect(tmp_path / "other.parquet")
    empty = _table(items[:2]).set_column(0, "audio", pyarrow.array([{"bytes": b"", "path": None}] * 2))
    parquet.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"2 skipped: 2 empty file"):
        collect(tmp_path / "empty.parquet")
    first.unlink()
    with pytest.raises(DataError, match="is missing from the dataset"):
        collect(folder)
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a dataset of save_to_disk"):
        collect(folder)


@pytest.mark.parametrize("extension", ["arrow", "parquet"])
def test_random_damage(tmp_path, damaged_copies, extension):
    """Only clear errors come out, and never a crash; rows that are not listed are reported."""
    audio = [{"bytes": encoded(0.3, n), "path": None} for n in range(6)]
    table = pyarrow.table({"audio": audio, "domain": ["a"] * 6})
    path = tmp_path / f"x.{extension}"
    if extension == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    usable = 0
    for copy in damaged_copies(path, 120):
        try:
            files, report = collect(copy)
        except DataError:
            continue
        assert len(files) == 6 or report.skips
        for item in files:
            with contextlib.suppress(AudioError):
                usable += len(load_audio(item.path)) == 4800
    assert usable > 120


def test_the_limit_of_open_files_is_no_damage(tmp_path, no_more_files):
    _save(folder := tmp_path / "saved", tiny_dataset()[:2], shards=1)
    pyarrow.parquet.write_table(_table(tiny_dataset()[:2]), table := tmp_path / "rows.parquet")
    from bestrq2.data.archives import arrow  # noqa: F401  (afterwards no module can be opened)

    no_more_files()
    for source in (folder / "data-00000-of-00001.arrow", table, folder):
        with pytest.raises(DataError, match=r"Too many open files; .*ulimit -n"):
            collect(source)
    with pytest.raises(DataError, match=r"Too many open files; .*ulimit -n"):
        load_audio(f"{table}::0")


def test_splits_must_be_named(tmp_path):
    for split in ("train", "test"):
        _save(tmp_path / "both" / split, tiny_dataset()[:4])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="has the splits train, test: name those to use"):
        collect(tmp_path / "both")
    assert len(collect(tmp_path / "both" / "train")[0]) == 4
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(collect(tmp_path / "both")[0]) == 4


def test_without_pyarrow(tmp_path, monkeypatch):
    folder = _save(tmp_path / "saved", tiny_dataset()[:4])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'need pyarrow: pip install "bestrq2\[datasets\]"'):
        collect(folder)
    with pytest.raises(DataError, match="need pyarrow"):  # it is no fault of the clip
        load_audio(f"{folder / 'data-00000-of-00002.arrow'}::0")
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))  # of an empty folder of this name
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(DataError, match="need pyarrow"):
        collect(folder)


def test_as_the_library_writes_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    items = tiny_dataset()[:10]
    features = {
        "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "label": datasets.ClassLabel(names=["low", "high"]),
        "domain": datasets.Value("string"),
    }
    columns = {
        "audio": [{"bytes": None, "path": item.path} for item in items],
        "label": [n % 2 for n in range(10)],
        "domain": [item.domain for item in items],
    }
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made = made.cast_column("audio", datasets.Audio(sampling_rate=16000))
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    _check(collect(tmp_path / "saved")[0], items)
    made.to_parquet(tmp_path / "x.parquet")
    _check(collect(tmp_path / "x.parquet")[0], items)
    made.select([4, 1, 7]).save_to_disk(tmp_path / "selected")  # rows of a selection are written in its order
    for item, number in zip(collect(tmp_path / "selected")[0], (4, 1, 7), strict=True):
        np.testing.assert_array_equal(load_audio(item.path), load_audio(items[number].path))


def _files_of_levels(folder):
    """0.1, 0.2 and 0.3, a second each, as a file and as what a column with audio holds."""
    samples = np.repeat(np.array([0.1, 0.2, 0.3], np.float32), 16000)
    soundfile.write(folder / "long.wav", samples, 16000)
    return {"bytes": None, "path": "long.wav"}, {"bytes": (folder / "long.wav").read_bytes(), "path": "long.wav"}


def _write(path, columns, metadata=None, **options):
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table(
        {
            name: pyarrow.array(values, kind) if isinstance(values[0], dict) else values
            for name, values in columns.items()
        }
    )
    table = table.replace_schema_metadata(metadata)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_rows_that_name_files_are_read_as_those_of_a_manifest(tmp_path, suffix):
    """Each was the whole file, whatever start, end and channel said."""
    outside, inside = _files_of_levels(tmp_path)
    parts = {"start": [0.0, 1.0, 2.0], "end": [1.0, 2.0, 3.0], "label": [0, 1, 2]}
    files, _ = collect(_write(tmp_path / f"parts{suffix}", {"audio": [outside] * 3, **parts}))
    assert [(item.duration, item.label) for item in files] == [(1.0, "0"), (1.0, "1"), (1.0, "2")]
    assert [round(float(load_clip(item).mean()), 3) for item in files] == [0.1, 0.2, 0.3]
    with pytest.raises(ManifestError, match="channel = 1 cannot be applied"):
        collect(_write(tmp_path / f"channel{suffix}", {"audio": [outside], "channel": [1]}))
    # Audio in the table is what was cut out already.
    files, _ = collect(_write(tmp_path / f"cut{suffix}", {"audio": [inside], "start": [1.0], "end": [4.0]}))
    assert [(item.start, item.end, item.duration) for item in files] == [(0.0, None, 3.0)]


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
@pytest.mark.parametrize("name", ["path", "File", "audio_filepath", "audio"])
def test_paths_in_a_column_of_text(tmp_path, name, suffix):
    """As pandas writes a manifest: it was reported to have no audio column."""
    _files_of_levels(tmp_path)
    columns = {name: ["long.wav"] * 2, "label": ["a", "b"], "offset": [0.0, 1.0], "duration": [1.0, 1.0]}
    if name != "audio_filepath":
        columns["end"] = [1.0, 2.0]
    files, _ = collect(_write(tmp_path / f"x{suffix}", columns))
    assert [(item.path, item.duration, item.label) for item in files] == [
        (str(tmp_path / "long.wav"), 1.0, "a"),
        (str(tmp_path / "long.wav"), 1.0, "b"),
    ]
    assert [round(float(load_clip(item).mean()), 3) for item in files] == [0.1, 0.2]
    with pytest.raises(DataError, match="several columns with audio, file, wav_path"):
        collect(_write(tmp_path / f"two{suffix}", {"file": ["long.wav"], "wav_path": ["b.wav"]}))


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
@pytest.mark.parametrize("form", ["large", "dictionary", "without statistics", "mixed"])
def test_rows_that_name_files_in_other_forms(tmp_path, suffix, form):
    """They were whole files, as if the audio were in the table."""
    outside, inside = _files_of_levels(tmp_path)
    starts, audio, metadata = [0.0, 1.0, 2.0], [outside] * 3, None
    if form in ("large", "dictionary"):
        kind = pyarrow.large_string() if form == "large" else pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
        audio = pyarrow.array(["long.wav"] * 3).cast(kind)
        metadata = {"huggingface": json.dumps({"info": {"features": {"audio": {"_type": "Audio"}}}})}
    if form == "mixed":
        audio = [outside, inside, outside]
    columns = {"audio": audio, "start": starts, "end": [start + 1 for start in starts]}
    options = {"write_statistics": False} if form == "without statistics" and suffix == ".parquet" else {}
    files, _ = collect(_write(tmp_path / f"x{suffix}", columns, metadata, **options))
    levels = [round(float(load_clip(item).mean()), 3) for item in files]
    assert levels == [0.1, 0.2, 0.3]  # 0.2 is also the mean of all
    assert [item.duration for item in files] == ([1.0, 1.0, 1.0] if form != "mixed" else [1.0, 3.0, 1.0])


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
def test_columns_that_decide_what_is_trained_on(tmp_path, suffix):
    outside, inside = _files_of_levels(tmp_path)
    for number, audio in enumerate((outside, inside)):
        path = _write(tmp_path / f"split{number}{suffix}", {"audio": [audio] * 3, "Split": ["train", "test", "train"]})
        files, report = collect(path)
        assert len(files) == 2
        assert "(2 train, 1 test) only train is used" in report.notes[0]
        assert len(collect(path, split=None)[0]) == 3
        with pytest.raises(DataError, match=r"has 3\.000 s, the list says 3000, which looks like milliseconds"):
            collect(_write(tmp_path / f"ms{number}{suffix}", {"audio": [audio] * 2, "duration": [3000.0] * 2}))
    two = {"noisy": [inside], "clean": [inside]}
    with pytest.raises(DataError, match="several columns with audio, noisy, clean: call the one that is meant audio"):
        collect(_write(tmp_path / f"two{suffix}", two))
    assert len(collect(_write(tmp_path / f"three{suffix}", two | {"audio": [inside]}))[0]) == 1


def test_columns_of_bytes(tmp_path):
    """Audio files as plain binary under the name audio are read; of others it is told what they are."""
    items = tiny_dataset()[:3]
    contents = [Path(item.path).read_bytes() for item in items]
    for kind in (pyarrow.binary(), pyarrow.large_binary()):
        audio = pyarrow.array([*contents, None], kind)
        table = pyarrow.table({"path": [item.path for item in items] + ["x"], "audio": audio, "label": [0, 1, 2, 3]})
        parquet.write_table(table, tmp_path / "x.parquet")
        with pyarrow.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
        for name in ("x.parquet", "x.arrow"):
            found, report = collect(tmp_path / name)
            assert [item.label for item in found] == ["0", "1", "2"]
            assert [skip.reason for skip in report.skips] == ["empty file"]
            for item, source in zip(found, items):
                assert np.array_equal(load_audio(item.path), load_audio(source.path))
    parquet.write_table(pyarrow.table({"wav": contents, "n": [1, 2, 3]}), tmp_path / "y.parquet")
    with pytest.raises(
        DataError, match=r"as binary in a column called audio, .*the columns are wav \(binary\), n \(int"
    ):
        collect(tmp_path / "y.parquet")
