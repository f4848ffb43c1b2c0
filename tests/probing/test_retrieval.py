"""Rankings against a loop, and what may be in a gallery."""

import numpy as np
import pytest

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile
from bestrq2.probing.labels import TEST, TRAIN, LabelledClips
from bestrq2.probing.retrieval import rank, retrieval_values


def clips_of(targets, groups, parts=None):
    files = [AudioFile(f"{i}.wav") for i in range(len(targets))]
    return LabelledClips(files, np.asarray(targets), list("abcdefgh"), np.asarray(groups), parts)


@pytest.mark.parametrize("scaling", ["all", "sides", "none"])
@pytest.mark.parametrize("form", ["split", "alone", "group"])
def test_against_a_loop(form, scaling):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5))
    targets, groups = rng.integers(0, 8, 40), rng.integers(0, 6, 40)
    parts = rng.integers(0, 2, 40) if form == "split" else None
    ranked = rank(features, clips_of(targets, groups, parts), form == "group", scaling)
    gallery = range(40) if parts is None else np.flatnonzero(parts == TRAIN)
    queries = range(40) if parts is None else np.flatnonzero(parts == TEST)
    x = features.copy()
    sides = [list(gallery), list(queries)] if scaling == "sides" and form == "split" else [range(40)]
    for side in sides if scaling != "none" else []:
        x[side] = (features[side] - features[side].mean(0)) / features[side].std(0)
    place = 0
    for query in queries:
        others = [g for g in gallery if g != query and not (form == "group" and groups[g] == groups[query])]
        others.sort(key=lambda g, q=query: -x[q] @ x[g] / np.linalg.norm(x[q]) / np.linalg.norm(x[g]))
        hits = [targets[g] == targets[query] for g in others]
        if not any(hits):
            continue
        precision = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        assert ranked["query"][place] == query
        assert ranked["R@1"][place] == hits[0]
        assert ranked["R@5"][place] == any(hits[:5])
        assert ranked["mAP"][place] == pytest.approx(np.mean(precision))
        assert ranked["chance"][place] == pytest.approx(np.mean(hits))
        place += 1
    assert place == len(ranked["query"])
    values = retrieval_values(ranked, np.arange(place), np.ones((1, place)))
    assert values["R@1"][0] == pytest.approx(ranked["R@1"].mean())


def test_equal_features_are_no_hits():
    """An encoder that gives the same vector for every clip retrieves nothing, whatever the order of the gallery."""
    clips = clips_of([0, 1, 0, 1], range(4), np.array([TRAIN, TRAIN, TEST, TEST]))
    ranked = rank(np.ones((4, 3)), clips, False)
    assert ranked["R@1"].tolist() == [0, 0]
    assert ranked["mAP"].tolist() == [0.5, 0.5]


def test_sides_take_out_what_differs_between_collections():
    rng = np.random.default_rng(1)
    content = rng.normal(size=(30, 4))
    features = np.concatenate((content, 3 * content + 50)) + 0.01 * rng.normal(size=(60, 4))
    clips = clips_of(np.tile(np.arange(30), 2), range(60), np.repeat([TRAIN, TEST], 30))
    assert rank(features, clips, False, "sides")["R@1"].mean() > 0.9
    assert rank(features, clips, False, "all")["R@1"].mean() < 0.9


def test_no_match():
    with pytest.raises(ConfigError, match="none of the 3 queries has a match among 3 clips"):
        rank(np.eye(3), clips_of([0, 1, 2], range(3)), False)
