"""Folds that never split a group, heads that find what is there and nothing else, choices made in training alone."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile
from bestrq2.probing.evaluation import Rows, choose_strength, clip_rows, cross_validate, frame_rows, measure
from bestrq2.probing.folds import NEVER, deal, inner_folds, make_folds
from bestrq2.probing.heads import scores_of
from bestrq2.probing.labels import TEST, TRAIN, LabelledClips, settle
from bestrq2.probing.task import STRENGTHS, ProbeTask


def clips_of(targets, groups, classes=("a", "b", "c"), parts=None):
    groups = np.unique(groups, return_inverse=True)[1]
    files = [AudioFile(f"{i}.wav") for i in range(len(targets))]
    return LabelledClips(files, np.asarray(targets), list(classes), groups, parts)


def clusters(rng, spread=0.3, per_class=24, groups=6):
    labels = np.repeat(range(3), per_class)
    features = np.concatenate((np.eye(3)[labels], np.zeros((len(labels), 5))), 1)
    features += spread * rng.normal(size=features.shape)
    return features, clips_of(labels, [f"{label}{i % groups}" for i, label in enumerate(labels)])


def balanced(scores, targets):
    predicted = scores.argmax(1)
    return np.mean([(predicted[targets == c] == c).mean() for c in np.unique(targets)])


@pytest.mark.parametrize("head", ["linear", "ridge", "mlp", "knn"])
def test_finds_what_is_there_and_nothing_else(head):
    rng = np.random.default_rng(0)
    features, clips = clusters(rng)
    rows = clip_rows(clips, make_folds(clips, ProbeTask(folds=3)))
    scores, strengths = cross_validate(features, rows, head)
    assert balanced(scores, clips.targets) > 0.85
    assert len(strengths) == (0 if head == "knn" else 3)
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    noise, _ = cross_validate(rng.normal(size=features.shape), rows, head)
    assert 0.15 < balanced(noise, clips.targets) < 0.55


@pytest.mark.parametrize("head", ["linear", "ridge", "mlp", "knn"])
@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_other_targets(head, kind):
    """Labels that are functions of different directions, one of them XOR: only the MLP and the neighbours see that."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(240, 3))
    groups = np.arange(240) // 2
    task = ProbeTask(kind=kind, folds=3)
    if kind == "multilabel":
        clips = clips_of(np.stack((x[:, 0] > 0, x[:, 1] > 0.2, x[:, 0] * x[:, 2] > 0), 1), groups)
    else:
        clips = clips_of(x[:, 0] * 3 + 7 + 0.1 * rng.normal(size=240), groups, ())
    rows = clip_rows(clips, make_folds(clips, task))
    scores, _ = cross_validate(x, rows, head)
    outcome = measure(scores, rows, clips, [1.0] * 240, task)
    if kind == "regression":
        assert outcome.metrics["R2"].value > (0.7 if head == "knn" else 0.95)
    else:
        precisions = [row["AP"] for row in outcome.per_class]
        assert min(precisions[:2]) > (0.85 if head == "knn" else 0.93)
        assert (precisions[2] > 0.9) == (head in ("mlp", "knn"))


def test_multilabel_regression_is_logistic_regression():
    """The joint L-BFGS against scikit-learn's, label by label; labels without both values get their share."""
    from sklearn.linear_model import LogisticRegression

    from bestrq2.probing.heads import scores_of

    rng = np.random.default_rng(2)
    x, asked = rng.normal(size=(80, 6)), rng.normal(size=(20, 6))
    targets = np.stack((x[:, 0] + rng.normal(size=80) > 0, x[:, 1] > 1, np.zeros(80, bool), np.ones(80, bool)), 1)
    scores = scores_of("linear", x, targets, asked, 4, 0.2)
    for c in range(2):
        model = LogisticRegression(C=0.2, tol=1e-8, max_iter=5000).fit(x, targets[:, c])
        np.testing.assert_allclose(scores[:, c], model.predict_proba(asked)[:, 1], atol=2e-4)
    assert (scores[:, 2] == 0).all()
    assert (scores[:, 3] == 1).all()


