"""Metrics against scikit-learn and scipy, resamples against metrics of the resampled data, intervals against theory."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from bestrq2.probing import metrics
from bestrq2.probing.metrics import average_precision, confusion, draw, estimate

sklearn_metrics = pytest.importorskip("sklearn.metrics")
ONE = np.ones((1, 20))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((300, 4)), 2)  # ties
    labels = np.minimum(rng.integers(0, 5, 300), 3)
    truth = rng.random((300, 4)) < (0.02, 0.2, 0.5, 0.9)
    return scores, labels, truth, rng.integers(0, 20, 300)


def test_single_label(data):
    scores, labels, _, groups = data
    values = metrics.single_label(scores, labels, groups, ONE)
    predicted = scores.argmax(1)
    assert values["balanced_accuracy"][0] == pytest.approx(sklearn_metrics.balanced_accuracy_score(labels, predicted))
    assert values["accuracy"][0] == pytest.approx((labels == predicted).mean())
    assert values["macro_F1"][0] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average="macro"))
    precision = [sklearn_metrics.average_precision_score(labels == c, scores[:, c]) for c in range(4)]
    assert values["mAP"][0] == pytest.approx(np.mean(precision))
    assert (confusion(predicted, labels, 4) == sklearn_metrics.confusion_matrix(labels, predicted)).all()


def test_several_labels(data):
    scores, _, truth, groups = data
    values = metrics.several_labels(scores, truth, groups, ONE, 0.6, "frame_")
    assert values["frame_mAP"][0] == pytest.approx(sklearn_metrics.average_precision_score(truth, scores))
    active = scores >= 0.6
    for kind in ("macro", "micro"):
        assert values[f"frame_{kind}_F1"][0] == pytest.approx(sklearn_metrics.f1_score(truth, active, average=kind))
    for c, row in enumerate(metrics.per_class(scores, truth, active, list("abcd"))):
        assert row["recall"] == pytest.approx(sklearn_metrics.recall_score(truth[:, c], active[:, c]))
        assert row["precision"] == pytest.approx(sklearn_metrics.precision_score(truth[:, c], active[:, c]))
        assert row["AP"] == pytest.approx(sklearn_metrics.average_precision_score(truth[:, c], scores[:, c]))
        assert (row["count"], row["chance_AP"]) == (truth[:, c].sum(), truth[:, c].mean())


def test_regression(data):
    scores, _, _, groups = data
    predicted, targets = scores[:, 0], scores[:, 0] + scores[:, 1]
    values = metrics.regression(predicted, targets, groups, ONE)
    assert values["R2"][0] == pytest.approx(sklearn_metrics.r2_score(targets, predicted))
    assert values["Spearman"][0] == pytest.approx(spearmanr(predicted, targets).statistic)
    assert values["MAE"][0] == pytest.approx(np.abs(predicted - targets).mean())


@pytest.mark.parametrize(("unit", "origin"), [(1e-9, 0), (1e9, 0), (1, 1e7), (1e-3, 1.7e9)])
def test_regression_in_any_unit(data, unit, origin):
    scores, _, _, groups = data
    predicted, targets = scores[:, 0] * unit + origin, (scores[:, 0] + scores[:, 1]) * unit + origin
    values = metrics.regression(predicted, targets, groups, ONE)
    assert values["R2"][0] == pytest.approx(sklearn_metrics.r2_score(targets, predicted), rel=1e-6)
    assert values["Spearman"][0] == pytest.approx(spearmanr(predicted, targets).statistic)
    assert values["MAE"][0] == pytest.approx(np.abs(predicted - targets).mean())


def test_resamples_are_metrics_of_resampled_groups(data):
    """Every resample equals scikit-learn's metric of the clips repeated as often as their group was drawn."""
    scores, labels, truth, groups = data
    weights = draw(20, seed=3, resamples=5)
    assert (weights.sum(1) == 20).all()
    single = metrics.single_label(scores, labels, groups, weights)
    several = metrics.several_labels(scores, truth, groups, weights, 0.5)
    numbers = metrics.regression(scores[:, 0], scores[:, 0] + scores[:, 1], groups, weights)
    for number, weight in enumerate(weights):
        rows = np.repeat(np.arange(300), weight[groups].astype(int))
        s, y, t = scores[rows], labels[rows], truth[rows]
        assert single["balanced_accuracy"][number] == pytest.approx(
            sklearn_metrics.balanced_accuracy_score(y, s.argmax(1))
        )
        assert single["macro_F1"][number] == pytest.approx(sklearn_metrics.f1_score(y, s.argmax(1), average="macro"))
        assert several["mAP"][number] == pytest.approx(sklearn_metrics.average_precision_score(t, s))
        assert several["micro_F1"][number] == pytest.approx(sklearn_metrics.f1_score(t, s >= 0.5, average="micro"))
        assert numbers["R2"][number] == pytest.approx(sklearn_metrics.r2_score(s[:, 0] + s[:, 1], s[:, 0]))
        assert numbers["Spearman"][number] == pytest.approx(spearmanr(s[:, 0], s[:, 0] + s[:, 1]).statistic)


