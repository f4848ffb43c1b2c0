"""Columns that choose channels of a file, which is not done: the mean in their place would be another signal."""

import csv
import json

import numpy as np
import pytest
import soundfile

from bestrq2.data import ManifestError, collect, read_manifest
from bestrq2.data.columns import of_archive
from bestrq2.data.manifest import write_manifest


def _written(folder, form, column, value, channels=1):
    """A list of one clip, and the place of its row for messages."""
    soundfile.write(folder / "a.wav", np.zeros((16000, channels)), 16000)
    if form == "jsonl":
        (folder / "m.jsonl").write_text(json.dumps({"path": "a.wav", column: value}) + "\n")
        return folder / "m.jsonl", "m.jsonl:1"
    if form == "csv":
        with open(folder / "m.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", column], ["a.wav", json.dumps(value)]])
        return folder / "m.csv", "m.csv:2"
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"path": ["a.wav"], column: [value]})
    if form == "parquet":
        parquet.write_table(table, folder / "m.parquet")
        return folder / "m.parquet", "m.parquet::0"
    with pyarrow.OSFile(str(folder / "m.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "m.arrow", "m.arrow:0"


FORMS = ["jsonl", "csv", "parquet", "arrow"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [[1], [0, 1], [-1], [1.0], ["1"], ["left"]], ids=str)
def test_lists_of_channels_are_refused(tmp_path, form, value):
    """They were labels, and the mean of all channels was taken."""
    path, where = _written(tmp_path, form, "channels", value)
    with pytest.raises(ManifestError, match=rf"{where[:-2]}.*: channels = .* cannot be applied, channels are averaged"):
        collect(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["channels", "Channels"])
def test_a_list_of_channel_0(tmp_path, form, column):
    path, _ = _written(tmp_path, form, column, [0])
    (item,), _ = collect(path, columns=True)
    assert item.columns == {column: "[0]" if form == "csv" else [0]}
    write_manifest(tmp_path / "again.csv", [item])
    assert len(read_manifest(tmp_path / "again.csv")) == 1
    (tmp_path / "two").mkdir()
    path, where = _written(tmp_path / "two", form, column, [0], channels=2)
    with pytest.raises(
        ManifestError, match=rf"{where[:-2]}.*: channel 0 of 2 cannot be applied, channels are averaged"
    ):
        collect(path)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["channel", "channel_id"])
def test_channel_0_of_several_in_tables(tmp_path, form, column):
    """It was refused in manifests alone."""
    path, where = _written(tmp_path, form, column, 0, channels=2)
    with pytest.raises(
        ManifestError, match=rf"{where[:-2]}.*: channel 0 of 2 cannot be applied, channels are averaged"
    ):
        collect(path)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("column", ["channel", "channel_selector", "channels_to_use"])
def test_lists_under_other_names(tmp_path, form, column):
    """In tables they were columns like any other."""
    path, _ = _written(tmp_path, form, column, [1])
    with pytest.raises(ManifestError, match=rf"{column} = \[1\] cannot be applied"):
        collect(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [2, 1, 0, "mono", ["BBC"], ["front", "rear"]], ids=str)
def test_counts_and_words_are_columns(tmp_path, form, value):
    path, _ = _written(tmp_path, form, "channels", value, channels=2)
    (item,), _ = collect(path, columns=True)
    assert item.columns == {"channels": json.dumps(value) if form == "csv" else value}


def test_lists_beside_clips_of_archives():
    """Audio there was cut out already; under another name they are not followed in what is written."""
    assert of_archive({"channels": [1]}, (), []) == {"source_channels": [1]}
    assert of_archive({"channels": 2}, (), []) == {"channels": 2}