def test_fold_that_lacks_a_class():
    """A training fold with a single class predicts it; one without some class gives that class nothing."""
    from bestrq2.probing.heads import scores_of

    x = np.random.default_rng(3).normal(size=(8, 2))
    for head in ("linear", "ridge", "mlp", "knn"):
        assert (scores_of(head, x, np.full(8, 1), x, 3, 1.0) == [0, 1, 0]).all()
        assert (scores_of(head, x, np.arange(8) % 2 * 2, x, 3, 1.0)[:, 1] < (0.5 if head == "mlp" else 1e-12)).all()


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
def test_groups_are_never_split_and_folds_are_alike(kind):
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 400)
    if kind == "classification":
        targets = groups % 3
    elif kind == "multilabel":
        targets = rng.random((400, 3)) < (0.05, 0.3, 0.7)
    else:
        targets = rng.normal(size=400)
    clips = clips_of(targets, groups)
    folds = make_folds(clips, ProbeTask(kind=kind, folds=4))
    assert set(folds) == set(range(4))
    assert all(len(set(folds[clips.groups == group])) == 1 for group in set(clips.groups))

    if kind == "multilabel":
        in_folds = np.stack([clips.targets[folds == f].sum(0) for f in range(4)])
        assert (np.abs(in_folds - in_folds.mean(0)) <= 0.35 * in_folds.mean(0) + 2).all(), in_folds
    assert np.bincount(folds).max() < 1.6 * np.bincount(folds).min()
    assert (make_folds(clips, ProbeTask(kind=kind, folds=0)) == clips.groups).all()


def test_rare_classes_limit_the_folds():
    clips = clips_of([0, 0, 0, 0, 0, 1, 1, 1], range(8), ("a", "b"))
    assert set(make_folds(clips, ProbeTask(folds=5))) == {0, 1, 2}
    for fold in range(3):
        assert set(clips.targets[make_folds(clips, ProbeTask(folds=5)) != fold]) == {0, 1}


@pytest.mark.parametrize("seed", range(6))
def test_no_class_is_in_one_fold_alone(seed):
    """All of its groups in one fold would ask for it from heads that never saw it."""
    clips = clips_of([1, 1, 0, 0, 2, 2], [0, 1, 1, 2, 2, 3])
    folds = make_folds(clips, ProbeTask(folds=2, seed=seed))
    assert all(set(clips.targets[folds != fold]) == {0, 1, 2} for fold in (0, 1))
    # Every two of three groups share a class: no two folds will do.
    clips = clips_of(np.repeat(np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]], 2, 0), np.repeat([0, 0, 1, 1, 2, 2], 2))
    assert sorted(set(make_folds(clips, ProbeTask(kind="multilabel", folds=2, seed=seed)))) == [0, 1, 2]
    assert sorted(set(inner_folds(clips.targets, clips.groups, 3, 2))) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["f", "i", "b"])
def test_neighbours_that_are_equally_near_share(kind):
    """40 copies of one clip and three that are nearer: seven of ten places for 20 of one class and 20 of another."""
    rng = np.random.default_rng(0)
    asked = np.eye(1, 30)
    near = asked + 0.01 * np.eye(30)[[1, 2, 3]]
    copy = asked + 0.02 * np.eye(1, 30, 4)
    far = rng.normal(size=(40, 30)) - 3 * asked
    train = np.concatenate((near, np.repeat(copy, 40, 0), far))
    labels = np.array([1] * 3 + [0] * 20 + [1] * 20 + [0] * 40)
    targets = {"f": labels.astype(float), "i": labels, "b": labels[:, None] == np.arange(2)}[kind]
    near_weight, copy_weight = np.exp((np.array([1.0001, 1.0004]) ** -0.5 - 1) / 0.07)
    right = (3 * near_weight + 3.5 * copy_weight) / (3 * near_weight + 7 * copy_weight)
    for order in (np.arange(83), np.arange(83)[::-1], rng.permutation(83)):
        found = scores_of("knn", train[order], targets[order], np.repeat(asked, 2, 0), 2, 1.0)
        np.testing.assert_allclose(found[:, -1], right, rtol=1e-9)


