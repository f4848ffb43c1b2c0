"""Rows that mean a part of a file are read as that part or refused, never taken as the whole file."""

import json

import pytest

from bestrq2.data.columns import of_archive, of_manifest
from bestrq2.data.fields import known_columns
from bestrq2.data.manifest import read_manifest
from bestrq2.errors import ManifestError


@pytest.fixture(params=["csv", "jsonl"])
def read(tmp_path, request):
    """The only file of a manifest with one row."""

    def of(row):
        table = tmp_path / f"m.{request.param}"
        if request.param == "jsonl":
            table.write_text(json.dumps(row) + "\n")
        else:
            table.write_text(f"{';'.join(row)}\n{';'.join(map(str, row.values()))}\n")
        (file,) = read_manifest(table)
        return file

    return of


@pytest.mark.parametrize("start", ["start", "offset", "onset", "begin_time"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("length_sec", 0.5), ("Length (seconds)", 0.5), ("duration_s", 0.5), ("length_ms", 500), ("clipDurationMs", 500)],
)
def test_a_length_in_a_known_unit_beside_a_start(read, start, name, value):
    file = read({"path": "a.wav", start: 0.5, name: value})
    assert (file.start, file.end, file.duration) == (0.5, 1.0, 0.5)


@pytest.mark.parametrize("start", [{"start": 0.5}, {"offset": 0}, {"onset": 0.5}, {"start_ms": 500}, {"Begin": 1}])
@pytest.mark.parametrize(
    "name", ["length", "len", "length_s", "Length", "num_samples", "n_frames", "nframes", "frames"]
)
def test_a_length_in_an_open_unit_beside_a_start(read, start, name):
    row = {"audio_filepath": "a.wav", **start, name: 0.5}
    with pytest.raises(ManifestError, match=rf":[12]: {name} = .* beside a start may .*: name it duration, in seconds"):
        read(row)
    assert read(row | {"duration": 2}).duration == 2
    if "onset" not in start:
        assert read(row | {"end": 3}).end == 3


def test_lengths_that_say_nothing_of_a_part(read):
    for name, value in (("length", 0.5), ("num_samples", 8000), ("length_sec", 0.5)):
        assert not read({"path": "a.wav", name: value}).is_part
        assert not read({"path": "a.wav", "start": "", name: value}).is_part
    for name, value in (("length", "long"), ("length", ""), ("file_length", 9), ("text_length", 9), ("n_words", 9)):
        file = read({"path": "a.wav", "start": 0.5, name: value})
        assert (file.start, file.end) == (0.5, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"length_sec": 0.5, "length_ms": 600}, "length_sec and length_ms differ: 0.5 s and 0.6 s"),
        ({"length_sec": 0}, "length_sec must be a number > 0"),
    ],
)
def test_lengths_that_are_none(read, row, message):
    with pytest.raises(ManifestError, match=message):
        read({"path": "a.wav", "start": 1, **row})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("t0", "t1"),
        ("T0", "T1"),
        ("left", "right"),
        ("cue_in", "cue_out"),
        ("min_time", "max_time"),
        ("beg", "end"),
        ("starttime", "endtime"),
        ("start_msec", "end_msec"),
    ],
)
def test_pairs_that_mean_a_part(read, first, second):
    with pytest.raises(ManifestError, match=rf":[12]: {first}.* may stand for a part of the file"):
        read({"path": "a.wav", first: 0.5, second: 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segment", [0.5, 1]),
        ("timestamp", [0.5, 1.0]),
        ("Segments", [[0.5, 1], [2, 3]]),
        ("segment", {"start": 0.5, "end": 1}),
        ("segments", [{"start": 0.5, "end": 1, "text": "x"}]),
    ],
)
def test_lists_that_mean_a_part(tmp_path, name, value):
    table = tmp_path / "m.jsonl"
    table.write_text(json.dumps({"path": "a.wav", name: value}) + "\n")
    with pytest.raises(ManifestError, match=rf":1: {name} = .* may stand for a part of the file"):
        read_manifest(table)
    table.write_text(json.dumps({"path": "a.wav", "start": 1, "end": 2, name: value}) + "\n")
    assert read_manifest(table)[0].end == 2


