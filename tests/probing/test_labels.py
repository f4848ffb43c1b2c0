"""Labels from a manifest: accepted, missing and rejected rows."""

import csv
import io
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile, ManifestError
from bestrq2.probing.evaluation import Outcome, chance
from bestrq2.probing.events import behind_the_end, frame_labels, read_events, segment_decisions, segment_labels
from bestrq2.probing.experiment import assemble
from bestrq2.probing.features import Features
from bestrq2.probing.folds import make_folds
from bestrq2.probing.labels import TEST, TRAIN, LabelledClips, check_testable, doubtful_names, read_clips
from bestrq2.probing.task import ProbeTask, packaged_task


@pytest.fixture
def write(tmp_path):
    def write(text, name="clips.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_single_labels(write):
    manifest = write("path,kind,take\na.wav,dog,1\nb.wav,cat,1\nc.wav, ,2\nd.wav,dog,3\n")
    clips = read_clips(ProbeTask(manifest=manifest, label="kind", group="take"))
    assert [clips.classes[t] for t in clips.targets] == ["dog", "cat", "dog"]
    assert clips.groups.tolist() == [0, 0, 1]
    assert clips.left_out == {"without a label": 1}
    assert not clips.warnings
    assert "no --group" in read_clips(ProbeTask(manifest=manifest, label="kind")).warnings[0]
    assert len(read_clips(packaged_task())) == 24


@pytest.mark.parametrize("kind", ["classification", "retrieval", "multilabel"])
def test_labels_that_are_almost_alike(write, kind):
    """Capitals, and numbers that a spreadsheet or pandas wrote in two forms, make two classes: that is told."""
    rows = "".join(f"{n}.wav,{label},{n}\n" for n, label in enumerate(["Dog", "dog", "1", "1.0", "2", "NaN", "cat"]))
    warnings = read_clips(
        ProbeTask(manifest=write(f"path,kind,g\n{rows}"), label="kind", group="g", kind=kind)
    ).warnings
    assert warnings == [
        "labels '1', '1.0' are different classes: write them alike if they are one",
        "labels 'Dog', 'dog' are different classes: write them alike if they are one",
        "the label 'NaN' is a class of its own: leave the field empty where a label is missing",
    ]
    assert (
        doubtful_names([f"{n}{c}" for n in "abcde" for c in "xX"])[3] == "2 more sets of labels that are almost alike"
    )


def test_missing_columns_and_groups(write):
    manifest = write("path,kind,take\na.wav,dog,1\nb.wav,cat,\n")
    with pytest.raises(ManifestError, match=r"no column 'label'; its columns are \['path', 'kind', 'take'\]"):
        read_clips(ProbeTask(manifest=manifest))
    with pytest.raises(ManifestError, match=r"b\.wav has no 'take'"):
        read_clips(ProbeTask(manifest=manifest, label="kind", group="take"))
    with pytest.raises(ManifestError, match="no row can be used: 2 outside of --where"):
        read_clips(ProbeTask(manifest=manifest, label="kind", where=(("take", ("7",)),)))


def test_fixed_split(write):
    manifest = write("path,kind,part,take\na.wav,x,train,1\nb.wav,y,dev,2\nc.wav,x,test,1\nd.wav,y,,3\ne.wav,,dev,4\n")
    clips = read_clips(ProbeTask(manifest=manifest, label="kind", split="part", group="take"))
    assert clips.parts.tolist() == [TRAIN, TEST]
    assert clips.left_out == {"with part 'dev'": 2, "with part ''": 1}
    assert clips.warnings == ["1 group with clips in training and in test"]
    task = ProbeTask(
        manifest=manifest,
        label="kind",
        kind="retrieval",
        split="part",
        group="take",
        train_values=("train",),
        test_values=("test",),
    )
    assert any("1 group with clips in the gallery and among the queries" in text for text in read_clips(task).warnings)
    task = ProbeTask(manifest=manifest, label="kind", split="part", train_values=("train", "dev"))
    assert read_clips(task).parts.tolist() == [TRAIN, TRAIN, TEST]


def test_values_that_no_row_has_are_told(write):
    """One of several that is misspelt leaves out clips."""
    manifest = write("path,kind,part,lang\na.wav,x,train,it\nb.wav,y,test,it\nc.wav,x,test,fr\nd.wav,y,train,fr\n")
    task = ProbeTask(manifest=manifest, label="kind", split="part", where=(("lang", ("it", "fr")),))
    assert read_clips(task).warnings == []
    task = replace(task, where=(("lang", ("it", "frr")),), train_values=("train", "valid"), test_values=("test",))
    told = [f"no row has {name}, which was asked for" for name in ("lang 'frr'", "part 'valid'")]
    assert read_clips(task).warnings == told


@pytest.mark.parametrize(
    ("kind", "where"), [("classification", "training and test"), ("retrieval", "the gallery and the queries")]
)
def test_files_on_both_sides_of_a_split(write, kind, where):
    """Also as other parts of one recording."""
    rows = "a.wav,x,0,1,left\na.wav,x,1,2,right\nb.wav,y,0,1,left\nc.wav,y,0,1,right\nb.wav,y,0,1,left\n"
    manifest = write(f"path,kind,start,end,part\n{rows}")
    task = ProbeTask(
        manifest=manifest, label="kind", kind=kind, split="part", train_values=("left",), test_values=("right",)
    )
    assert f"1 file both in {where}, which makes scores too high" in read_clips(task).warnings


@pytest.mark.parametrize(
    "text",
    [
        "path,tags\na.wav,dog; cat\nb.wav,;\nc.wav,\nd.wav,cat\n",
        "path,tags\na.wav,cat;dog;cat\nb.wav, ; \nc.wav, \nd.wav,;cat\n",
    ],
)
def test_several_labels_in_a_cell(write, text):
    clips = read_clips(ProbeTask(manifest=write(text), label="tags", kind="multilabel"))
    assert clips.classes == ["cat", "dog"]
    assert clips.targets.tolist() == [[True, True], [False, False], [True, False]]
    assert clips.left_out == {"without a label": 1}


def test_several_labels_in_a_list(write):
    manifest = write('{"path": "a.wav", "tags": ["dog", "cat"]}\n{"path": "b.wav", "tags": []}\n', "clips.jsonl")
    clips = read_clips(ProbeTask(manifest=manifest, label="tags", kind="multilabel"))
    assert clips.targets.tolist() == [[True, True], [False, False]]
    write('{"path": "a.wav", "tags": ["speech, male"]}\n{"path": "b.wav", "tags": ["pop, rock"]}\n', "clips.jsonl")
    clips = read_clips(ProbeTask(manifest=manifest, label="tags", kind="multilabel", group="path"))
    assert (clips.classes, clips.warnings) == (["pop, rock", "speech, male"], [])  # a list has no separator


@pytest.mark.parametrize("cell", ["a;NaN", "nan; a", "a;None", "null;a;b", "a;<NA>", "['a', 'nan']"])
def test_a_missing_value_beside_labels_is_refused(write, cell):
    task = ProbeTask(manifest=write(f'path,tags\nx.wav,b\ny.wav,"{cell}"\n'), label="tags", kind="multilabel")
    with pytest.raises(ManifestError, match=r"y\.wav: 'tags' has a missing value \(\S+\) beside labels, got .*a"):
        read_clips(task)


def test_missing_values_alone_and_in_lists(write):
    """Alone they are as in a single label: text is a class, with a warning; null and NaN of JSON are no label."""
    task = ProbeTask(manifest=write("path,tags\nx.wav,NaN\ny.wav,a;\nz.wav,na;a\n"), label="tags", kind="multilabel")
    clips = read_clips(task)
    assert clips.classes == ["NaN", "a", "na"]
    assert any("'NaN' is a class of its own" in text for text in clips.warnings)
    rows = '{"path": "a.wav", "tags": ["a"]}\n{"path": "b.wav", "tags": [null]}\n{"path": "c.wav", "tags": [NaN]}\n'
    task = replace(task, manifest=write(rows, "clips.jsonl"))
    clips = read_clips(task)
    assert (clips.classes, clips.left_out) == (["a"], {"without a label": 2})
    for value in ("null", "NaN"):
        write(rows + f'{{"path": "d.wav", "tags": ["a", {value}]}}\n', "clips.jsonl")
        with pytest.raises(ManifestError, match=r"d\.wav: 'tags' has a missing value"):
            read_clips(task)


def test_several_columns(write):
    manifest = write("path,dog,cat\na.wav,1,0\nb.wav,yes,True\nc.wav,0,\n")
    task = ProbeTask(manifest=manifest, label=("dog", "cat"), kind="multilabel")
    clips = read_clips(task)
    assert clips.classes == ["dog", "cat"]
    assert clips.targets.tolist() == [[True, False], [True, True]]
    write("path,dog,cat\na.wav,1,0\nb.wav,often,1\n")
    with pytest.raises(ManifestError, match="expected 0 or 1 in column 'dog', got 'often'"):
        read_clips(task)


def test_clips_listed_again(write):
    manifest = write("path,kind\na.wav,dog\nb.wav,cat\nb.wav,cat\na.wav,cat\nc.wav,dog\n")
    task = ProbeTask(manifest=manifest, label="kind", group="path")
    folder = Path(manifest).parent
    again = f"2 clips listed more than once, first {folder / 'a.wav'}"
    other = f"1 clip listed with labels that contradict each other, first {folder / 'a.wav'}"
    assert read_clips(task).warnings == [again, other]
    task = ProbeTask(manifest=manifest, label="kind", kind="retrieval")
    assert any("each finds itself" in warning for warning in read_clips(task).warnings)
    # Clips of one group are not searched for each other.
    assert read_clips(replace(task, group="path")).warnings == [again, other]
    manifest = write("path,kind,g\na.wav,dog,1\na.wav,dog,2\nb.wav,dog,3\n")
    assert any("each finds itself" in text for text in read_clips(replace(task, group="g")).warnings)


def test_numbers(write):
    task = ProbeTask(
        manifest=write("path,bpm\na.wav,120\nb.wav,nan\nc.wav,\nd.wav,90.5\n"), label="bpm", kind="regression"
    )
    clips = read_clips(task)
    assert clips.targets.tolist() == [120.0, 90.5]
    assert clips.left_out == {"without a finite number": 2}
    write("path;bpm\na.wav;0,5\n")
    with pytest.raises(ManifestError, match="'bpm' is no number: '0,5': write decimals with a point"):
        read_clips(task)
    write("path,bpm\na.wav,fast\n")
    with pytest.raises(ManifestError, match="'bpm' is no number: 'fast'"):
        read_clips(task)


def test_events(write, tmp_path):
    manifest = write("path\nx/a.wav\nx/b.wav\nc.wav\n")
    table = write(
        "filename\tonset\toffset\tevent_label\n"
        "x/a.wav\t0.5\t1.0\tdog\nx/a.wav\t0.7\t2\tcat\nother.wav\t0\t1\tcow\nc.wav\t\t\t\n"
        + f"{tmp_path}/x/b.wav\t0\t.1\tdog\n",
        "events.tsv",
    )
    clips = read_clips(ProbeTask(manifest=manifest, kind="events", events=table))
    assert clips.classes == ["cat", "dog"]
    assert [rows.tolist() for rows in clips.events] == [[[0.5, 1.0, 1.0], [0.7, 2.0, 0.0]], [[0.0, 0.1, 1.0]], []]
    assert clips.targets.tolist() == [[True, True], [False, True], [False, False]]
    assert clips.warnings[0] == "1 event of files that the manifest lacks"
    for row, message in (
        ("c.wav,1,0.5,dog", "expected 0 <= onset < offset and a label"),
        ("c.wav,-1,0.5,dog", "expected 0 <= onset"),
        ("c.wav,0,nan,dog", "expected 0 <= onset"),
        ("c.wav,0,1,", "expected 0 <= onset < offset and a label"),
        ("c.wav,0,soon,dog", r"events.csv:2: onset and offset must be seconds, got '0' and 'soon'"),
        ('c.wav,"0,5",1,dog', "got '0,5' and '1'; write decimals with a point"),
        ("d.wav,0,1,dog", "none of its 1 rows is an event of a clip"),
    ):
        bad = write(f"path,onset,offset,label\n{row}\n", "events.csv")
        with pytest.raises(ManifestError, match=message):
            read_events(bad, clips.files, tmp_path / "clips.csv")
    bad = write("path,onset,label\na.wav,0,dog\n", "events.csv")
    with pytest.raises(ManifestError, match=r"no column 'offset' \(or end\)"):
        read_events(bad, clips.files, tmp_path / "clips.csv")


def test_events_as_json_lines(write):
    table = write(
        '{"path": "a.wav", "onset": 0, "offset": 1.5, "label": 7}\n{"path": "b.wav"}\n'
        '{"path": "b.wav", "onset": "0.5", "offset": 1, "label": "dog"}\n',
        "events.jsonl",
    )
    clips = read_clips(ProbeTask(manifest=write("path\na.wav\nb.wav\n"), kind="events", events=table))
    assert clips.classes == ["7", "dog"]
    assert [rows.tolist() for rows in clips.events] == [[[0.0, 1.5, 0.0]], [[0.5, 1.0, 1.0]]]


def test_events_of_a_file_that_is_listed_twice(write):
    """Both rows have them; where a row begins inside of its file, it is open what onsets count from."""
    table = write("path,onset,offset,label\na.wav,0.5,1,dog\na.wav,3,4,cat\n", "events.csv")
    task = ProbeTask(manifest=write("path\na.wav\nb.wav\na.wav\n"), kind="events", events=table, group="path")
    clips = read_clips(task)
    assert [len(rows) for rows in clips.events] == [2, 0, 2]
    assert clips.targets.tolist() == [[True, True], [False, False], [True, True]]
    assert clips.warnings == [f"1 clip listed more than once, first {Path(table).parent / 'a.wav'}"]
    write("path,start,end\na.wav,0,2\na.wav,2,4\n")
    with pytest.raises(ManifestError, match=r"clips\.csv: .*a\.wav from 2 s on: onsets count from the beginning"):
        read_clips(task)


def test_events_behind_the_end_make_no_class():
    """Of "cat" no event is heard: it is no class, and chance is that of the dogs; of no event at all is an error."""
    events = [np.array([[0.0, 0.5, 1], [300.0, 400.0, 0]])] * 4
    files = [AudioFile(f"{n}.wav") for n in range(4)]
    clips = LabelledClips(files, np.ones((4, 2), dtype=bool), ["cat", "dog"], np.arange(4), events=events)
    features = Features({"encoder": [np.zeros((10, 3), np.float32)] * 4}, list(range(4)), [1.0] * 4)
    task = ProbeTask(kind="events", events="events.csv", head="linear")
    experiment = assemble(clips, features, task, 0.1)
    assert experiment.clips.classes == ["dog"]
    assert experiment.rows.targets.sum() == 4 * 5
    assert [len(rows) for rows in experiment.clips.events] == [1] * 4
    (said,) = [text for text in experiment.clips.warnings if "left out: they begin" in text]
    assert said.startswith("4 events of 8 left out")
    clips.events = [rows[1:] for rows in events]
    with pytest.raises(ConfigError, match=r"at least one label that can be tested.*; 4 events of 4 left out: they beg"):
        assemble(clips, features, task, 0.1)
    rows = experiment.rows
    rows.targets = np.stack((rows.targets[:, 0], np.zeros(40, bool)), 1)
    assert chance(rows, Outcome({})) == 0.5


def test_events_behind_the_end_are_told():
    events = [np.array([[0.5, 9.0, 0]]), np.zeros((0, 3)), np.array([[1.5, 2.0, 0], [500.0, 900.0, 0]])]
    (said,) = behind_the_end(events, [1.0, 1.0, 2.0], ["a", "b", "c"])
    assert said.startswith("1 event of 3 left out: they begin behind the end of their clip, as at 500 in c of 2 s; ")
    assert behind_the_end(events[:2], [1.0, 1.0], ["a", "b"]) == []


def test_another_separator_is_told(write):
    task = ProbeTask(
        manifest=write("path,tags\na.wav,dog|cat\nb.wav,dog|cow\nc.wav,cow\n"), label="tags", kind="multilabel"
    )
    (warning,) = [text for text in read_clips(task).warnings if "separator" in text]
    assert warning == "labels such as 'dog|cat' are taken as one: if they are several, add --separator '|'"
    assert not any("separator" in text for text in read_clips(replace(task, separator="|")).warnings)


def test_a_split_without_test_clips_tells_what_was_left_out(write):
    manifest = write("path,kind,part\na.wav,x,train\nb.wav,y,train\nc.wav,x,Test\n")
    task = ProbeTask(manifest=manifest, label="kind", split="part")
    for refuse in (make_folds, check_testable):  # before any audio is decoded, too
        with pytest.raises(ConfigError, match="got only training clips; 1 row with part 'Test'"):
            refuse(read_clips(task), task)
    task = replace(task, kind="retrieval", train_values=("x",), test_values=("train",))
    with pytest.raises(ConfigError, match="expected a gallery and queries, got only queries; 1 row with part 'Test'"):
        check_testable(read_clips(task), task)


def test_frames_and_segments():
    events = np.array([[0.15, 0.35, 0], [0.52, 0.54, 1], [0.9, 5.0, 0]])
    frames = frame_labels(events, 10, 0.1, 2)  # centres .05 .15 .25 .35 ...
    assert np.flatnonzero(frames[:, 0]).tolist() == [1, 2, 9]  # 0.15 is inside, 0.35 is not; cut at the end
    assert np.flatnonzero(frames[:, 1]).tolist() == [5]  # covers no centre, and is not lost
    assert np.flatnonzero(segment_labels(np.array([[0.2, 1.0, 0], [2.4, 2.45, 1]]), 2.5, 1.0, 2)[:, 0]).tolist() == [0]
    assert segment_labels(np.array([[2.4, 2.45, 1]]), 2.5, 1.0, 2).tolist() == [[0, 0], [0, 0], [0, 1]]
    active = np.zeros((6, 1), bool)
    active[3] = True  # centre at 1.4 s
    assert segment_decisions(active, 0.4, 2.5, 1.0)[:, 0].tolist() == [False, True, False]
    active[5] = True  # centre at 2.2 s
    assert segment_decisions(active, 0.4, 2.5, 1.0)[:, 0].tolist() == [False, True, True]


def test_times_on_the_border_of_a_frame_or_segment():
    """In exact arithmetic: as floats, 0.3 / 0.1 is below 3, 1.1 / 0.1 above 11, and 0.14 / 0.04 above 3.5."""
    for unit in map(Fraction, ("0.02", "0.04", "0.1", "0.2", "0.3")):
        number = int(4 / unit)
        for onset, offset in product(range(0, 390, 7), (1, 6, 10, 45)):
            begin, end = Fraction(onset, 100), Fraction(onset + offset, 100)
            event = np.array([[float(begin), float(end), 0]])
            inside = [begin <= (i + Fraction(1, 2)) * unit < end for i in range(number)]
            if any(inside):
                assert frame_labels(event, number, float(unit), 1)[:, 0].tolist() == inside
            touched = [begin < (i + 1) * unit and end > i * unit for i in range(number)]
            assert segment_labels(event, float(number * unit), float(unit), 1)[:, 0].tolist() == touched
    for hop, segment in product(map(Fraction, ("0.04", "0.08")), map(Fraction, ("0.1", "0.2"))):
        for frame in range(40):
            active = np.arange(40)[:, None] == frame
            found = segment_decisions(active, float(hop), 40 * float(hop), float(segment))
            assert np.flatnonzero(found).tolist() == [int((frame + Fraction(1, 2)) * hop / segment)]


def test_tasks_from_configurations_are_keys():
    task = ProbeTask(kind="multilabel", label=["a", "b"], where=[["lang", ["it"]]], train_values=["x"])
    assert hash(task) == hash(
        ProbeTask(kind="multilabel", label=("a", "b"), where=(("lang", ("it",)),), train_values=("x",))
    )


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kind": "guess"}, "probe kind: expected one of classification"),
        ({"head": "svm"}, "probe head: expected one of linear, ridge, mlp, knn, got 'svm'"),
        ({"kind": "events"}, r"probe events: expected a table of events \(--events TABLE\), got None"),
        ({"label": ("a", "b")}, "probe label: expected one column for classification"),
        ({"folds": 1}, "probe folds: expected at least 2, or 0"),
        ({"regularisation": 0.0}, "probe regularisation: expected a positive number"),
        ({"regularisation": float("inf")}, "probe regularisation: expected a positive number"),
        ({"segment_seconds": float("inf")}, "probe segment_seconds: expected a positive number"),
        ({"seed": -1}, r"probe seed: expected a whole number from 0 to 2\^63 - 1, got -1"),
        ({"threshold": 1.5}, "probe threshold"),
        ({"scaling": "some"}, "probe scaling: expected one of all, sides, none"),
    ],
)
def test_impossible_tasks(choices, message):
    with pytest.raises(ConfigError, match=message):
        ProbeTask(**choices)


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("['dog', 'wind']", {"dog", "wind"}),  # as pandas writes a list
        ('["dog", "sea, calm"]', {"dog", "sea, calm"}),  # as json does
        ("('dog',)", {"dog"}),
        ("{'wind', 'dog'}", {"dog", "wind"}),
        ("[ 'dog' ]", {"dog"}),
        ("[]", set()),
        ("[ ]", set()),
        ("()", set()),
        ("[0, 3]", {"0", "3"}),
        ("[laughter];dog", {"[laughter]", "dog"}),
        ("[laughter]", {"[laughter]"}),
        ("(door) 'bang'", {"(door) 'bang'"}),
    ],
)
def test_lists_that_a_table_holds_as_text(write, cell, labels):
    with io.StringIO() as text:
        csv.writer(text).writerows([["path", "tags"], ["0.wav", cell], ["1.wav", "dog;wind"], ["2.wav", "dog"]])
        manifest = write(text.getvalue())
    clips = read_clips(ProbeTask(manifest, label="tags", kind="multilabel"))
    assert {name for name, has in zip(clips.classes, clips.targets[0]) if has} == labels
    assert not any("separator" in text for text in clips.warnings)


