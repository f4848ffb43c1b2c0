"""Block masks, kept blocks, odds that grow with dispersion, and how many masked tokens touch a visible one."""

import pytest
import torch

from bestrq2.layers.masking import MaskPlan, RandomMasking, touching_share
from bestrq2.layers.patches import Patches


def grid(plan, clip, rows, columns, which="predicted"):
    """``(columns, rows)`` bool of the predicted or seen tokens of a clip."""
    tokens = getattr(plan, which)[clip, : int(getattr(plan, f"{which}_lengths")[clip])]
    marked = torch.zeros(columns * rows, dtype=torch.bool)
    marked[tokens] = True
    return marked.view(columns, rows)


def isolated(marked):
    """Marked cells that touch no other marked one."""
    padded = torch.nn.functional.pad(marked, (1, 1, 1, 1))
    beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return int((marked & ~beside).sum())


def test_masks_of_earlier_versions_stay():
    lengths, index = torch.tensor([24, 16]), torch.tensor([7, 8])
    plan = RandomMasking((0.4, 0.6), seed=3).plan(lengths, 5, index, "cpu", rows=4)
    assert plan.predicted[0].tolist() == [0, 1, 3, 9, 10, 12, 15, 17, 18, 19, 23]
    plan = RandomMasking((0.5, 0.5), seed=3, span_length=3).plan(lengths, 5, index, "cpu", rows=4)
    assert plan.predicted[0].tolist() == [1, 2, 3, 8, 9, 10, 11, 12, 17, 18, 19, 23]


