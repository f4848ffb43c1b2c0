"""The order of samples: a permutation every epoch, the same from wherever one starts."""

from collections import Counter

import pytest

from bestrq2.data.order import SampleOrder, permute
from bestrq2.hashing import mix, uniform


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 24, 25, 26, 101, 1000, 4097])
def test_every_epoch_is_a_permutation(size):
    order = SampleOrder(size, seed=3)
    for epoch in range(3):
        drawn = [order.item(epoch * size + position) for position in range(size)]
        assert {e for e, _ in drawn} == {epoch}
        assert sorted(item for _, item in drawn) == list(range(size))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        order = SampleOrder(500, seed)
        return [order.item(number * 500 + i)[1] for i in range(500)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    for first, second in ((epoch(0, 0), epoch(0, 1)), (epoch(0, 0), epoch(1, 0))):
        # Two independent permutations agree in one place on average.
        assert sum(a == b for a, b in zip(first, second)) < 10


def test_any_position_at_once():
    """Position 10^15 of a ten-million-item order costs no more than position 0: nothing is shuffled or stored."""
    order = SampleOrder(10_000_019, seed=1)
    epoch, item = order.item(10**15)
    assert epoch == 10**15 // 10_000_019
    assert 0 <= item < 10_000_019
    assert SampleOrder(10_000_019, seed=1).item(10**15) == (epoch, item)


@pytest.mark.parametrize("size", [5, 24])
def test_positions_are_uniform(size):
    """Item 0 is equally often at every position, and pairs of neighbours are all equally frequent (chi-square)."""
    epochs = 100 * size
    place, pairs = Counter(), Counter()
    for epoch in range(epochs):
        items = [permute(position, size, 9, epoch) for position in range(size)]
        place[items.index(0)] += 1
        pairs[items[0], items[1]] += 1
    for counts, cells in ((place, size), (pairs, size * (size - 1))):
        expected = epochs / cells
        chi_square = sum((number - expected) ** 2 / expected for number in counts.values())
        chi_square += (cells - len(counts)) * expected  # cells that were never drawn
        # mean cells - 1, standard deviation sqrt(2 (cells - 1)); five of those would be one in a million
        assert abs(chi_square - (cells - 1)) < 5 * (2 * (cells - 1)) ** 0.5


def test_order_never_changes_between_versions():
    """A resumed run must see the order it began with: these values are part of the format."""
    order = SampleOrder(24, seed=0)
    assert [order.item(i)[1] for i in range(12)] == GOLDEN
    assert mix(1, 2, 3) == GOLDEN_HASH


GOLDEN = [17, 15, 3, 23, 10, 6, 2, 19, 16, 12, 9, 5]
GOLDEN_HASH = 0xD0734750FDE362B3


def test_uniform_draws():
    draws = [uniform(7, i) for i in range(4000)]
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 5 * (1 / 12 / len(draws)) ** 0.5


def test_rejects_bad_arguments():
    with pytest.raises(ValueError, match="num_items"):
        SampleOrder(0)
    with pytest.raises(IndexError, match="global_index"):
        SampleOrder(3).item(-1)
    with pytest.raises(IndexError, match="position"):
        permute(3, 3)
