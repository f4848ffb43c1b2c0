"""From features and labels to out-of-fold scores and metrics with intervals. It is independent of audio.

Letters: N rows (clips, or frames of clips), D width of the features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import metrics
from .events import frame_labels, segment_decisions, segment_labels
from .folds import NEVER, inner_folds
from .heads import ridge_scores, scores_of, standardise, weighted_layers
from .labels import LabelledClips
from .metrics import Estimate, Values, estimate
from .retrieval import rank, retrieval_values
from .task import STRENGTHS, ProbeTask

MANY_ROWS = 5000  # above, one fold of three is enough to choose regularisation by


@dataclass
class Rows:
    """Features and labels that heads are fitted to: one row per clip, or per frame.

    Attributes:
        targets: ``(N,)`` int64 or float64, or ``(N, C)`` bool.
        groups, folds: ``(N,)`` int64.
        classes: names.
        clip: ``(N,)`` number of the clip.
        hop: seconds per row, None when a row is a clip.
    """

    targets: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    classes: list[str]
    clip: np.ndarray
    hop: float | None = None


@dataclass
class Outcome:
    """One head on one kind of features.

    Attributes:
        metrics: by name.
        per_class: one row per class; empty for regression and retrieval.
        scores: ``(N, C)`` of every row by heads that never saw its group; NaN where a row only trains.
        strengths: regularisation used in each fold.
        layer_weights: learned by the head, in the order of the layers; empty where none are learned.
    """

    metrics: dict[str, Estimate]
    per_class: list[dict[str, float | str]] = field(default_factory=list)
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    strengths: list[float] = field(default_factory=list)
    layer_weights: list[float] = field(default_factory=list)


def clip_rows(clips: LabelledClips, folds: np.ndarray) -> Rows:
    return Rows(clips.targets, clips.groups, folds, clips.classes, np.arange(len(clips)))


def frame_rows(clips: LabelledClips, folds: np.ndarray, num_frames: Sequence[int], hop: float) -> Rows:
    """One row per frame of ``hop`` seconds; ``num_frames`` of every clip."""
    labels = [frame_labels(rows, n, hop, len(clips.classes)) for rows, n in zip(clips.events, num_frames)]
    clip = np.repeat(np.arange(len(clips)), num_frames)
    return Rows(np.concatenate(labels), clips.groups[clip], folds[clip], clips.classes, clip, hop)


def choose_strength(
    head: str,
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    num_classes: int,
    whole: bool = True,
    parts: int = 1,
) -> float:
    """The best of the head's ``STRENGTHS`` over 3 folds of whole groups inside the training set, or over the first of
    them alone if not ``whole``: by balanced accuracy, mAP or squared error; the strongest regularisation among equals,
    or one from the middle where a class has a single group."""
    strengths = STRENGTHS[head]
    inner = inner_folds(targets, groups, num_classes)
    if inner is None:
        return strengths[len(strengths) // 2]
    inner_parts = range(int(inner.max()) + 1) if whole else range(1)
    tested = np.isin(inner, inner_parts)
    scores = np.zeros((len(strengths), len(targets), 1 if targets.dtype.kind == "f" else num_classes))
    for part in inner_parts:
        train, test = standardise(features[inner != part], features[inner == part])
        known = targets[inner != part]
        if head == "ridge":
            scores[:, inner == part] = ridge_scores(train, known, test, num_classes, strengths)
            continue
        for number, strength in enumerate(strengths):
            scores[number, inner == part] = scores_of(head, train, known, test, num_classes, strength, parts=parts)
    merits = np.array([_merit(found[tested], targets[tested]) for found in scores])
    return strengths[int(np.argmax(np.round(np.nan_to_num(merits, nan=-np.inf), 9)))]


def _merit(scores: np.ndarray, targets: np.ndarray) -> float:
    if targets.dtype.kind == "f":  # in units of their deviation: rounding must not depend on the unit
        return -float((((scores[:, 0] - targets) / (targets.std() or 1.0)) ** 2).mean())
    groups, one = np.zeros(len(targets), dtype=np.int64), np.ones((1, 1))
    if targets.ndim == 2:
        values = [metrics.average_precision(s, t, groups, one)[0] for s, t in zip(scores.T, targets.T) if t.any()]
        return float(np.mean(values)) if values else 0.0
    predicted = scores.argmax(1)
    return float(np.mean([(predicted[targets == c] == c).mean() for c in np.unique(targets)]))


def cross_validate(
    features: np.ndarray,
    rows: Rows,
    head: str,
    regularisation: float | None = None,
    seed: int = 0,
    parts: int = 1,
) -> tuple[np.ndarray, list[float]]:
    """Scores ``(N, C)`` of every row by heads trained on the other folds, NaN for rows that only train, and the
    regularisation of each fold (chosen inside its training rows if None). Features ``(N, D)`` are standardised with
    the statistics of the training rows; ``parts``: see :func:`~bestrq2.probing.heads.scores_of`."""
    num_classes = len(rows.classes)
    scores = np.full((len(features), 1 if rows.targets.dtype.kind == "f" else num_classes), np.nan)
    strengths = []
    for fold in np.unique(rows.folds[rows.folds != NEVER]):
        test = rows.folds == fold
        targets, strength = rows.targets[~test], regularisation
        if head == "knn":
            strength = 1.0  # not used
        elif strength is None:
            quick = head == "mlp" or rows.hop is not None or len(targets) > MANY_ROWS
            groups = rows.groups[~test]
            strength = choose_strength(head, features[~test], targets, groups, num_classes, not quick, parts)
        train, asked = standardise(features[~test], features[test])
        scores[test] = scores_of(head, train, targets, asked, num_classes, strength, seed, parts)
        strengths.append(strength)
    return scores, [] if head == "knn" else strengths


def measure(scores: np.ndarray, rows: Rows, clips: LabelledClips, seconds: Sequence[float], task: ProbeTask) -> Outcome:
    """Metrics of the scores of all folds together; ``seconds`` of every clip, for segments."""
    tested = rows.folds != NEVER
    groups = np.unique(rows.groups[tested], return_inverse=True)[1].astype(np.int64)
    scores, targets = scores[tested], rows.targets[tested]
    prefix = "" if rows.hop is None else "frame_"

    def values(weights: np.ndarray) -> Values:
        if targets.dtype.kind == "f":
            return metrics.regression(scores[:, 0], targets, groups, weights)
        if targets.ndim == 1:
            return metrics.single_label(scores, targets, groups, weights)
        return metrics.several_labels(scores, targets, groups, weights, task.threshold, prefix)

    number = int(groups.max()) + 1
    results = estimate(values, number, task.seed)
    if targets.dtype.kind == "f":
        return Outcome(results)
    if targets.ndim == 1:
        classes = np.arange(len(rows.classes))
        truth, active = targets[:, None] == classes, scores.argmax(1)[:, None] == classes
    else:
        truth, active = targets, scores >= task.threshold
    table = metrics.per_class(scores, truth, active, rows.classes)
    if rows.hop is not None:
        segments = _segments(active, rows.clip[tested], clips, seconds, rows.hop, task.segment_seconds)
        # Clips of one group follow each other in neither order, so segments carry the group of their clip.
        clip_groups = dict(zip(rows.clip[tested].tolist(), groups.tolist()))
        segment_groups = np.array([clip_groups[int(c)] for c in segments[2]], dtype=np.int64)
        results |= estimate(
            lambda weights: metrics.f_scores(segments[0], segments[1], segment_groups, weights, "segment_"),
            number,
            task.seed,
        )
        for c, row in enumerate(table):
            hits = int((segments[0][:, c] & segments[1][:, c]).sum())
            both = int(segments[0][:, c].sum() + segments[1][:, c].sum())
            row["segment_F1"] = 2 * hits / both if both else np.nan
    return Outcome(results, table)


def _segments(
    active: np.ndarray, clip: np.ndarray, clips: LabelledClips, seconds: Sequence[float], hop: float, segment: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decisions, truth ``(S, C)`` and clip ``(S,)`` of the segments of all tested clips."""
    decisions, truth, origin = [], [], []
    for number in np.unique(clip):
        own = active[clip == number]
        decisions.append(segment_decisions(own, hop, seconds[number], segment))
        truth.append(segment_labels(clips.events[number], seconds[number], segment, active.shape[1]))
        origin.append(np.full(len(truth[-1]), number))
    return np.concatenate(decisions), np.concatenate(truth), np.concatenate(origin)


