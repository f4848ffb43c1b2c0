"""Cross-validated probes and intervals. Nothing here knows about audio.

Letters: N clips, D width of the features, C classes, K folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bestrq2.config import ConfigError

ProbeKind = Literal["linear", "knn"]
NEIGHBOURS, TEMPERATURE = 10, 0.07  # as X-ARES
STRENGTHS = (0.002, 0.02, 0.2, 2.0)


def require_sklearn() -> Any:
    """
    Raises:
        ConfigError: if scikit-learn is not installed, saying how to get it.
    """
    try:
        import sklearn
    except ImportError as error:
        raise ConfigError("probes need scikit-learn: pip install 'bestrq2[probe]'") from error
    return sklearn


@dataclass(frozen=True)
class Task:
    """Labels to be predicted, and what must not be split between training and test.

    Attributes:
        labels: ``(N,)`` int64 class of each clip.
        groups: ``(N,)`` int64; clips of one group (speaker, recording, package) share a fold.
        classes: names, by number.
        folds: ``(N,)`` int64 fold in which a clip is tested.
    """

    labels: np.ndarray
    groups: np.ndarray
    classes: list[str]
    folds: np.ndarray


def make_task(labels: Sequence[str], groups: Sequence[str], num_folds: int = 5, seed: int = 0) -> Task:
    """Number classes and groups, and deal whole groups to stratified folds.

    Raises:
        ConfigError: for fewer than two classes or folds, or a class with fewer than two groups, which can never be
            trained on and tested at once.
    """
    require_sklearn()
    from sklearn.model_selection import StratifiedGroupKFold

    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    _, g = np.unique(np.asarray(groups), return_inverse=True)
    if len(classes) < 2:
        raise ConfigError(f"expected at least two different labels, got {[str(name) for name in classes]}")
    if num_folds < 2:
        raise ConfigError(f"--folds: expected at least 2, got {num_folds}")
    groups_of = [len(np.unique(g[y == c])) for c in range(len(classes))]
    alone = [repr(str(name)) for name, count in zip(classes, groups_of) if count < 2]
    if alone:
        raise ConfigError(
            f"labels {', '.join(alone)} occur in one group only, so they cannot be tested on clips from another; "
            "choose other groups (--group) or leave these labels out"
        )
    splitter = StratifiedGroupKFold(min(num_folds, min(groups_of)), shuffle=True, random_state=seed)
    folds = np.zeros(len(y), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(np.zeros(len(y)), y, g)):
        folds[test] = number
    return Task(y.astype(np.int64), g.astype(np.int64), [str(name) for name in classes], folds)


def choose_regularisation(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """C of the logistic regression by balanced accuracy over 3 folds of whole groups inside the training set: the best
    of ``STRENGTHS``, the strongest regularisation among equals, or the third where a class has a single group."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    smallest = min(len(np.unique(groups[labels == c])) for c in np.unique(labels))
    if smallest < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    hits = np.zeros((len(STRENGTHS), len(labels)), dtype=bool)
    splitter = StratifiedGroupKFold(min(3, smallest), shuffle=True, random_state=0)
    for train, test in splitter.split(features, labels, groups):
        for number, strength in enumerate(STRENGTHS):
            model = LogisticRegression(C=strength, max_iter=2000).fit(features[train], labels[train])
            hits[number, test] = model.predict(features[test]) == labels[test]
    scores = np.mean([hits[:, labels == c].mean(1) for c in np.unique(labels)], axis=0)
    return STRENGTHS[int(scores.argmax())]


def predict(features: np.ndarray, task: Task, kind: ProbeKind, regularisation: float | None = None) -> np.ndarray:
    """Class of every clip, by a probe that was trained on the other folds.

    Features are standardised with the statistics of the training folds. "linear" is logistic regression with inverse
    strength ``regularisation`` (None: chosen inside the training folds); "knn" weighs the 10 nearest
    training clips by exp(cosine / 0.07).

    Args:
        features: ``(N, D)``.

    Returns:
        ``(N,)`` int64.
    """
    require_sklearn()
    from sklearn.linear_model import LogisticRegression

    predicted = np.zeros(len(features), dtype=np.int64)
    for fold in np.unique(task.folds):
        test = task.folds == fold
        mean, std = features[~test].mean(0), features[~test].std(0)
        scaled = (features - mean) / np.where(std > 0, std, 1.0)
        if kind == "linear":
            strength = regularisation
            if strength is None:
                strength = choose_regularisation(scaled[~test], task.labels[~test], task.groups[~test])
            model = LogisticRegression(C=strength, max_iter=2000).fit(scaled[~test], task.labels[~test])
            predicted[test] = model.predict(scaled[test])
        else:
            predicted[test] = _neighbours(scaled[~test], task.labels[~test], scaled[test], len(task.classes))
    return predicted


def _neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray, num_classes: int) -> np.ndarray:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    cosine = unit(test) @ unit(train).T
    count = min(NEIGHBOURS, len(train))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
    weight = np.exp(np.take_along_axis(cosine, nearest, 1) / TEMPERATURE)
    votes = np.zeros((len(test), num_classes))
    for neighbour in range(count):
        votes[np.arange(len(test)), labels[nearest[:, neighbour]]] += weight[:, neighbour]
    return votes.argmax(1)


def balanced_accuracy(predicted: np.ndarray, task: Task) -> float:
    """Mean recall over classes."""
    return float(np.mean([(predicted[task.labels == c] == c).mean() for c in range(len(task.classes))]))


def bootstrap(predicted: np.ndarray, task: Task, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Balanced accuracies of ``resamples`` tests whose groups were drawn with replacement, ``(resamples,)``.

    Whole groups are drawn, because clips of one group fail together. The same seed draws the same groups, so that
    differences between two probes are paired. A class that no drawn group has is left out of its mean.
    """
    num_groups, num_classes = int(task.groups.max()) + 1, len(task.classes)
    correct = np.zeros((num_groups, num_classes))
    total = np.zeros((num_groups, num_classes))
    np.add.at(correct, (task.groups, task.labels), predicted == task.labels)
    np.add.at(total, (task.groups, task.labels), 1.0)
    draws = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=resamples)
    tested = draws @ total
    with np.errstate(invalid="ignore"):
        return np.nanmean(np.where(tested > 0, (draws @ correct) / np.maximum(tested, 1), np.nan), axis=1)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def confusion(predicted: np.ndarray, task: Task) -> np.ndarray:
    """``(C, C)`` counts: true class by predicted class."""
    matrix = np.zeros((len(task.classes), len(task.classes)), dtype=np.int64)
    np.add.at(matrix, (task.labels, predicted), 1)
    return matrix
