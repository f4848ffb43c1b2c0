"""Masks: counts, padding, independence of batch composition, and the published shared form."""

import itertools
import warnings

import pytest
import torch

from bestrq2.hashing import mix, uniform
from bestrq2.layers.counter_random import random_keys
from bestrq2.layers.masking import RandomMasking
from bestrq2.layers.thinning import num_kept


def chosen(plan, clip):
    seen = plan.seen[clip, : plan.seen_lengths[clip]].tolist()
    predicted = plan.predicted[clip, : plan.predicted_lengths[clip]].tolist()
    return seen, predicted


@pytest.mark.parametrize("lengths", [[128] * 6, [128, 40, 7, 2, 1, 128]], ids=["equal", "ragged"])
def test_partitions_the_valid_tokens(lengths):
    plan = RandomMasking((0.4, 0.6), seed=3).plan(torch.tensor(lengths), 11, torch.arange(6), "cpu")
    for clip, length in enumerate(lengths):
        seen, predicted = chosen(plan, clip)
        assert sorted(seen + predicted) == list(range(length))
        assert seen == sorted(seen)
        assert predicted == sorted(predicted)
        assert len(seen) >= 1
        if length > 1:
            assert len(predicted) >= 1
        if length == 128:
            assert 51 <= len(predicted) <= 76  # floor(128 r) for r in U(0.4, 0.6), the published range
    assert int(plan.seen.max()) < 128
    assert plan.realised_ratio == pytest.approx(plan.predicted_lengths.sum() / sum(lengths))


def test_equal_clips_share_the_count_but_not_the_mask():
    plan = RandomMasking((0.4, 0.6)).plan(torch.full((64,), 100), 0, torch.arange(64), "cpu")
    assert plan.predicted_lengths.unique().numel() == 1
    assert plan.predicted_valid() is None
    assert len({tuple(row) for row in plan.predicted.tolist()}) == 64


def test_half_of_a_small_grid():
    plan = RandomMasking((0.5, 0.5)).plan(torch.tensor([6]), 0, torch.tensor([0]), "cpu")
    assert plan.predicted.shape == (1, 3)


