"""Folds of cross-validation: whole groups, with an equal share of every label in each fold.

Letters: N clips, C classes, K folds.
"""

import numpy as np

from bestrq2.config import ConfigError

from .labels import TEST, LabelledClips, check_sides
from .task import ProbeTask

NEVER = -1  # the fold of clips that only train
REGRESSION_BINS = 5


def strata(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Quantities to spread evenly, ``(N, C)`` float64: class membership, or fifths of a continuous target."""
    if targets.ndim == 2:
        return targets.astype(np.float64)
    if targets.dtype.kind == "f":
        edges = np.quantile(targets, np.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
        targets, num_classes = np.searchsorted(edges, targets, side="right"), REGRESSION_BINS
    return (targets[:, None] == np.arange(num_classes)).astype(np.float64)


def deal(shares: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """``(N,)`` int64 fold of every clip.

    Groups are dealt one after the other, those with the most uneven content first (ties by the seed), each to the fold
    in which the classes then deviate least from an equal share; among equals to the smallest fold.

    Args:
        shares: ``(N, C)`` from :func:`strata`.
        groups: ``(N,)`` numbers without gaps.
    """
    content = np.zeros((int(groups.max()) + 1, shares.shape[1]))
    np.add.at(content, groups, shares)
    size = np.bincount(groups).astype(np.float64)
    relative = content / np.maximum(content.sum(0), 1)
    order = np.random.default_rng(seed).permutation(len(content))
    order = order[np.argsort(-relative[order].std(1), kind="stable")]
    filled, sizes = np.zeros((num_folds, shares.shape[1])), np.zeros(num_folds)
    fold_of = np.zeros(len(content), dtype=np.int64)
    for group in order:
        # Adding x to a fold with f changes the sum of squares by 2 f x + x^2; x^2 is the same for every fold.
        cost = filled @ relative[group]
        best = np.flatnonzero(cost <= cost.min() + 1e-12)
        fold = int(best[np.argmin(sizes[best])])
        fold_of[group] = fold
        filled[fold] += relative[group]
        sizes[fold] += size[group]
    return fold_of[groups]


def make_folds(clips: LabelledClips, task: ProbeTask) -> np.ndarray:
    """``(N,)`` int64: the fold in which a clip is tested, or NEVER for the training clips of a fixed split.

    There are at most ``task.folds``, and no more than the groups of the rarest class.

    Raises:
        ConfigError: if there are fewer than two groups, or one side of a fixed split is empty.
    """
    if clips.parts is not None:
        check_sides(clips, task)
        return np.where(clips.parts == TEST, 0, NEVER).astype(np.int64)
    num_groups = int(clips.groups.max()) + 1
    if num_groups < 2:
        raise ConfigError("expected at least two groups, one to train on and one to test, got 1")
    if not task.folds:
        return clips.groups.copy()
    shares = strata(clips.targets, len(clips.classes))
    return deal(shares, clips.groups, _possible(clips.targets, shares, clips.groups, task.folds), task.seed)


def inner_folds(targets: np.ndarray, groups: np.ndarray, num_classes: int, num_folds: int = 3) -> np.ndarray | None:
    """Folds inside a training set to choose regularisation by, or None where a class has a single group."""
    groups = np.unique(groups, return_inverse=True)[1]
    shares = strata(targets, num_classes)
    possible = _possible(targets, shares[:, shares.any(0)], groups, num_folds)
    return deal(shares, groups, possible, 0) if possible >= 2 else None


def _possible(targets: np.ndarray, shares: np.ndarray, groups: np.ndarray, wanted: int) -> int:
    if targets.dtype.kind == "f":  # a fold may lack a fifth of the numbers; of a class it must have some
        return min(wanted, int(groups.max()) + 1)
    content = np.zeros((int(groups.max()) + 1, shares.shape[1]))
    np.add.at(content, groups, shares)
    present = (content > 0).sum(0)
    return int(min([wanted, len(content), *present[present > 0]]))
