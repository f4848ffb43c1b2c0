"""predictions.csv tells the parts of one file apart."""

import csv

import numpy as np
import pytest

from bestrq2.data import AudioFile
from bestrq2.probing import report
from bestrq2.probing.evaluation import Outcome, clip_rows
from bestrq2.probing.experiment import Experiment
from bestrq2.probing.labels import LabelledClips
from bestrq2.probing.task import ProbeTask

PARTS = [AudioFile("a.wav", 2.0, end=2.0), AudioFile("a.wav"), AudioFile("a.wav", start=0.5), AudioFile("b.wav")]
SPANS = [("0.0", "2.0"), ("", ""), ("0.5", ""), ("", "")]


def written(tmp_path, kind, files):
    targets = {"classification": np.array([0, 1, 0, 1]), "regression": np.arange(4.0), "multilabel": np.eye(4, 2) > 0}
    targets["retrieval"] = targets["classification"]
    clips = LabelledClips(files, targets[kind], [] if kind == "regression" else ["x", "y"], np.arange(4), None)
    rows = None if kind == "retrieval" else clip_rows(clips, np.arange(4))
    scores = np.random.default_rng(0).uniform(
        size=(4, {"regression": 1, "retrieval": len(report.COLUMNS)}.get(kind, 2))
    )
    if kind == "retrieval":
        scores[:, 0] = np.arange(4)
    experiment = Experiment(ProbeTask(kind=kind), clips, np.arange(4), rows, {}, [1.0] * 4)
    outcome = Outcome({}, scores=scores)
    with report._predictions(tmp_path, {"encoder": {"linear": outcome}}, experiment).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "retrieval"])
def test_parts_of_a_file(tmp_path, kind):
    rows = written(tmp_path, kind, PARTS)
    each = len(rows) // 4
    assert [(row["path"], row["start"], row["end"]) for row in rows[::each]] == [
        (item.path, *span) for item, span in zip(PARTS, SPANS)
    ]
    assert list(rows[0])[-2:] == ["start", "end"]
    whole = written(tmp_path, kind, [AudioFile(f"{i}.wav") for i in range(4)])
    assert list(whole[0]) == list(rows[0])[:-2]