def test_mask_of_a_clip_depends_on_its_index_alone():
    masking = RandomMasking((0.3, 0.7), seed=5)
    lengths = torch.tensor([50, 80, 80, 20])
    whole = masking.plan(lengths, 7, torch.tensor([100, 101, 102, 103]), "cpu")
    part = masking.plan(lengths[2:], 7, torch.tensor([102, 103]), "cpu")  # what a second rank would draw
    for clip in (0, 1):
        assert chosen(whole, clip + 2) == chosen(part, clip)
    other = masking.plan(lengths[2:], 7, torch.tensor([104, 105]), "cpu")
    assert chosen(other, 0) != chosen(part, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_counts_do_not_follow_the_default_dtype(dtype):
    masking, lengths = RandomMasking((0.47, 0.47)), torch.tensor([70001, 5001, 1250])
    counts = masking.num_predicted(lengths, 0)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(masking.num_predicted(lengths, 0), counts)
        assert num_kept(counts, 0.3).tolist() == [9870, 705, 176]
        assert num_kept(torch.tensor([100, 1000]), 0.29).tolist() == [29, 290]  # 0.29 x 100 is 28.999999999999996
    finally:
        torch.set_default_dtype(before)
    assert counts.tolist() == [32900, 2350, 587]


def test_counts_are_those_of_the_written_share():
    counts = torch.arange(2, 3001)
    for percent in range(1, 100):
        exact = (counts * percent // 100).clamp(min=1).minimum(counts - 1)
        share = percent / 100
        assert torch.equal(RandomMasking((share, share)).num_predicted(counts, 0), exact)


def test_a_batch_without_anything_to_predict_is_told():
    masking, index = RandomMasking((0.4, 0.6)), torch.arange(2)
    with pytest.warns(UserWarning, match="every clip of this batch is a single patch"):
        plan = masking.plan(torch.tensor([1, 1]), 0, index, "cpu")
    assert plan.predicted_lengths.tolist() == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masking.plan(torch.tensor([1, 2]), 0, index, "cpu")


def test_steps_and_seeds_differ():
    lengths, index = torch.tensor([200]), torch.tensor([0])
    masks = {
        (seed, step): tuple(RandomMasking((0.5, 0.5), seed).plan(lengths, step, index, "cpu").predicted[0].tolist())
        for seed in range(3)
        for step in range(3)
    }
    assert len(set(masks.values())) == 9


def test_shared_per_batch_is_the_published_form():
    masking = RandomMasking((0.4, 0.6), shared_per_batch=True)
    plan = masking.plan(torch.full((5,), 128), 0, torch.arange(5), "cpu")
    assert (plan.seen == plan.seen[0]).all()
    assert (plan.predicted == plan.predicted[0]).all()
    with pytest.raises(ValueError, match="equal length"):
        masking.plan(torch.tensor([128, 64]), 0, torch.arange(2), "cpu")


def test_every_token_is_masked_equally_often():
    masking = RandomMasking((0.5, 0.5))
    counts = torch.zeros(40)
    for step in range(20):
        plan = masking.plan(torch.full((200,), 40), step, torch.arange(200) + 200 * step, "cpu")
        counts += torch.bincount(plan.predicted.flatten(), minlength=40)
    share = counts / 4000
    assert (share - 0.5).abs().max() < 4.5 * (0.25 / 4000) ** 0.5


def test_keys_equal_their_integer_definition():
    keys = random_keys(9, torch.tensor([4, -1, 2**62]), 5)
    for row, index in enumerate((4, -1, 2**62)):
        assert keys[row].tolist() == [mix(9, index, column) >> 2 for column in range(5)]
    assert len({uniform(1, step) for step in range(100)}) == 100


@pytest.mark.parametrize("ratio", [(0, 0.5), (0.5, 1), (0.6, 0.4)])
def test_rejects_bad_ratio(ratio):
    with pytest.raises(ValueError, match="ratio"):
        RandomMasking(ratio)


def runs(tokens):
    """Lengths of the stretches of consecutive numbers."""
    lengths = [1]
    for before, after in itertools.pairwise(tokens):
        if after == before + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


@pytest.mark.parametrize("span", [2, 5])
def test_spans_have_the_exact_count_and_stay_together(span):
    lengths = torch.tensor([100, 61, 30, 1])
    inner = []
    for step in range(20):
        plan = RandomMasking((0.4, 0.4), seed=2, span_length=span).plan(lengths, step, torch.arange(4), "cpu")
        assert plan.predicted_lengths.tolist() == [40, 24, 12, 0]
        for row, count in enumerate(plan.predicted_lengths.tolist()):
            chosen = plan.predicted[row, :count].tolist()
            seen = plan.seen[row, : plan.seen_lengths[row]].tolist()
            assert sorted(chosen + seen) == list(range(int(lengths[row])))
            if count:
                # Only spans over an edge and the one that is cut to reach the count can be short.
                stretches = [n for n, at_edge in zip(runs(chosen), edges(chosen, int(lengths[row]))) if not at_edge]
                assert sum(n < span for n in stretches) <= 1
                inner += stretches
    assert sum(inner) / len(inner) > span


def edges(chosen, length):
    """For every stretch, whether it touches the clip's first or last token."""
    starts = [token for token in chosen if token - 1 not in chosen]
    ends = [token for token in chosen if token + 1 not in chosen]
    return [start == 0 or end == length - 1 for start, end in zip(starts, ends)]


def test_spans_mask_every_place_equally_often():
    counts = torch.zeros(40)
    for step in range(400):
        plan = RandomMasking((0.5, 0.5), seed=1, span_length=4).plan(torch.full((8,), 40), step, torch.arange(8), "cpu")
        counts += torch.bincount(plan.predicted.flatten(), minlength=40)
    share = counts / 3200
    assert (share - 0.5).abs().max() < 0.06


def test_spans_do_not_depend_on_the_batch():
    masking = RandomMasking((0.3, 0.6), seed=1, span_length=3)
    batch = masking.plan(torch.tensor([50, 20]), 5, torch.tensor([8, 9]), "cpu")
    alone = masking.plan(torch.tensor([20]), 5, torch.tensor([9]), "cpu")
    assert batch.predicted[1, : batch.predicted_lengths[1]].tolist() == alone.predicted[0].tolist()


def test_span_length_is_checked():
    with pytest.raises(ValueError, match="span_length must be at least 1"):
        RandomMasking(span_length=0)


def test_no_clips():
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one clip"):
        RandomMasking().plan(none, 0, none, "cpu")


@pytest.mark.parametrize(
    "options",
    [{}, {"shared_per_batch": True}, {"span_length": 4}, {"block_columns": 2, "kept": True}, {"dispersion": 1}],
)
@pytest.mark.parametrize("lengths", [[0], [8, 0, 4], [1, 0], [-3, 4]])
def test_clips_without_tokens(options, lengths):
    """Plans had lengths of -1, or an index was out of bounds."""
    masking, count = RandomMasking(**options), len(lengths)
    with pytest.raises(ValueError, match=rf"at least one token in every clip, got lengths \{lengths}"):
        masking.plan(torch.tensor(lengths), 0, torch.arange(count), "cpu", weights=torch.ones(count, 8))
    assert masking.num_predicted(torch.tensor([0, 1, 2]), 0).tolist() == [0, 0, 1]


@pytest.mark.parametrize("ratio", [0.5, (0.5,), [0.4, 0.5, 0.6], (0.6, 0.4)])
def test_a_ratio_that_is_no_range_is_refused(ratio):
    with pytest.raises(ValueError, match="expected a mask ratio range"):
        RandomMasking(ratio)
