"""Rows of an HDF5 file beside its clips: each clip has its own label, rate and columns, or there is an error."""

import re
import shutil

import numpy as np
import pytest

from bestrq2.data import DataError, audio_info, collect, load_audio, read_manifest
from bestrq2.manifest import main

h5py = pytest.importorskip("h5py")


def _grouped(path, clips, track_order=False, **rows):
    """Clip n, in the order of writing, has samples of 1000 (n + 1) and the row n of every array."""
    with h5py.File(path, "w") as file:
        file.attrs["sr"] = 16000
        group = file.create_group("waveform", track_order=track_order)
        for number, name in enumerate(clips):
            group[name] = np.full(16000, (number + 1) * 1000, "i2")
        for name, values in rows.items():
            file[name] = values
    return path


def _number(item) -> int:
    return round(float(load_audio(item.path)[0]) * 32768 / 1000) - 1


COUNTED = [str(n) for n in range(12)]
NUMBERED = [f"clip{n}" for n in range(12)]
LABELS = [f"label {n}" for n in range(12)]


@pytest.mark.parametrize(
    ("names", "track_order"),
    [
        (COUNTED, False),
        (NUMBERED, False),
        ([f"{n}.wav" for n in range(12)], False),
        ([f"{n}_{'dog' if n % 2 else 'elephant'}" for n in range(12)], False),
        (["b", "a", "c"], True),
    ],
    ids=["numbers", "numbered", "extension", "numbered first", "creation"],
)
@pytest.mark.parametrize("column", ["label", "domain", "split", "sampling_rate", "speaker", "target"])
def test_rows_in_an_open_order_are_refused(tmp_path, names, track_order, column):
    """Clips of a group are in the order of text, where 10 comes before 2: they had the labels of others."""
    count = len(names)
    values = {
        "sampling_rate": [16000 + n for n in range(count)],
        "target": np.eye(count, dtype=np.float32),
        "split": ["train", "test", "train"] * (count // 3),
    }.get(column, LABELS[:count])
    path = _grouped(tmp_path / "x.h5", names, track_order, **{column: values})
    if column == "sampling_rate":
        with h5py.File(path, "a") as file:
            del file.attrs["sr"]
    with pytest.raises(
        DataError, match=rf"x\.h5: .*'{column}' has one row for each clip .* order of the clips is open"
    ):
        collect(path, columns=True)
    with h5py.File(path, "a") as file:  # the remedy
        file["names"] = names
    files, _ = collect(path, columns=True, split=None)
    assert [item.path for item in files] == [f"{path}::{name}" for name in sorted(names)]
    for item in files:
        number = _number(item) if column != "sampling_rate" else names.index(item.path.partition("::")[2])
        said = {"label": item.label, "domain": item.domain, "sampling_rate": item.sampling_rate}
        found = said[column] if column in said else item.columns[column]
        np.testing.assert_array_equal(found, values[number])
        assert audio_info(item.path).sampling_rate == item.sampling_rate


@pytest.mark.parametrize("name", ["{:02}", "clip{:03}", "x{:02}.wav"])
@pytest.mark.parametrize("track_order", [False, True])
def test_rows_in_a_certain_order_are_used(tmp_path, name, track_order):
    path = _grouped(tmp_path / "x.h5", [name.format(n) for n in range(12)], track_order, label=LABELS)
    files, _ = collect(path)
    assert [item.label for item in files] == LABELS
    assert [_number(item) for item in files] == list(range(12))


def test_orders_that_make_no_difference(tmp_path):
    """Rows that are all the same, no rows, columns that were not asked for, and names of hashes."""
    files, _ = collect(_grouped(tmp_path / "same.h5", COUNTED, domain=["speech"] * 12, other=LABELS))
    assert [item.path.partition("::")[2] for item in files] == sorted(COUNTED)
    assert {item.domain for item in files} == {"speech"}
    assert len(collect(_grouped(tmp_path / "none.h5", COUNTED), columns=True)[0]) == 12
    hashes = sorted(["a1b2c3", "a10b2c", "f00001", "0a9b8c"])
    assert [i.label for i in collect(_grouped(tmp_path / "h.h5", hashes, label=hashes[::-1]))[0]] == hashes
    assert [i.label for i in collect(_grouped(tmp_path / "i.h5", hashes, label=list("abcd")))[0]] == list("abcd")


def test_names_of_clips_state_the_order(tmp_path):
    """Also where names as text and by number agree, and as paths with another extension."""
    path = _grouped(tmp_path / "x.h5", ["c", "a", "b"], label=list("CAB"), audio_name=["x/c.wav", "x/a.wav", "x/b.wav"])
    assert [(item.path[-1], item.label) for item in collect(path)[0]] == [("a", "A"), ("b", "B"), ("c", "C")]
    path = _grouped(tmp_path / "y.h5", ["c", "a", "b"], label=list("CAB"), names=["c", "a", "b"], other=list("abc"))
    with pytest.raises(DataError, match=r"'label' has one row for each clip .* order of the clips is open"):
        collect(path)


def test_attributes_of_clips(tmp_path):
    path = _grouped(tmp_path / "x.h5", COUNTED, names=COUNTED)
    with h5py.File(path, "a") as file:
        for number, name in enumerate(COUNTED):
            clip = file["waveform"][name]
            clip.attrs.update({"label": LABELS[number], "domain": b"speech", "split": "test", "speaker": number})
            clip.attrs["CLASS"] = "ARRAY"
    files, report = collect(path, columns=True)
    assert [item.label for item in files] == [LABELS[_number(item)] for item in files]
    assert {(item.domain, item.columns["split"]) for item in files} == {("speech", "test")}
    assert report.lost == ["speaker"]
    with h5py.File(shutil.copy(path, tmp_path / "z.h5"), "a") as file:
        file["label"] = LABELS[::-1]
    with pytest.raises(
        DataError, match=r"::0: .*the attribute 'label' is 'label 0', its row in the dataset .*'label 11'"
    ):
        collect(tmp_path / "z.h5")


def _rows(path, **values):
    with h5py.File(path, "w") as file:
        file["waveform"] = np.ones((4, 16000), np.int16)
        file.attrs["sample_rate"] = 16000
        for name, value in values.items():
            file[name] = value
    return path


@pytest.mark.parametrize("column", ["label", "domain", "split"])
@pytest.mark.parametrize("rows", [3, 5, (3, 2)])
def test_labels_of_another_number_of_clips_are_refused(tmp_path, column, rows):
    """All clips were without a label."""
    path = _rows(tmp_path / "x.h5", **{column: np.ones(rows)})
    with pytest.raises(DataError, match=rf"x\.h5: .*'{column}' has .*, and there are 4 clips: write one value"):
        collect(path)


@pytest.mark.parametrize("column", ["label", "domain"])
def test_a_table_is_no_label(tmp_path, capsys, column):
    """It was dropped without a word."""
    path = _rows(tmp_path / "x.h5", **{column: np.eye(4, 3, dtype=np.int8)})
    files, report = collect(path, columns=True)
    assert {getattr(item, column) for item in files} == {""}
    assert report.notes == [
        f"HDF5: '{column}' is of the shape (clips, 3), so it is no {column}, which is one text or number a clip; it is "
        "kept as a further column"
    ]
    assert [item.columns for item in files] == [{f"source_{column}": row} for row in np.eye(4, 3, dtype=int).tolist()]
    assert main([str(path), "--out", str(tmp_path / "m.csv")]) == 0
    assert f"'{column}' is of the shape (clips, 3)" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "m.csv")) == 4
    assert f"source_{column}" in (tmp_path / "m.csv").read_text()