@pytest.mark.parametrize("kept", [False, True], ids=["masked", "kept"])
@pytest.mark.parametrize("block", [(1, 5), (2, 2), (4, 5), (None, 3)], ids=str)
def test_blocks_have_the_exact_count_and_depend_on_the_clip_alone(block, kept):
    masking = RandomMasking((0.7, 0.7), 1, block_rows=block[0], block_columns=block[1], kept=kept)
    lengths, index = torch.tensor([160, 80, 160, 4]), torch.tensor([4, 9, 5, 6])
    plan = masking.plan(lengths, 3, index, "cpu", rows=4)
    assert plan.predicted_lengths.tolist() == [112, 56, 112, 2]
    alone = masking.plan(lengths[1:2], 3, index[1:2], "cpu", rows=4)
    assert torch.equal(grid(plan, 1, 4, 20), grid(alone, 0, 4, 20))
    for clip, length in enumerate(lengths.tolist()):
        both = grid(plan, clip, 4, length // 4) ^ grid(plan, clip, 4, length // 4, "seen")
        assert bool(both.all())
    other = masking.plan(lengths, 4, index, "cpu", rows=4)
    assert not torch.equal(grid(plan, 0, 4, 40), grid(other, 0, 4, 40))


def test_what_is_drawn_as_blocks_stays_together():
    lengths, index = torch.full((20,), 320), torch.arange(20)
    for kept, which in ((False, "predicted"), (True, "seen")):
        ratio = 0.8 if kept else 0.2
        blocks = RandomMasking((ratio, ratio), block_rows=3, block_columns=3, kept=kept)
        single = RandomMasking((ratio, ratio), kept=kept)
        alone = [
            sum(isolated(grid(m.plan(lengths, 0, index, "cpu", rows=8), clip, 8, 40, which)) for clip in range(20))
            for m in (blocks, single)
        ]
        assert alone[0] < 0.1 * alone[1]


def test_a_time_span_covers_all_rows():
    plan = RandomMasking((0.5, 0.5), block_rows=None, block_columns=4).plan(
        torch.full((3,), 320), 0, torch.arange(3), "cpu", rows=8
    )
    for clip in range(3):
        columns = grid(plan, clip, 8, 40).sum(1)
        assert set(columns.tolist()) == {0, 8}


def test_blocks_mask_every_cell_equally_often():
    masking = RandomMasking((0.5, 0.5), 1, block_rows=2, block_columns=3)
    counts = torch.zeros(80)
    for step in range(200):
        plan = masking.plan(torch.full((16,), 80), step, torch.arange(16), "cpu", rows=4)
        counts += torch.bincount(plan.predicted.flatten(), minlength=80)
    assert (counts / 3200 - 0.5).abs().max() < 0.06


@pytest.mark.parametrize("kept", [False, True], ids=["masked", "kept"])
@pytest.mark.parametrize("block", [1, 2])
def test_odds_grow_with_dispersion(kept, block):
    weights = torch.ones(64, 40)
    weights[:, 20:] = 4.0
    masking = RandomMasking((0.3, 0.3), block_columns=block, kept=kept, dispersion=1.0)
    plan = masking.plan(torch.full((64,), 40), 0, torch.arange(64), "cpu", weights=weights)
    assert plan.predicted_lengths.tolist() == [12] * 64
    lively = float((plan.predicted >= 20).float().mean())
    assert 0.62 < lively < 0.9  # half without weights


def test_single_draws_follow_the_weights():
    weights = torch.tensor([[1.0, 2.0, 5.0]]).expand(6000, -1)
    masking = RandomMasking((0.4, 0.4), dispersion=2.0)
    plan = masking.plan(torch.full((6000,), 3), 0, torch.arange(6000), "cpu", weights=weights)
    share = torch.bincount(plan.predicted.flatten(), minlength=3) / 6000
    torch.testing.assert_close(share, torch.tensor([1 / 30, 4 / 30, 25 / 30]), atol=0.02, rtol=0)


def test_weights_of_padding_and_of_other_clips_do_not_matter():
    torch.manual_seed(0)
    masking = RandomMasking((0.4, 0.4), block_columns=3, block_rows=2, dispersion=1.0)
    weights, lengths, index = torch.rand(3, 40), torch.tensor([40, 24, 40]), torch.arange(3)
    plan = masking.plan(lengths, 0, index, "cpu", rows=4, weights=weights)
    weights[1, 24:] = 1e6
    again = masking.plan(lengths[1:2], 0, index[1:2], "cpu", rows=4, weights=weights[1:2])
    assert torch.equal(plan.predicted[1, : int(plan.predicted_lengths[1])], again.predicted[0])


def test_silent_patches_can_be_masked():
    masking = RandomMasking((0.5, 0.5), dispersion=1.0)
    plan = masking.plan(torch.tensor([10]), 0, torch.tensor([0]), "cpu", weights=torch.zeros(1, 10))
    assert plan.predicted_lengths.tolist() == [5]


def test_dispersion_is_the_mean_absolute_deviation():
    values = torch.tensor([[[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]]])
    assert Patches(values, torch.tensor([2]), 1).dispersion().tolist() == [[2.0, 0.0]]


def plan_of(rows, columns, predicted, padding=0):
    tokens = torch.arange(rows * columns)
    masked = torch.zeros(rows * columns, dtype=torch.bool)
    masked[predicted] = True
    seen, hidden = tokens[~masked][None], tokens[masked][None]
    filler = torch.full((1, padding), rows * columns - 1)
    lengths = torch.tensor([seen.shape[1]]), torch.tensor([hidden.shape[1]])
    return MaskPlan(torch.cat((seen, filler), 1), torch.cat((hidden, filler), 1), *lengths)


def test_touching_share_counts_neighbours_in_time_and_frequency():
    # A strip of 8 with the span 2..6 masked: only its two ends touch a visible token. Fillers change nothing.
    for padding in (0, 3):
        assert float(touching_share(plan_of(1, 8, [2, 3, 4, 5, 6], padding), 8, 1)) == pytest.approx(2 / 5)
    # Two rows, columns 0..2, token = 2 column + row. All of column 0 and 1 masked: those of column 1 touch column 2.
    assert float(touching_share(plan_of(2, 3, [0, 1, 2, 3]), 6, 2)) == 0.5
    # Token 1 is the last row of column 0, token 2 the first row of column 1: no neighbours.
    assert float(touching_share(plan_of(2, 2, [1, 2, 3]), 4, 2)) == pytest.approx(2 / 3)
    # The end of the clip is not a visible neighbour, whatever the fillers name.
    assert float(touching_share(plan_of(1, 6, [3, 4, 5], 2), 6, 1)) == pytest.approx(1 / 3)


def test_longer_spans_touch_less():
    shares = []
    for span in (1, 4, 16):
        plan = RandomMasking((0.6, 0.6), span_length=span).plan(torch.full((32,), 200), 0, torch.arange(32), "cpu")
        shares.append(float(touching_share(plan, 200, 1)))
    assert shares[0] > 0.6 > shares[1] > shares[2]
    assert shares[2] < 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_columns": 0}, "block_rows and block_columns must be at least 1"),
        ({"span_length": 2, "block_rows": 2}, "spans or blocks"),
        ({"dispersion": -1.0}, "dispersion must be"),
        ({"dispersion": 1.0, "shared_per_batch": True}, "shared_per_batch"),
    ],
)
def test_impossible_masks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomMasking(**arguments)


def test_missing_weights_and_broken_columns_are_refused():
    index = torch.tensor([0])
    with pytest.raises(ValueError, match=r"\(1, 10 or more\) tokens, got None"):
        RandomMasking(dispersion=1.0).plan(torch.tensor([10]), 0, index, "cpu")
    with pytest.raises(ValueError, match="whole columns of 4 rows, got \\[10\\]"):
        RandomMasking().plan(torch.tensor([10]), 0, index, "cpu", rows=4)
