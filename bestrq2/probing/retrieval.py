"""Retrieval by cosine, without training: does the nearest clip share the label?

With a fixed split, test clips query the training clips (the gallery). Without, every clip queries all others, except
those of its own group where groups are given: the same phrase from another voice, not the same recording again.
Cosines are those of features centred and scaled, without labels: by the mean and deviation of gallery and queries
together, by those of each side alone (which takes out what differs between two collections, and needs many queries),
or not at all. (By the gallery alone, bands that are silent there would outweigh all others.)
"""

import numpy as np

from bestrq2.config import ConfigError

from .heads import standardise
from .labels import TEST, TRAIN, LabelledClips
from .metrics import Values, by_group

COLUMNS = ("query", "R@1", "R@5", "mAP", "chance")
_BLOCK = 512


def rank(
    features: np.ndarray, clips: LabelledClips, exclude_group: bool, scaling: str = "all"
) -> dict[str, np.ndarray]:
    """Of every query: whether a match is the nearest ("R@1"), among the five nearest ("R@5"), the average precision of
    the whole ranking ("mAP"), and the mean of what a random ranking gives for the first ("chance").

    Equal similarities count as the worse order.

    Args:
        features: ``(N, D)``.
        clips: with what matches, and which clips query.
        exclude_group: without a split, keep the query's own group out of its gallery.
        scaling: "all", "sides" or "none".

    Returns:
        these, ``(Q,)`` each, and "query", the numbers of the clips ``(Q,)``; queries without a match are not there.

    Raises:
        ConfigError: if no query has a match.
    """
    if clips.parts is None:
        queries = gallery = np.arange(len(clips))
    else:
        queries, gallery = np.flatnonzero(clips.parts == TEST), np.flatnonzero(clips.parts == TRAIN)
    known, asked = features[gallery], features[queries]
    if scaling != "none":
        both = features[np.union1d(queries, gallery)]
        known, asked = (standardise(side if scaling == "sides" else both, side)[1] for side in (known, asked))
    known, asked = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (known, asked))
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for start in range(0, len(queries), _BLOCK):
        cosine = asked[start : start + _BLOCK] @ known.T
        for query, similarity in zip(queries[start : start + _BLOCK], cosine):
            allowed = gallery != query
            if exclude_group and clips.parts is None:
                allowed &= clips.groups[gallery] != clips.groups[query]
            match = clips.targets[gallery[allowed]] == clips.targets[query]
            if not match.any():
                continue
            order = np.lexsort((match, -similarity[allowed]))  # a match comes last among equals
            ranks = np.flatnonzero(match[order]) + 1
            found["query"].append(query)
            found["R@1"].append(ranks[0] == 1)
            found["R@5"].append(ranks[0] <= 5)
            found["mAP"].append(float(np.mean(np.arange(1, len(ranks) + 1) / ranks)))
            found["chance"].append(float(match.mean()))
    if not found["query"]:
        raise ConfigError(f"none of the {len(queries)} queries has a match among {len(gallery)} clips of the gallery")
    return {
        name: np.asarray(values, dtype=np.int64 if name == "query" else np.float64) for name, values in found.items()
    }


def retrieval_values(ranked: dict[str, np.ndarray], groups: np.ndarray, weights: np.ndarray) -> Values:
    """Means over the queries; ``groups (Q,)`` are theirs."""
    names = ("R@1", "R@5", "mAP")
    sums = weights @ by_group(groups, np.stack([*(ranked[name] for name in names), np.ones(len(groups))], 1))
    return {name: sums[:, i] / np.maximum(sums[:, -1], 1e-12) for i, name in enumerate(names)}
