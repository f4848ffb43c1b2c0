"""Cells that were taken for something else: lists for one name, truth values for numbers, one group for two."""

import json

import pytest

from bestrq2.data import ManifestError
from bestrq2.probing.labels import read_clips
from bestrq2.probing.task import ProbeTask


@pytest.mark.parametrize(
    ("kind", "cell", "told"),
    [
        ("classification", ["dog"], "must be one label, got .'dog'.; several are for --kind multilabel"),
        ("classification", "['dog']", "must be one label"),
        ("retrieval", {"name": "dog"}, "must be one label"),
        ("multilabel", ["dog", ["cat"]], "has .'cat'. in place of a label"),
        ("regression", True, "is no number: True"),
        ("regression", "1_2", "is no number: '1_2'"),
    ],
)
def test_cells_that_are_no_label_of_their_kind(tmp_path, kind, cell, told):
    """They were a class with brackets in its name, and the numbers 1 and 12."""
    rows = [{"path": f"{number}.wav", "label": label} for number, label in enumerate([1, 2, cell, 1, 2])]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match=rf"2\.wav: 'label' {told}"):
        read_clips(ProbeTask(str(tmp_path / "m.jsonl"), kind=kind))


def test_names_with_brackets_stay_names(tmp_path):
    (tmp_path / "m.csv").write_text(
        "path,label\n" + "".join(f"{n}.wav,{'[noise]' if n % 2 else '(a)'}\n" for n in range(4))
    )
    assert read_clips(ProbeTask(str(tmp_path / "m.csv"))).classes == ["(a)", "[noise]"]


def test_groups_that_are_almost_alike(tmp_path):
    """They are dealt to different folds, so that clips of one speaker may be in training and in test."""

    def warnings(*groups):
        rows = "".join(f"{n}.wav,{'xy'[n % 2]},{group}\n" for n, group in enumerate(groups))
        (tmp_path / "m.csv").write_text(f"path,label,speaker\n{rows}")
        return read_clips(ProbeTask(str(tmp_path / "m.csv"), group="speaker")).warnings

    assert warnings("Ann", "ann", "Bob", "1", "1.0") == [
        "groups '1', '1.0' are not kept together: write them alike if they are one",
        "groups 'Ann', 'ann' are not kept together: write them alike if they are one",
    ]
    assert warnings(*(f"{n}{c}" for n in "abcde" for c in "xX"))[3] == "2 more sets of groups that are almost alike"
    assert warnings("Ann", "Bob", "Anna", "1", "2", "Ann") == []


def test_labels_between_spaces_are_told_and_names_of_several_words_are_not(tmp_path):
    def told(*cells, separator=";"):
        (tmp_path / "m.csv").write_text("path,label\n" + "".join(f"{n}.wav,{cell}\n" for n, cell in enumerate(cells)))
        clips = read_clips(ProbeTask(str(tmp_path / "m.csv"), kind="multilabel", separator=separator))
        return [text for text in clips.warnings if "separator" in text]

    cells = ["dog wind", "dog", "wind rain", "rain dog wind", "rain"]
    assert told(*cells) == ["labels such as 'dog wind' are taken as one: if they are several, add --separator ' '"]
    assert told(*cells, separator=" ") == []
    assert told(*cells, "siren") == []  # is nowhere else
    assert told("male speech", "female speech", "male song", "female song", "male", "speech") != []
    assert told("male speech", "female speech", "male song", "female song", "dog") == []
    assert told("a b", "a c", "b c", "a d", "b d", "c d") == []  # always two: names of two words
    assert told("Dog", "Dog bark", "Car horn", "Rain") == []


@pytest.mark.parametrize(
    "other", ["Jose\u0301 A", "Jos\u00e9  A", "Jos\u00e9\u00a0A", "Jos\u00e9 A\u200b", "JOS\u00c9 A"]
)
def test_names_that_look_alike_are_told(tmp_path, other):
    """Two groups of one speaker would lie in training and test."""
    name = "Jos\u00e9 A"
    rows = [{"path": f"{n}.wav", "label": n % 2, "speaker": s} for n, s in enumerate([name, other, "x", "y"])]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warnings = read_clips(ProbeTask(manifest=str(manifest), label="label", group="speaker")).warnings
    assert len(warnings) == 1
    assert "are not kept together: write them alike if they are one" in warnings[0]
    shown = warnings[0].removeprefix("groups ").split(" are ")[0].split(", ")
    assert len(set(shown)) == len(shown) == 2
    assert warnings[0].isprintable()
    assert "labels" in read_clips(ProbeTask(manifest=str(manifest), label="speaker", group="path")).warnings[0]