@pytest.mark.parametrize("head", ["linear", "ridge", "mlp"])
def test_strength_depends_on_no_unit(head):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 20))
    targets = x @ rng.normal(size=20) + 4 * rng.normal(size=90)
    chosen = [choose_strength(head, x, targets * 2.0**unit, np.arange(90), 0) for unit in (0, -30, 30)]
    assert chosen[0] == chosen[1] == chosen[2]


def test_few_numbers_still_make_folds():
    """A fold needs some of every class, but not a number out of every fifth."""
    clips = clips_of([0] * 5, range(5), ())
    clips.targets = np.asarray([61.0, 62.0, 64.0, 65.0, 67.0])
    folds = make_folds(clips, ProbeTask(kind="regression", folds=5))
    assert sorted(folds) == [0, 1, 2, 3, 4]
    assert sorted(inner_folds(clips.targets, clips.groups, 0)) == [0, 0, 1, 1, 2]


def test_fixed_split():
    rng = np.random.default_rng(4)
    features, clips = clusters(rng)
    clips.parts = np.where(rng.random(len(clips)) < 0.5, TRAIN, TEST)
    task = ProbeTask(split="part")
    rows = clip_rows(clips, make_folds(clips, task))
    scores, strengths = cross_validate(features, rows, "linear")
    assert np.isnan(scores[clips.parts == TRAIN]).all()
    assert np.isfinite(scores[clips.parts == TEST]).all()
    assert len(strengths) == 1
    outcome = measure(scores, rows, clips, [1.0] * len(clips), task)
    tested = clips.parts == TEST
    assert outcome.metrics["accuracy"].value == pytest.approx(
        (scores[tested].argmax(1) == clips.targets[tested]).mean()
    )
    clips.parts[:] = TRAIN
    with pytest.raises(ConfigError, match="training and test clips, got only training"):
        make_folds(clips, task)


def test_test_clips_teach_nothing():
    """Changing the test features of other clips, or all test labels, changes no score: scaling, regularisation and
    weights come from the training clips."""
    rng = np.random.default_rng(5)
    features, clips = clusters(rng, spread=1.0)
    clips.parts = np.where(np.arange(len(clips)) % 2, TEST, TRAIN)
    folds = make_folds(clips, ProbeTask(split="part"))
    tested = np.flatnonzero(folds != NEVER)
    changed = features.copy()
    changed[tested[1:]] *= 1000
    relabelled = clips_of(np.where(folds == NEVER, clips.targets, 0), clips.groups, parts=clips.parts)
    for head in ("linear", "ridge", "mlp", "knn"):
        plain, strengths = cross_validate(features, clip_rows(clips, folds), head)
        other, same = cross_validate(changed, clip_rows(relabelled, folds), head)
        np.testing.assert_allclose(other[tested[0]], plain[tested[0]], rtol=1e-6)
        assert strengths == same


def test_group_identity_cannot_be_used():
    """Each group has its own direction and one label: split by clip this is perfect, split by group it is chance."""
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(12), 10)
    features = np.eye(12)[group] * 3 + 0.1 * rng.normal(size=(120, 12))
    for groups, low, high in ((np.arange(120), 0.98, 1.01), (group, -1, 0.75)):
        clips = clips_of(group % 2, groups, ("x", "y"))
        scores, _ = cross_validate(features, clip_rows(clips, make_folds(clips, ProbeTask())), "linear", 1.0)
        assert low < balanced(scores, clips.targets) < high


