"""Probes and intervals against independent counts, and folds that never split a group."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from bestrq2.config import ConfigError
from bestrq2.probing.evaluation import (
    STRENGTHS,
    balanced_accuracy,
    bootstrap,
    choose_regularisation,
    confusion,
    interval,
    make_task,
    predict,
)


def clusters(rng, spread=0.3, per_class=24, groups=6):
    labels = np.repeat(["a", "b", "c"], per_class)
    centres = np.eye(3)[np.repeat(range(3), per_class)]
    features = np.concatenate((centres, np.zeros((len(labels), 5))), 1) + spread * rng.normal(size=(len(labels), 8))
    names = [f"{label}{i % groups}" for i, label in enumerate(labels)]
    return features, list(labels), names


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_finds_what_is_there_and_nothing_else(kind):
    rng = np.random.default_rng(0)
    features, labels, groups = clusters(rng)
    task = make_task(labels, groups)
    assert balanced_accuracy(predict(features, task, kind), task) > 0.85
    noise = balanced_accuracy(predict(rng.normal(size=features.shape), task, kind), task)
    assert 0.15 < noise < 0.55


def test_groups_are_never_split():
    _, labels, groups = clusters(np.random.default_rng(0))
    task = make_task(labels, groups, num_folds=4)
    assert set(task.folds) == set(range(4))
    for group in set(task.groups):
        assert len(set(task.folds[task.groups == group])) == 1


def test_group_identity_cannot_be_used():
    """Each group has its own direction and one label: split by clip this is perfect, split by group it is chance."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(12), 10)
    features = np.eye(12)[group] * 3 + 0.1 * rng.normal(size=(120, 12))
    labels = [["x", "y"][g % 2] for g in group]
    together = make_task(labels, [str(g) for g in group])
    apart = make_task(labels, [str(i) for i in range(120)])
    assert balanced_accuracy(predict(features, apart, "linear", 1.0), apart) > 0.98
    assert balanced_accuracy(predict(features, together, "linear", 1.0), together) < 0.75


def test_choice_of_regularisation():
    rng = np.random.default_rng(5)
    labels, groups = np.arange(60) % 2, np.arange(60) // 2
    clean = np.stack((labels * 2.0 - 1, np.zeros(60)), 1) + 0.01 * rng.normal(size=(60, 2))
    assert choose_regularisation(clean, labels, groups) == STRENGTHS[0]  # all are perfect: the strongest
    assert choose_regularisation(clean, labels, labels) == STRENGTHS[2]  # one group a class: nothing to choose by
    # A weak direction between unequal classes: only where its weight may grow does it win over the majority.
    rare = (np.arange(60) % 4 == 0).astype(int)
    assert choose_regularisation(0.5 * (rare[:, None] * 2.0 - 1), rare, np.arange(60)) > STRENGTHS[0]


def test_neighbours_vote_as_written():
    rng = np.random.default_rng(2)
    features, labels, groups = clusters(rng, spread=1.0)
    task = make_task(labels, groups, 3)
    predicted = predict(features, task, "knn")
    for i in range(len(features)):
        train = np.flatnonzero(task.folds != task.folds[i])
        x = (features - features[train].mean(0)) / features[train].std(0)
        similar = [float(x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])) for j in train]
        votes = np.zeros(3)
        for place in np.argsort(similar)[::-1][:10]:
            votes[task.labels[train[place]]] += np.exp(similar[place] / 0.07)
        assert predicted[i] == votes.argmax()


def test_balanced_accuracy_and_confusion():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix

    rng = np.random.default_rng(3)
    labels = ["a"] * 50 + ["b"] * 6 + ["c"] * 10
    task = make_task(labels, [str(i) for i in range(66)], 3)
    predicted = rng.integers(0, 3, 66)
    assert balanced_accuracy(predicted, task) == pytest.approx(balanced_accuracy_score(task.labels, predicted))
    assert (confusion(predicted, task) == confusion_matrix(task.labels, predicted)).all()


def test_interval_grows_with_dependence():
    """The same hits, once in independent clips and once in clips of a group that fail together."""
    rng = np.random.default_rng(4)
    hit = np.repeat(rng.random(40) < 0.7, 10)
    labels = np.tile(["a", "b"], 200)
    alone = make_task(list(labels), [str(i) for i in range(400)], 2)
    grouped = make_task(list(labels), [str(i // 10) for i in range(400)], 2)
    predicted = np.where(hit, alone.labels, 1 - alone.labels)
    widths = [np.diff(interval(bootstrap(predicted, task)))[0] for task in (alone, grouped)]
    assert widths[1] > 2 * widths[0]
    # Independent clips: two binomial proportions of 200, averaged.
    p = hit.mean()
    assert widths[0] == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 400), rel=0.1)


@pytest.mark.parametrize(
    ("labels", "groups", "folds", "message"),
    [
        (["a", "a"], ["1", "2"], 2, "two different labels"),
        (["a", "a", "b", "b"], ["1", "2", "3", "3"], 2, "'b' occur in one group only"),
        (["a", "a", "b", "b"], ["1", "2", "3", "4"], 1, "--folds"),
    ],
)
def test_impossible_tasks(labels, groups, folds, message):
    with pytest.raises(ConfigError, match=message):
        make_task(labels, groups, folds)