@pytest.mark.parametrize(
    "cell",
    [
        *("['dog' 'wind']", "['dog'\n 'wind']", "[0 3]", "array(['dog'], dtype=object)"),  # as numpy writes it
        *("{'dog': 'wind'}", "['dog', 3]", "['dog', wind']", "['it's', 'dog']", "[['dog'], ['wind']]"),
        *("[dog, wind]", "['dog', 'wind'"),
    ],
)
def test_text_that_is_almost_a_list_is_refused(write, cell):
    """Python reads the first, as numpy writes it, as one label: dogwind."""
    with io.StringIO() as text:
        csv.writer(text).writerows([["path", "tags"], ["0.wav", cell], ["1.wav", "dog;wind"]])
        manifest = write(text.getvalue())
    with pytest.raises(ManifestError, match=r"0\.wav: 'tags' must be labels between ';', or a list such as"):
        read_clips(ProbeTask(manifest, label="tags", kind="multilabel"))


def test_another_separator_is_told_where_single_labels_are_many(write):
    cells = ["dog", "cat", "wind", "rain", "dog|wind", "cow"]
    manifest = write("path,tags\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(cells)))
    warnings = read_clips(ProbeTask(manifest, label="tags", kind="multilabel")).warnings
    assert "labels such as 'dog|wind' are taken as one: if they are several, add --separator '|'" in warnings


def test_a_comma_within_a_name_is_no_separator(write):
    cells = ["Dog", "Bark", '"Male speech, man speaking"', "Wind"]
    manifest = write("path,tags\n" + "".join(f"{i}.wav,{cell}\n" for i, cell in enumerate(cells)))
    warnings = read_clips(ProbeTask(manifest, label="tags", kind="multilabel")).warnings
    assert not any("separator" in text for text in warnings)