def test_ranks_of_many_scores_are_told_apart_well_enough():
    rng = np.random.default_rng(1)
    positive = rng.random(20000) < 0.1
    scores = rng.normal(size=20000) + positive
    groups, weights = np.zeros(20000, int), np.ones((2, 1))
    exact = average_precision(scores, positive, groups, weights[:1])[0]
    assert exact == pytest.approx(sklearn_metrics.average_precision_score(positive, scores))
    assert average_precision(scores, positive, groups, weights)[1] == pytest.approx(exact, abs=2e-3)
    assert np.isnan(average_precision(scores, np.zeros(20000, bool), groups, weights)).all()


def test_classes_that_are_missing():
    """Out of a mean, not counted as failures; nothing at all is NaN."""
    scores, groups = np.eye(3)[[0, 0, 2]], np.arange(3)
    values = metrics.single_label(scores, np.array([0, 0, 2]), groups, np.array([[1, 1, 1.0], [3, 0, 0]]))
    assert values["balanced_accuracy"].tolist() == [1, 1]
    assert np.isnan(
        metrics.f_scores(np.zeros((2, 2), bool), np.zeros((2, 2), bool), groups[:2], np.ones((1, 2)))["macro_F1"]
    )
    for constant in (1.0, 0.1, 1e-9, 1e9):
        known = np.full(3, constant)
        assert np.isnan(metrics.regression(np.arange(3.0), known, groups, np.ones((1, 3)))["R2"])


def test_interval_grows_with_dependence():
    """The same hits, once in independent clips and once in clips of a group that fail together."""
    rng = np.random.default_rng(4)
    hit, labels = np.repeat(rng.random(40) < 0.7, 10), np.tile([0, 1], 200)
    scores = np.eye(2)[np.where(hit, labels, 1 - labels)]
    widths = []
    for groups in (np.arange(400), np.arange(400) // 10):
        found = estimate(lambda w, g=groups: metrics.single_label(scores, labels, g, w), groups.max() + 1, 0)
        value = found["balanced_accuracy"]
        widths.append(value.high - value.low)
        assert value.low < value.value < value.high
    assert widths[1] > 2 * widths[0]
    # Independent clips: two binomial proportions of 200, averaged.
    p = hit.mean()
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 400), rel=0.1)


def test_differences_are_paired():
    """Two probes that fail on the same clips differ by nothing, whatever groups are drawn."""
    rng = np.random.default_rng(5)
    labels, groups = np.tile([0, 1], 50), np.arange(100)
    scores = np.eye(2)[np.where(rng.random(100) < 0.7, labels, 1 - labels)]
    first, second = (
        estimate(lambda w: metrics.single_label(scores, labels, groups, w), 100, 0)["accuracy"] for _ in range(2)
    )
    gap = first.minus(second)
    assert (gap.value, gap.low, gap.high) == (0, 0, 0)