def test_a_list_in_a_table_means_a_part(tmp_path):
    (tmp_path / "m.csv").write_text('path,timestamp\na.wav,"(0.5, 1.0)"\n')
    with pytest.raises(ManifestError, match=r"m\.csv:2: timestamp = .* may stand for a part"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    "labels",
    [
        {"left": 0, "right": 1},  # which ear
        {"left": 3, "right": 2},
        {"left": 3},
        {"t0": 5},
        {"timestamp": "2024-01-05 10:00:00"},
        {"timestamp": 1704448800},
        {"segment": "12"},
        {"segments": ["a", "b"]},
        {"region": "north"},
    ],
)
def test_labels_stay_labels(read, labels):
    assert not read({"path": "a.wav", **labels}).is_part


@pytest.mark.parametrize("name", ["ch", "channel_id", "channel_index", "Ch"])
def test_numbers_of_channels(read, name):
    for value in (1, "1", 2.0):
        with pytest.raises(ManifestError, match=r" cannot be applied, channels are averaged"):
            read({"path": "a.wav", name: value})
    for value in (0, "0", "0.0", -1, "", "UCx7Q", "nan"):
        assert read({"path": "a.wav", name: value}).path.endswith("a.wav")
    assert read({"path": "a.wav", "channels": 2}).path.endswith("a.wav")  # how many there are


def test_channels_in_words_are_labels(tmp_path):
    row = known_columns({"path": "a.wav", "Channel_ID": "UCx7Q", "ch": "", "channel": "0"})
    assert of_manifest(row, []) == {"Channel_ID": "UCx7Q", "ch": "", "channel": "0"}


WORDS = [("tempo", 120.5), ("speed", 55), ("tempo", "4/4"), ("channel", "BBC News"), ("speed", "fast"), ("gain", "low")]
NEUTRAL = [
    (name, value) for name, numbers in (("channel", (0, -1)), ("speed", (1,)), ("gain", (0, 1))) for value in numbers
]


@pytest.mark.parametrize(("name", "value"), WORDS)
def test_words_under_names_of_other_audio_are_labels(read, name, value):
    assert not read({"path": "a.wav", name: value}).is_part
    for column in (name, name.title()):
        row = known_columns({"path": "a.wav", column: value})
        assert of_manifest(row, []) == {column: value}  # kept under its name, as any label


@pytest.mark.parametrize(("name", "value"), [*NEUTRAL, ("tempo", 1)])
def test_neutral_numbers_are_told_by_their_value(read, name, value):
    for written in (value, float(value), f"{value}.0", f" {value:.2f} ", ""):
        row = {"path": "a.wav", name: written}
        assert read(row).path.endswith("a.wav")
        assert of_manifest(row, []) == of_archive(row, ("path",), []) == {name: written}  # kept, as any label


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channel", 2.0),
        ("channel", "left"),
        ("channel", "[0, 1]"),
        ("speed", "0,9"),
        ("speed", "1.1x"),
        ("speed", 2),
        ("tempo", 8),
        ("gain", "-3 dB"),
        ("gain", 0.5),
        ("channel_selector", "second"),
    ],
)
def test_what_asks_for_other_audio_is_refused(read, name, value):
    with pytest.raises(ManifestError, match=rf"{name} = .* cannot be applied"):
        read({"path": "a.wav", name: value})


def test_a_time_of_day_is_no_place(read):
    with pytest.raises(ManifestError, match=r"start_time must be .* got '08:00' .* rename .* clock_start_time"):
        read({"path": "a.wav", "start_time": "08:00"})
    assert not read({"path": "a.wav", "clock_start_time": "08:00"}).is_part


def test_lists_in_parquet_that_mean_a_part(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from bestrq2.data import collect

    audio = pyarrow.array([{"path": "a.wav", "bytes": None}], pyarrow.struct({"bytes": "binary", "path": "string"}))
    for name, value in (("segment", [0.5, 1.0]), ("t0", 0.5)):
        parquet.write_table(pyarrow.table({"audio": audio, name: [value], "t1": [1.0]}), tmp_path / "x.parquet")
        with pytest.raises(ManifestError, match="may stand for a part"):
            collect(tmp_path / "x.parquet")
