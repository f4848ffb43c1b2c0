"""Folds of cross-validation: whole groups, with an equal share of every label in each fold.

Letters: N clips, C classes, K folds.
"""

import numpy as np

from bestrq2.config import ConfigError

from .labels import TEST, LabelledClips, check_sides
from .task import ProbeTask

NEVER = -1  # the fold of clips that only train
REGRESSION_BINS = 5
ATTEMPTS = 16  # to deal the groups so that no class is in one fold alone, before there are more folds


def strata(targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Quantities to spread evenly, ``(N, C)`` float64: class membership, or fifths of a continuous target."""
    if targets.ndim == 2:
        return targets.astype(np.float64)
    if targets.dtype.kind == "f":
        edges = np.quantile(targets, np.linspace(0, 1, REGRESSION_BINS + 1)[1:-1])
        targets, num_classes = np.searchsorted(edges, targets, side="right"), REGRESSION_BINS
    return (targets[:, None] == np.arange(num_classes)).astype(np.float64)


def deal(shares: np.ndarray, groups: np.ndarray, num_folds: int, seed: int, attempt: int = 0) -> np.ndarray:
    """``(N,)`` int64 fold of every clip.

    Groups are dealt one after the other, those with the most uneven content first (ties by the seed), each to the fold
    in which the classes then deviate least from an equal share; among equals to the smallest fold.

    Args:
        shares: ``(N, C)`` from :func:`strata`.
        groups: ``(N,)`` numbers without gaps.
        attempt: above 0, the groups are dealt in a random order, another one for each number.
    """
    content = np.zeros((int(groups.max()) + 1, shares.shape[1]))
    np.add.at(content, groups, shares)
    size = np.bincount(groups).astype(np.float64)
    relative = content / np.maximum(content.sum(0), 1)
    order = np.random.default_rng([seed, attempt] if attempt else seed).permutation(len(content))
    if not attempt:
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


def deal_classes(shares: np.ndarray, groups: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Folds of :func:`deal` that leave every class of two groups or more something to train on: a class whose groups
    are all in one fold would be asked of heads that never saw it.

    Where the first deal has such a class, groups are dealt in other orders, then to more folds; with one for each group
    there is none.
    """
    clip, column = np.nonzero(shares)

    def places(of_clips: np.ndarray) -> np.ndarray:
        found = np.zeros((int(of_clips.max()) + 1, shares.shape[1]), dtype=bool)
        found[of_clips[clip], column] = True
        return found.sum(0)

    spread = places(groups) >= 2
    for number in range(num_folds, int(groups.max()) + 2):
        for attempt in range(ATTEMPTS):
            folds = deal(shares, groups, number, seed, attempt)
            if (places(folds)[spread] >= 2).all():
                return folds
    return groups.astype(np.int64)


def make_folds(clips: LabelledClips, task: ProbeTask) -> np.ndarray:
    """``(N,)`` int64: the fold in which a clip is tested, or NEVER for the training clips of a fixed split.

    There are ``task.folds``, or as many as the rarest class has groups; more where a class would be in one fold alone.

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
    possible = _possible(clips.targets, shares, clips.groups, task.folds)
    if clips.targets.dtype.kind == "f":
        return deal(shares, clips.groups, possible, task.seed)
    return deal_classes(shares, clips.groups, possible, task.seed)


def inner_folds(targets: np.ndarray, groups: np.ndarray, num_classes: int, num_folds: int = 3) -> np.ndarray | None:
    """Folds inside a training set to choose regularisation by, or None where a class has a single group."""
    groups = np.unique(groups, return_inverse=True)[1]
    shares = strata(targets, num_classes)
    possible = _possible(targets, shares[:, shares.any(0)], groups, num_folds)
    if possible < 2:
        return None
    return (deal if targets.dtype.kind == "f" else deal_classes)(shares, groups, possible, 0)


def _possible(targets: np.ndarray, shares: np.ndarray, groups: np.ndarray, wanted: int) -> int:
    if targets.dtype.kind == "f":  # a fold may lack a fifth of the numbers; of a class it must have some
        return min(wanted, int(groups.max()) + 1)
    content = np.zeros((int(groups.max()) + 1, shares.shape[1]))
    np.add.at(content, groups, shares)
    present = (content > 0).sum(0)
    return int(min([wanted, len(content), *present[present > 0]]))
