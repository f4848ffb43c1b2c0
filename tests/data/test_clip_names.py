"""Places of parts: what tells clips of one file apart, and what runs have recorded of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, collect
from bestrq2.data.fingerprint import file_list_digest
from bestrq2.data.parts import shown_places


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 6 * 8000), 8000)
    return tmp_path


def shown(folder, *spans):
    (folder / "m.csv").write_text("\n".join(["path,start,end", *(f"long.wav,{span}" for span in spans)]) + "\n")
    files, report = collect(folder / "m.csv")
    return [place.removeprefix(f"{folder}/") for place in shown_places(files)], report.notes[0].partition(": ")[2]


def test_parts_from_the_beginning_on(folder):
    names = ["long.wav@0.000-2.000", "long.wav", "long.wav@0.000-4.000", "long.wav@2.000-4.000"]
    assert shown(folder, "0,2", ",", "0,4", "2,4") == (names, "4 rows, 3 of them parts of longer files")
    assert shown(folder, ",", "0,6") == (["long.wav", "long.wav@0.000-6.000"], "2 rows")
    assert shown(folder, "0,2")[0] == ["long.wav@0.000-2.000"]
    assert shown(folder, "2,")[0] == ["long.wav@2.000-"]


def test_a_list_that_states_the_whole_file(folder):
    """As NeMo's do: the name of the file is enough."""
    assert shown(folder, "0,6") == (["long.wav"], "1 row")
    row = {"audio_filepath": "long.wav", "duration": 5.99}
    (folder / "m.jsonl").write_text(json.dumps(row) + "\n")
    assert shown_places(collect(folder / "m.jsonl")[0]) == [str(folder / "long.wav")]
    (folder / "m.jsonl").write_text(json.dumps(row | {"audio_filepath": "absent.wav"}) + "\n")
    assert shown_places(collect(folder / "m.jsonl")[0]) == [str(folder / "absent.wav")]


def test_places():
    item = AudioFile("a.wav", duration=2.0, start=0.0, end=2.0)
    assert item.place == "a.wav@0.000-2.000"
    assert replace(item, end=None).place == "a.wav"


def test_what_runs_have_recorded_stays():
    """A run goes on only with the same digest of its files."""
    spans = [(0.0, 2.0, 2.0), (0.0, None, 6.0), (2.0, 4.0, 2.0), (0.0, 4.0, 3.9), (3.0, None, 3.0), (0.0, 1.0, None)]
    files = [AudioFile("x/a.wav", duration, start=start, end=end) for start, end, duration in spans]
    expected = "d2d7a363139fed8df8e31341b43be84ae3a16fd97c0b6f2b9091e8b3816d4441"
    assert file_list_digest(files) == expected