def probe_features(
    features: np.ndarray,
    rows: Rows,
    clips: LabelledClips,
    seconds: Sequence[float],
    task: ProbeTask,
    head: str,
    parts: int = 1,
) -> Outcome:
    """Everything one head says about one kind of features ``(N, D)``."""
    scores, strengths = cross_validate(features, rows, head, task.regularisation, task.seed, parts)
    outcome = measure(scores, rows, clips, seconds, task)
    outcome.scores, outcome.strengths = scores, strengths
    if parts > 1:  # of one more head, fitted to everything: the folds' own weights differ a little from each other
        known, _ = standardise(features, features[:0])
        strength = strengths[len(strengths) // 2]
        weights = weighted_layers(known, rows.targets, known[:0], len(rows.classes), strength, parts)[1]
        outcome.layer_weights = weights.tolist()
    return outcome


def probe_retrieval(features: np.ndarray, clips: LabelledClips, task: ProbeTask) -> Outcome:
    """R@1, R@5 and mAP of pooled features ``(N, D)``; ``scores (Q, 5)`` are the per-query columns of
    :func:`~bestrq2.probing.retrieval.rank`.

    Raises:
        ConfigError: if no query has a match in the gallery.
    """
    ranked = rank(features, clips, task.group is not None, task.scaling)
    groups = np.unique(clips.groups[ranked["query"]], return_inverse=True)[1].astype(np.int64)
    results = estimate(lambda weights: retrieval_values(ranked, groups, weights), int(groups.max()) + 1, task.seed)
    return Outcome(results, scores=np.stack(list(ranked.values()), 1))


def chance(rows: Rows | None, outcome: Outcome) -> float:
    """The main metric of uninformative scores: one over the classes, the share of positives, of matches, or 0."""
    if rows is None:
        return float(outcome.scores[:, -1].mean())
    if rows.targets.dtype.kind == "f":
        return 0.0
    if rows.targets.ndim == 1:
        return 1 / len(rows.classes)
    shares = rows.targets[rows.folds != NEVER].mean(0)
    return float(shares[shares > 0].mean()) if shares.any() else 0.0  # of the classes that the metric is of
