"""Metrics of scores, each for many weightings of the groups at once: the data as it is, and its bootstrap resamples.

``weights (R, G)`` says how often each group counts; a row of ones gives the plain metric. Whole groups are drawn,
because clips of one group fail together. All resamples draw the same groups for everything they are compared with.

Letters: N clips or frames, G groups, C classes, R weightings, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
AP_BINS = 2048  # distinct scores that resampled average precision tells apart; the plain one is exact
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % bootstrap percentile interval over groups. ``samples (R,)`` are the resampled values."""

    value: float
    low: float
    high: float
    samples: np.ndarray

    @classmethod
    def of(cls, value: float, samples: np.ndarray) -> "Estimate":
        finite = samples[np.isfinite(samples)]
        low, high = np.percentile(finite, [2.5, 97.5]) if len(finite) else (np.nan, np.nan)
        return cls(float(value), float(low), float(high), samples)

    def minus(self, other: "Estimate") -> "Estimate":
        """The difference of two metrics whose resamples drew the same groups."""
        return Estimate.of(self.value - other.value, self.samples - other.samples)


def draw(num_groups: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """``(resamples, G)`` float64: how often each group was drawn when G were drawn with replacement."""
    share = np.full(num_groups, 1 / num_groups)
    return np.random.default_rng(seed).multinomial(num_groups, share, size=resamples).astype(np.float64)


def estimate(values: Callable[[np.ndarray], Values], num_groups: int, seed: int) -> dict[str, Estimate]:
    """Value and interval of every metric that ``values`` computes from weights ``(R, G)``."""
    plain, resampled = values(np.ones((1, num_groups))), values(draw(num_groups, seed))
    return {name: Estimate.of(plain[name][0], resampled[name]) for name in plain}


def by_group(groups: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``(N,)`` group numbers and ``(N, C)`` values -> their sums ``(G, C)``."""
    sums = np.zeros((int(groups.max()) + 1, rows.shape[1]))
    np.add.at(sums, groups, rows)
    return sums


def _mean_over(classes: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean over the classes ``(R, C)`` that count in a weighting; NaN where none does."""
    number = counted.sum(1)
    return np.where(number > 0, np.where(counted, classes, 0).sum(1) / np.maximum(number, 1), np.nan)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1e-12), np.nan)