def test_choice_of_regularisation():
    rng = np.random.default_rng(5)
    labels, groups = np.arange(60) % 2, np.arange(60) // 2
    clean = np.stack((labels * 2.0 - 1, np.zeros(60)), 1) + 0.01 * rng.normal(size=(60, 2))
    strengths = STRENGTHS["linear"]
    assert choose_strength("linear", clean, labels, groups, 2) == strengths[0]  # all are perfect: the strongest
    assert choose_strength("linear", clean, labels, labels, 2) == strengths[2]  # one group a class: no choice
    # A weak direction between unequal classes: only where its weight may grow does it win over the majority.
    rare = (np.arange(60) % 4 == 0).astype(int)
    weak = np.concatenate((0.5 * (rare[:, None] * 2.0 - 1), rng.normal(size=(60, 8))), 1)
    assert choose_strength("linear", weak, rare, np.arange(60), 2) > strengths[0]
    assert inner_folds(labels, labels, 2) is None


def test_neighbours_vote_as_written():
    rng = np.random.default_rng(2)
    features, clips = clusters(rng, spread=1.0)
    folds = make_folds(clips, ProbeTask(folds=3))
    scores, _ = cross_validate(features, clip_rows(clips, folds), "knn")
    for i in range(len(features)):
        train = np.flatnonzero(folds != folds[i])
        x = (features - features[train].mean(0)) / features[train].std(0)
        similar = [float(x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])) for j in train]
        votes = np.zeros(3)
        for place in np.argsort(similar)[::-1][:10]:
            votes[clips.targets[train[place]]] += np.exp(similar[place] / 0.07)
        np.testing.assert_allclose(scores[i], votes / votes.sum(), rtol=1e-6)


def test_frames_follow_their_clip():
    clips = clips_of(np.ones((4, 1), bool), range(4), ("dog",))
    clips.events = [np.array([[0.2, 0.6, 0.0]])] * 4
    rows = frame_rows(clips, np.array([0, 1, 0, 1]), [3, 2, 4, 1], 0.2)
    assert rows.clip.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    assert rows.folds.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 1]
    assert rows.targets[:, 0].tolist() == [False, True, True, False, True, False, True, True, False, False]


def test_same_seed_same_scores():
    features, clips = clusters(np.random.default_rng(6))
    folds = make_folds(clips, ProbeTask())
    rows = Rows(clips.targets, clips.groups, folds, clips.classes, np.arange(len(clips)))
    first, second, other = (cross_validate(features, rows, "mlp", 1.0, seed)[0] for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("targets", "groups", "message"),
    [
        ([0, 0], [1, 2], r"two different labels that can be tested, got \['a'\]$"),
        ([0, 0, 1, 1], [1, 2, 3, 3], "'b' do not occur in two groups.*--drop-rare"),
        (range(13), range(13), "^labels 'a', .*, 'j' and 3 more do not occur"),  # numbers taken for labels
    ],
)
def test_impossible_tasks(targets, groups, message):
    with pytest.raises(ConfigError, match=message):
        settle(clips_of(targets, groups, "abcdefghijklm"[: max(targets) + 1]), ProbeTask())


def test_rare_classes_are_dropped_when_asked():
    clips = clips_of([0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 4])
    kept, numbers = settle(clips, ProbeTask(drop_rare=True))
    assert numbers.tolist() == [0, 1, 2, 3]
    assert kept.classes == ["a", "b"]
    assert kept.left_out == {"of classes that are too rare": 2}
    several = clips_of(np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], bool), [0, 1, 2, 2])
    kept, numbers = settle(several, ProbeTask(kind="multilabel"))  # b is in one group alone
    assert kept.classes == ["a", "c"]
    assert kept.targets.tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert "b" in kept.warnings[0]


def test_classes_of_a_fixed_split():
    """One that only test has cannot be predicted; one that only training has can be predicted wrongly."""
    parts = np.array([TRAIN, TRAIN, TEST, TEST, TEST])
    with pytest.raises(ConfigError, match="labels 'c' do not occur in training"):
        settle(clips_of([0, 1, 0, 0, 2], range(5), parts=parts), ProbeTask(split="part"))
    kept, _ = settle(clips_of([0, 1, 0, 0, 0], range(5), "ab", parts), ProbeTask(split="part"))
    rows = clip_rows(kept, make_folds(kept, ProbeTask(split="part")))
    x = np.array([[0.0], [1], [0.1], [0.9], [0.2]])
    scores, _ = cross_validate(x, rows, "linear", 100.0)
    outcome = measure(scores, rows, kept, [1.0] * 5, ProbeTask())
    assert outcome.metrics["balanced_accuracy"].value == pytest.approx(2 / 3)
    assert outcome.metrics["mAP"].value == 1.0  # of the class that is there


