"""Splits that the words of a column tell, and words that tell none."""

import numpy as np
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
