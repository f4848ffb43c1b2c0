"""Settings of a probe: clips, labels and heads."""

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from bestrq2.config import ConfigError
from bestrq2.models.readout import POOLINGS, ROW_JOINS

ProbeKind = Literal["classification", "multilabel", "events", "retrieval", "regression"]
Head = Literal["linear", "ridge", "mlp", "knn"]
COMBINATIONS = ("each", "average", "concatenate", "weighted")
SCALINGS = ("all", "sides", "none")

# Inverse strengths of L2 regularisation among which the training folds choose. An MLP gets more freedom: what only
# shrinks the weights of a linear head silences its hidden units.
# Those of "ridge" are relative to the size of the features, see heads.ridge_scores.
STRENGTHS: dict[str, tuple[float, ...]] = {
    "linear": (0.002, 0.02, 0.2, 2.0),
    "ridge": (1.0, 3.0, 10.0, 30.0, 100.0, 1000.0),
    "mlp": (1.0, 30.0, 1000.0),
}
MAIN_METRIC: dict[str, str] = {
    "classification": "balanced_accuracy",
    "multilabel": "mAP",
    "events": "frame_mAP",
    "retrieval": "R@1",
    "regression": "R2",
}


@dataclass(frozen=True)
class ProbeTask:
    """A question with its answers.

    Attributes:
        manifest: labelled clips (CSV, TSV or JSON lines); None: the 24 clips of the package by domain.
        kind: "classification" (one label a clip), "multilabel" (any number), "events" (labels with onset and offset),
            "retrieval" (clips with the same label match; nothing is trained), "regression" (one number).
        label: column of the label; for "multilabel" one column whose labels stand between ``separator``, or several
            columns of 0 and 1, named by their label. Not used by "events".
        separator: of "multilabel". A cell with nothing but the separator has none of the labels; an empty one is
            unlabelled.
        events: table of "events": columns path, onset, offset (seconds) and label.
        group: column whose clips are never split between training and test (speaker, recording, package). For
            retrieval without ``split``: clips of the query's own group are not in its gallery.
        split: column that says which clips train and which test, instead of cross-validation. For "retrieval", which
            clips are the gallery and which the queries.
        train_values, test_values: of ``split``; None: "train" and "test", or "gallery" and "query". Rows with other
            values are left out.
        where: only rows whose column has one of the values: ``(("lang", ("it", "fr")), ...)``.
        head: "linear" (logistic regression; ridge regression of numbers), "ridge" (least squares with a penalty, also
            for classes), "mlp" (one hidden layer), "knn" (10 neighbours).
        pooling: of frames to a clip: "mean", "max" or "mean+std" over time.
        layers: of the encoder: "final", "middle" (its two middle blocks), "all", or numbers of blocks and "final"
            separated by commas.
        combine: of several layers: "average", "concatenate", "weighted" (the linear head learns one weight a layer), or
            "each" (separate results; not in :func:`~bestrq2.probing.run_probe`, which gives one).
        rows: "average" or "concatenate" the frequency rows of 2-D patches; None: as the encoder does by itself.
        folds: at most; 0: every group is a fold.
        regularisation: inverse strength of the L2 penalty; None: chosen inside the training folds.
        threshold: above which a label counts as predicted ("multilabel", "events").
        segment_seconds: length of the segments of the segment-based F1 ("events").
        scaling: of "retrieval", see :mod:`bestrq2.probing.retrieval`: "all" (gallery and queries together), "sides"
            (each by itself) or "none".
        drop_rare: leave out classes that occur in too few groups to be tested, instead of an error.
        seed: of the folds, of the MLP and of the bootstrap.

    Raises:
        ConfigError: for an impossible value.
    """

    manifest: str | None = None
    kind: str = "classification"
    label: str | tuple[str, ...] = "label"
    separator: str = ";"
    events: str | None = None
    group: str | None = None
    split: str | None = None
    train_values: tuple[str, ...] | None = None
    test_values: tuple[str, ...] | None = None
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    head: str = "linear"
    pooling: str = "mean+std"
    layers: str = "final"
    combine: str = "each"
    rows: str | None = None
    folds: int = 5
    regularisation: float | None = None
    threshold: float = 0.5
    segment_seconds: float = 1.0
    scaling: str = "all"
    drop_rare: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("label", "train_values", "test_values"):  # configurations give lists, and a task is a key
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "where", tuple((column, tuple(values)) for column, values in self.where))
        expectations = [
            ("kind", self.kind in get_args(ProbeKind), self.kind, f"one of {', '.join(get_args(ProbeKind))}"),
            ("head", self.head in get_args(Head), self.head, f"one of {', '.join(get_args(Head))}"),
            ("pooling", self.pooling in POOLINGS, self.pooling, f"one of {', '.join(POOLINGS)}"),
            ("combine", self.combine in COMBINATIONS, self.combine, f"one of {', '.join(COMBINATIONS)}"),
            (
                "combine",
                self.combine != "weighted" or (self.head == "linear" and self.kind != "retrieval"),
                self.combine,
                "learned weights with the linear head alone, and not for retrieval",
            ),
            ("rows", self.rows in (None, *ROW_JOINS), self.rows, f"one of {', '.join(ROW_JOINS)}"),
            ("scaling", self.scaling in SCALINGS, self.scaling, f"one of {', '.join(SCALINGS)}"),
            (
                "train_values",
                not set(self.train_values or ()) & set(self.test_values or ()),
                self.train_values,
                f"other values than those of the test side, {self.test_values!r}",
            ),
            ("folds", self.folds == 0 or self.folds >= 2, self.folds, "at least 2, or 0 for one per group"),
            (
                "regularisation",
                self.regularisation is None or 0 < self.regularisation < math.inf,
                self.regularisation,
                "a positive number",
            ),
            ("threshold", 0 < self.threshold < 1, self.threshold, "a number between 0 and 1"),
            (
                "segment_seconds",
                0 < self.segment_seconds < math.inf,
                self.segment_seconds,
                "a positive number of seconds",
            ),
            ("seed", 0 <= self.seed < 2**63, self.seed, "a whole number from 0 to 2^63 - 1"),
            ("separator", bool(self.separator), self.separator, "at least one character"),
            ("label", bool(self.label), self.label, "the name of a column"),
            (
                "label",
                isinstance(self.label, str) or self.kind == "multilabel",
                self.label,
                f"one column for {self.kind}",
            ),
            ("events", self.kind != "events" or bool(self.events), self.events, "a table of events (--events TABLE)"),
        ]
        for name, fine, value, expected in expectations:
            if not fine:
                raise ConfigError(f"probe {name}: expected {expected}, got {value!r}")

    @property
    def path(self) -> Path:
        """The manifest; for None that of the package."""
        if self.manifest is not None:
            return Path(self.manifest)
        return Path(str(resources.files("bestrq2.data").joinpath("tiny", "labels.csv")))

    @property
    def label_columns(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) else tuple(self.label)

    @property
    def metric(self) -> str:
        """The one to compare encoders by."""
        return MAIN_METRIC[self.kind]


def packaged_task(**choices: object) -> ProbeTask:
    """Speech, music or environment on the 24 clips of the package, in 20 groups."""
    return ProbeTask(**{"label": "domain", "group": "item", **choices})  # type: ignore[arg-type]