def test_events_of_one_class():
    rng = np.random.default_rng(7)
    clips = clips_of(np.ones((12, 1), bool), range(12), ("speech",))
    clips.events = [np.array([[0.1 * rng.integers(0, 5), 0.8, 0.0]]) for _ in range(12)]
    task = ProbeTask(kind="events", events="events.csv", folds=3, segment_seconds=0.4)
    rows = frame_rows(clips, make_folds(clips, task), [25] * 12, 0.04)
    for head in ("linear", "ridge", "mlp", "knn"):
        signal = rows.targets[:, :1] + 0.3 * rng.normal(size=(300, 3))
        scores, _ = cross_validate(signal.astype(np.float32), rows, head)
        outcome = measure(scores, rows, clips, [1.0] * 12, task)
        assert outcome.metrics["frame_mAP"].value > 0.9
        assert 0.6 < outcome.metrics["segment_micro_F1"].value <= 1
        assert np.isfinite(outcome.metrics["segment_macro_F1"].low)


def test_one_group_is_not_enough():
    with pytest.raises(ConfigError, match="at least two groups"):
        make_folds(clips_of(np.linspace(0, 1, 4), [0, 0, 0, 0], ()), ProbeTask(kind="regression"))
    assert deal(np.ones((4, 1)), np.arange(4), 2, 0).tolist().count(0) == 2


def test_more_columns_than_clips():
    """With more columns than clips the linear head is fitted in the space of the clips: the same probabilities."""
    from sklearn.linear_model import LogisticRegression

    from bestrq2.probing.heads import scores_of

    generator = np.random.default_rng(0)
    x, asked = generator.normal(size=(40, 300)), generator.normal(size=(9, 300))
    targets = np.arange(40) % 3
    expected = LogisticRegression(C=0.02, max_iter=5000, tol=1e-10).fit(x, targets).predict_proba(asked)
    np.testing.assert_allclose(scores_of("linear", x, targets, asked, 3, 0.02), expected, atol=1e-3)


@pytest.mark.parametrize("width", [12, 90])
def test_ridge_is_least_squares_with_a_penalty(width):
    """Against scikit-learn, with fewer and more columns than clips; one strength means the same for any scale."""
    from sklearn.linear_model import Ridge

    from bestrq2.probing.heads import ridge_scores

    generator = np.random.default_rng(0)
    x, asked = 3 + generator.normal(size=(40, width)), generator.normal(size=(9, width))
    targets = np.arange(40) ** 2 % 3  # 14 zeros, 26 ones; 2 and 3 have no row
    weights = np.where(targets == 0, 20 / 14, 20 / 26)
    centred = x - np.average(x, 0, weights)
    size = (weights[:, None] * centred**2).sum() / 40
    found = ridge_scores(x, targets, asked, 4, (2.0, 50.0))
    for strength, scores in zip((2.0, 50.0), found):
        model = Ridge(alpha=size / strength).fit(x, np.eye(2)[targets], sample_weight=weights)
        expected = model.predict(asked)
        expected -= np.minimum(expected.min(1, keepdims=True), 0)
        np.testing.assert_allclose(scores[:, :2], expected / expected.sum(1, keepdims=True), atol=1e-9)
        assert not scores[:, 2:].any()
    np.testing.assert_allclose(ridge_scores(7 * x, targets, 7 * asked, 4, (50.0,))[0], found[1], atol=1e-9)
    numbers = generator.normal(size=40)
    model = Ridge(alpha=((x - x.mean(0)) ** 2).sum() / 40 / 50).fit(x, numbers)
    np.testing.assert_allclose(ridge_scores(x, numbers, asked, 0, (50.0,))[0][:, 0], model.predict(asked), atol=1e-9)
