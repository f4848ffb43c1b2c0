"""Splits that the words of a column tell, and words that tell none."""

import tarfile

import numpy as np
import pytest
import soundfile

from bestrq2.data import collect


def test_words_of_a_column_that_name_no_split(tmp_path):
    """Rows with such a word are trained on, which is told."""
    for name in ("short.wav", "long.wav"):
        soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    table = tmp_path / "m.csv"
    for words, told in ((("train", "cv"), "'cv'"), (("tr", "tt"), "'tr', 'tt'"), (("train", "devel"), "")):
        table.write_text(f"path,split\nshort.wav,{words[0]}\nlong.wav,{words[1]}\n")
        files, report = collect(table)
        note = f"{table}: rows with split {told} are used, as such values name no split"
        assert (note in report.notes, len(files)) == ((True, 2) if told else (False, 1))
        assert note not in collect(table, split=None)[1].notes
    table.write_text("path,subset\nshort.wav,clean\nlong.wav,noisy\n")
    assert len(collect(table)[1].notes) == 1


@pytest.mark.parametrize("form", ["{}/a.wav", "{}.tar"])
def test_splits_below_the_levels_that_decide(tmp_path, form):
    """A corpus in a folder of corpora: its test clips are trained on, which is told."""
    names = ("train-clean", "dev-clean", "test-clean")
    for name in names:
        file = tmp_path / "corpora" / "speech" / "LibriSpeech" / form.format(f"{name}/1")
        file.parent.mkdir(parents=True)
        soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
        if file.suffix == ".tar":
            with tarfile.open(file, "w") as shard:
                shard.add(tmp_path / "a.wav", "a.wav")
        else:
            file.write_bytes((tmp_path / "a.wav").read_bytes())
    files, report = collect(tmp_path / "corpora")
    inner = [f"speech/LibriSpeech/{name}" for name in sorted(names)]
    assert len(files) == 3
    assert f"{', '.join(inner)} are all used, though they name splits" in "".join(report.notes)
    assert "name splits" not in "".join(collect(tmp_path / "corpora", split=None)[1].notes)
    files, report = collect(tmp_path / "corpora" / "speech")
    assert len(files) == 1
    assert "name splits" not in "".join(report.notes)
