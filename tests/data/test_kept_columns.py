"""Columns of a manifest that packing and listing do not keep are named."""

import numpy as np
import pytest
import soundfile

from bestrq2 import manifest, shards
from bestrq2.data import collect


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16000)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, noise, 16000)
    return tmp_path


def notes(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if "not kept" in line]


def test_both_commands_name_what_they_do_not_keep(folder, capsys):
    (folder / "lab.csv").write_text("path,kind,rec,label,Split,empty\na.wav,dog,r1,x,,\nb.wav,cat,,y,train,\n")
    assert shards.main([str(folder / "lab.csv"), "--out", str(folder / "sh")]) == 0
    (packed,) = notes(capsys.readouterr().out)
    assert packed.startswith("note: 3 columns not kept: kind, rec, Split; of labels only domain and label are.")
    assert manifest.main([str(folder / "lab.csv"), "--out", str(folder / "m.csv")]) == 0
    assert notes(capsys.readouterr().out) == [packed]


def test_a_length_that_was_used_is_kept(folder, capsys):
    (folder / "lab.csv").write_text("path,label,start,length_sec\na.wav,x,0.25,0.5\n")
    assert manifest.main([str(folder / "lab.csv"), "--out", str(folder / "m.csv")]) == 0
    assert not notes(capsys.readouterr().out)
    assert collect(folder / "m.csv")[0][0].end == 0.75


def test_places_of_parts_are_lost_in_shards_alone(folder, capsys):
    (folder / "lab.csv").write_text("path,label,start,end\na.wav,x,0,0.5\nb.wav,y,,\n")
    assert manifest.main([str(folder / "lab.csv"), "--out", str(folder / "m.csv")]) == 0
    assert not notes(capsys.readouterr().out)
    assert shards.main([str(folder / "lab.csv"), "--out", str(folder / "sh")]) == 0
    assert notes(capsys.readouterr().out)[0].startswith("note: 2 columns not kept: start, end;")


def test_nothing_to_name(folder, capsys):
    (folder / "m.jsonl").write_text('{"audio_filepath": "a.wav", "duration": 1.0, "channel": 0, "Label": "x"}\n')
    assert not collect(folder / "m.jsonl")[1].columns
    assert manifest.main([str(folder / "m.jsonl"), "--out", str(folder / "m.csv")]) == 0
    assert shards.main([str(folder / "m.jsonl"), "--out", str(folder / "of_list")]) == 0
    assert shards.main([str(folder), "--out", str(folder / "sh")]) == 0
    assert not notes(capsys.readouterr().out)


def test_many_columns(folder):
    names = [f"c{number}" for number in range(30)]
    (folder / "m.csv").write_text(",".join(["path", *names]) + "\n" + ",".join(["a.wav", *names]) + "\n")
    report = collect([folder / "m.csv", folder / "m.csv"])[1]
    assert report.columns == names
    assert "30 columns not kept: c0, " in report.columns_note()[0]
    assert "c19 and 10 more; " in report.columns_note()[0]