@pytest.mark.parametrize("column", ["label", "domain", "split"])
@pytest.mark.parametrize("kind", ["scalar", "group", "wide", "empty", "texts"])
def test_what_is_no_label_and_not_kept(tmp_path, column, kind):
    path = _rows(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        if kind == "group":
            file.create_group(column)
        else:
            wide = np.zeros((4, 5000), np.int8)
            file[column] = {"scalar": "dog", "wide": wide, "empty": h5py.Empty("f4"), "texts": [["a", "b"]] * 4}[kind]
    files, report = collect(path, columns=True)
    assert report.lost == [column]
    assert [re.sub(" is .* so", " so", note) for note in report.notes] == [
        f"HDF5: '{column}' so it is no {column}, which is one text or number a clip"
    ]
    assert {(item.label, item.domain, str(item.columns)) for item in files} == {("", "", "{}")}


def test_numbers_as_labels(tmp_path):
    files, _ = collect(_rows(tmp_path / "x.h5", label=np.array([0, 1, np.nan, 2.5], np.float32), domain=[3, 2, 1, 0]))
    assert [(item.label, item.domain) for item in files] == [("0.0", "3"), ("1.0", "2"), ("", "1"), ("2.5", "0")]


@pytest.mark.parametrize("place", ["attribute", "dataset", "rows"])
@pytest.mark.parametrize("rate", [16, 44.1, 0, 2_000_000])
def test_rates_that_are_none_are_refused(tmp_path, place, rate):
    """A rate in kHz made clips of 2000 s of two seconds."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = np.ones((4, 32000), np.int16)
        (file.attrs if place == "attribute" else file)["sr"] = [rate] * 4 if place == "rows" else rate
    with pytest.raises(DataError, match=r"x\.h5: .*sr \(.*\) = .* is no sampling rate in Hz, which is from 1000"):
        collect(tmp_path / "x.h5")


def test_a_rate_of_one_clip_that_is_none(tmp_path):
    path = _rows(tmp_path / "x.h5")
    with h5py.File(path, "a") as file:
        del file.attrs["sample_rate"]
        file["sr"] = [16000, 16, 8000, 16000]
    files, report = collect(path)
    assert [(item.path[-1], item.sampling_rate) for item in files] == [("0", 16000), ("2", 8000), ("3", 16000)]
    assert [str(skip) for skip in report.skips] == [f"{path}::1: not decodable (sampling rate 16 Hz)"]


@pytest.mark.parametrize("rates", [8000, [8000] * 4, [16000, 16000, 16000, 8000]])
@pytest.mark.parametrize("first", ["attribute", "waveform"])
def test_rates_that_differ_are_refused(tmp_path, rates, first):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = np.ones((4, 16000), np.int16)
        (file if first == "attribute" else file["waveform"]).attrs["sr"] = 16000
        file["sampling_rate"] = rates
    expected = r"sr \(attribute of .*\) = 16000 and sampling_rate \(dataset\) = .*8000.* differ: remove"
    with pytest.raises(DataError, match=rf"x\.h5: .*{expected}"):
        collect(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["sampling_rate"][...] = 16000
    assert {item.sampling_rate for item in collect(tmp_path / "x.h5")[0]} == {16000}


def test_rate_beside_a_sampling_rate_is_a_column(tmp_path):
    """It was dropped without a word."""
    files, _ = collect(_rows(tmp_path / "x.h5", rate=[128000] * 4), columns=True)
    assert [(item.sampling_rate, item.columns) for item in files] == [(16000, {"rate": 128000})] * 4


def test_a_folder_in_the_group_is_skipped(tmp_path):
    """It ended the listing with an error of Python."""
    path = _grouped(tmp_path / "x.h5", ["a", "b"])
    with h5py.File(path, "a") as file:
        file["waveform/c/d"] = np.ones(16000, np.int16)
    files, report = collect(path)
    assert [item.path[-1] for item in files] == ["a", "b"]
    assert [str(skip) for skip in report.skips] == [f"{path}::c: not decodable (not one-dimensional samples)"]