def average_precision(scores: np.ndarray, positive: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall steps, ``(R,)``, NaN without a positive: sum of (R_n - R_n-1) P_n over distinct
    scores, as scikit-learn. With more than one weighting, scores are told apart in 2048 ranks at most.

    Args:
        scores, positive, groups: ``(N,)``.
    """
    from scipy.sparse import csr_array

    distinct, place = np.unique(-scores, return_inverse=True)
    bins = len(distinct)
    if len(weights) > 1 and bins > AP_BINS:
        place, bins = place * AP_BINS // bins, AP_BINS
    shape = (weights.shape[1], bins)
    everything = csr_array((np.ones(len(scores)), (groups, place)), shape)
    hits = csr_array((np.ones(int(positive.sum())), (groups[positive], place[positive])), shape)
    found = (hits.T @ weights.T).T
    true, seen = np.cumsum(found, 1), np.cumsum((everything.T @ weights.T).T, 1)
    return _ratio((found * true / np.maximum(seen, 1e-12)).sum(1), true[:, -1])


def single_label(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Values:
    """Of class scores ``(N, C)`` and true classes ``(N,)``. Classes that a weighting lacks are left out of its means;
    F1 counts those that are true or predicted."""
    num_classes = scores.shape[1]
    predicted, classes = scores.argmax(1), np.arange(num_classes)
    is_true, is_predicted = labels[:, None] == classes, predicted[:, None] == classes
    true, guessed = weights @ by_group(groups, is_true), weights @ by_group(groups, is_predicted)
    hits = weights @ by_group(groups, is_true & is_predicted)
    precision = [average_precision(scores[:, c], is_true[:, c], groups, weights) for c in classes]
    return {
        "balanced_accuracy": _mean_over(hits / np.maximum(true, 1e-12), true > 0),
        "accuracy": _ratio(hits.sum(1), true.sum(1)),
        "macro_F1": _mean_over(2 * hits / np.maximum(true + guessed, 1e-12), true + guessed > 0),
        "mAP": _mean_over(np.stack(precision, 1), true > 0),
    }


def f_scores(
    active: np.ndarray, truth: np.ndarray, groups: np.ndarray, weights: np.ndarray, prefix: str = ""
) -> Values:
    """Macro and micro F1 of decisions ``(N, C)``. Classes that are neither true nor predicted are left out."""
    true, guessed = weights @ by_group(groups, truth), weights @ by_group(groups, active)
    hits = weights @ by_group(groups, active & truth)
    both = true + guessed
    return {
        f"{prefix}macro_F1": _mean_over(2 * hits / np.maximum(both, 1e-12), both > 0),
        f"{prefix}micro_F1": _ratio(2 * hits.sum(1), both.sum(1)),
    }


def several_labels(
    scores: np.ndarray, truth: np.ndarray, groups: np.ndarray, weights: np.ndarray, threshold: float, prefix: str = ""
) -> Values:
    """Of scores ``(N, C)`` and labels ``(N, C)`` bool; F1 at ``score >= threshold``."""
    precision = np.stack(
        [average_precision(scores[:, c], truth[:, c], groups, weights) for c in range(truth.shape[1])], 1
    )
    values = {f"{prefix}mAP": _mean_over(precision, np.isfinite(precision))}
    return values | f_scores(scores >= threshold, truth, groups, weights, prefix)


def regression(predicted: np.ndarray, targets: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> Values:
    """R2, Spearman's rank correlation, and mean absolute error, of numbers ``(N,)``."""
    from scipy.stats import rankdata

    # Sums of squares of deviations from the mean in units of their own: as exact in Hz as in pascal or in years.
    known, wrong = targets - targets.mean(), predicted - targets
    unit = np.abs(known).max() or 1.0
    rows = [np.ones_like(targets), known / unit, (known / unit) ** 2, (wrong / unit) ** 2, np.abs(wrong)]
    count, total, squares, error, absolute = (weights @ by_group(groups, np.stack(rows, 1))).T
    spread = squares - total**2 / count
    # Ranks change with every resample: each is repeated as often as its group was drawn.
    spearman = np.full(len(weights), np.nan)
    for number, weight in enumerate(weights):
        drawn = np.repeat(np.arange(len(targets)), weight[groups].astype(np.int64))
        ranks = rankdata(predicted[drawn]), rankdata(targets[drawn])
        if all(np.ptp(rank) > 0 for rank in ranks):
            spearman[number] = np.corrcoef(*ranks)[0, 1]
    r2 = 1 - _ratio(error, np.where(spread > 1e-12 * np.maximum(squares, 1e-300), spread, 0))
    return {"R2": r2, "Spearman": spearman, "MAE": absolute / count}


def per_class(
    scores: np.ndarray, truth: np.ndarray, active: np.ndarray, classes: list[str]
) -> list[dict[str, float | str]]:
    """One row per class from scores, labels and decisions ``(N, C)``: count, recall, precision, F1, AP, and the AP of
    uninformative scores (the share of positives)."""
    groups, one = np.zeros(len(truth), dtype=np.int64), np.ones((1, 1))
    rows: list[dict[str, float | str]] = []
    for c, name in enumerate(classes):
        true, guessed, hits = (int(x.sum()) for x in (truth[:, c], active[:, c], truth[:, c] & active[:, c]))
        rows.append(
            {
                "class": name,
                "count": true,
                "recall": hits / true if true else np.nan,
                "precision": hits / guessed if guessed else np.nan,
                "F1": 2 * hits / (true + guessed) if true + guessed else np.nan,
                "AP": float(average_precision(scores[:, c], truth[:, c], groups, one)[0]),
                "chance_AP": true / len(truth),
            }
        )
    return rows


def confusion(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """``(C, C)`` counts: true class by predicted class."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix
