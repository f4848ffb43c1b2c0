"""Mixtures of pairs: powers add, codes are those of the louder clip, and nothing depends on the rest of the batch."""

import pytest
import torch

from bestrq2.layers.mixing import PairMixing
from bestrq2.layers.patches import Patches


def batch(*levels, columns=20, rows=2, lengths=None):
    """Constant patches of the given levels in dB."""
    values = torch.tensor(levels, dtype=torch.float32)[:, None, None].expand(-1, columns * rows, 4).clone()
    lengths = torch.tensor(lengths or [columns * rows] * len(levels))
    return Patches(values, lengths, rows)


def test_powers_add_over_a_stretch_of_columns():
    mixing = PairMixing(1.0, level_db=(0.0, 0.0), span=(0.5, 0.5))
    patches = batch(-20.0, -50.0)
    mixture = mixing.mix(patches, torch.tensor([6, 7]))
    assert mixture.partner.tolist() == [1, 0]
    changed = (mixture.patches.values != patches.values).all(-1)
    for row, level in enumerate((-20.0, -50.0)):
        columns = changed[row].view(20, 2)
        assert columns.sum(1).unique().tolist() == [0, 2]  # whole columns
        stretch = torch.nonzero(columns[:, 0])[:, 0]
        assert len(stretch) == 10
        assert int(stretch[-1] - stretch[0]) == 9  # without a gap
        # The neighbour is brought to the clip's own level, and twice the power is 3.01 dB more.
        expected = torch.full((20, 4), level + 3.0103)
        torch.testing.assert_close(mixture.patches.values[row][changed[row]], expected, atol=1e-3, rtol=0)


def test_standardised_values_are_mixed_in_decibels():
    mixing = PairMixing(1.0, level_db=(3.0, 3.0))
    plain = batch(-20.0, -40.0)
    scaled = Patches((plain.values + 45) / 15, plain.lengths, plain.rows)
    index = torch.tensor([0, 1])
    expected = mixing.mix(plain, index)
    found = mixing.mix(scaled, index, mean=-45.0, std=15.0)
    torch.testing.assert_close(found.patches.values * 15 - 45, expected.patches.values, atol=1e-3, rtol=0)
    assert torch.equal(found.is_own, expected.is_own)


def test_silence_at_the_floor_of_the_front_end_adds_nothing():
    patches = batch(-20.0, -50.0, rows=1)
    patches.values[:, 10:] = -60.0  # both fall silent; the quiet clip is raised by 30 dB
    mixing, index = PairMixing(1.0, level_db=(0.0, 0.0), span=(1.0, 1.0)), torch.tensor([2, 3])
    mixed = mixing.mix(patches, index, floor_db=-60.0).patches.values
    torch.testing.assert_close(mixed[:, 10:], patches.values[:, 10:], atol=1e-2, rtol=0)
    assert (mixed[:, :10] > patches.values[:, :10] + 2.5).all()


def test_codes_are_those_of_the_louder_clip():
    # The first clip is loud in its first half, the second in its second.
    patches = batch(-20.0, -20.0, rows=1)
    patches.values[0, 10:] = -60.0
    patches.values[1, :10] = -60.0
    mixture = PairMixing(1.0, level_db=(0.0, 0.0), span=(1.0, 1.0)).mix(patches, torch.tensor([2, 3]))
    codes = torch.stack((torch.zeros(20, 1), torch.ones(20, 1))).long()
    assert mixture.codes(codes)[..., 0].tolist() == [[0] * 10 + [1] * 10] * 2


def test_the_level_decides_who_is_louder():
    index, patches = torch.tensor([0, 1]), batch(-30.0, -10.0)
    for level, own in ((-6.0, True), (6.0, False)):
        mixture = PairMixing(1.0, level_db=(level, level), span=(1.0, 1.0)).mix(patches, index)
        assert bool((mixture.is_own == own).all())


def test_silence_adds_nothing_and_is_not_blown_up():
    mixture = PairMixing(1.0, level_db=(5.0, 5.0), span=(1.0, 1.0)).mix(batch(-30.0, -100.0), torch.tensor([0, 1]))
    torch.testing.assert_close(mixture.patches.values[0], torch.full((40, 4), -30.0))
    assert bool(mixture.is_own[0].all())
    # The loud clip is heard in silence 30 dB below itself, the least factor.
    torch.testing.assert_close(mixture.patches.values[1], torch.full((40, 4), -60.0), atol=0.01, rtol=0)


def test_a_share_of_the_clips_is_mixed_and_only_with_its_own_neighbour():
    patches = batch(*[-30.0] * 200, columns=4)
    mixture = PairMixing(0.3, seed=1).mix(patches, torch.arange(200) + 1000)
    rows = torch.arange(200)
    mixed = mixture.partner != rows
    assert 40 <= int(mixed.sum()) <= 80
    assert torch.equal(mixture.partner[mixed], rows[mixed] ^ 1)
    unmixed = mixture.patches.values[~mixed]
    assert torch.equal(unmixed, patches.values[~mixed])
    assert bool(mixture.is_own[~mixed].all())


def test_a_pair_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    values = torch.randn(6, 40, 4) * 10 - 40
    values[5, 20:] = 0.0  # padding
    lengths = torch.tensor([40, 40, 40, 40, 40, 20])
    mixing = PairMixing(1.0, seed=3)
    whole = mixing.mix(Patches(values, lengths, 2), torch.tensor([10, 11, 12, 13, 14, 15]))
    pair = mixing.mix(Patches(values[4:], lengths[4:], 2), torch.tensor([14, 15]))
    torch.testing.assert_close(pair.patches.values, whole.patches.values[4:], atol=1e-5, rtol=0)
    assert torch.equal(pair.is_own, whole.is_own[4:])
    assert torch.equal(whole.patches.values[4, 20:], values[4, 20:])  # nothing is added behind the shorter clip's end
    alone = mixing.mix(Patches(values[4:5], lengths[4:5], 2), torch.tensor([14]))
    assert torch.equal(alone.patches.values, values[4:5])
    other = PairMixing(1.0, seed=4).mix(Patches(values, lengths, 2), torch.tensor([10, 11, 12, 13, 14, 15]))
    assert not torch.equal(other.patches.values, whole.patches.values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 1.5}, "share must lie"),
        ({"share": 0.5, "level_db": (5, -5)}, "level_db must be a range"),
        ({"share": 0.5, "span": (0, 1)}, "span must be a range"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PairMixing(**arguments)
