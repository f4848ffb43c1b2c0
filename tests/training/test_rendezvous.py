"""Ranks that start again agree on a fresh part of the store, whatever earlier starts left in it."""

import threading
from datetime import timedelta

import pytest
from torch import distributed as dist

from bestrq2.training.rendezvous import POLL_SECONDS, agree_on_round

PATIENCE = timedelta(seconds=20)


def start(store: dist.Store, size: int, first_last: bool) -> list[str]:
    """The names that all ranks of one start accept; rank 0 comes last or first."""
    names = [""] * size

    def join(rank: int) -> None:
        names[rank] = agree_on_round(store, rank, size, PATIENCE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    order = threads[1:] + threads[:1] if first_last else threads
    for thread in order:
        thread.start()
        threading.Event().wait(3 * POLL_SECONDS)  # later ranks come when earlier ones have read what there is
    for thread in order:
        thread.join()
    return names


@pytest.mark.parametrize("first_last", [False, True])
def test_every_start_has_its_own_name(first_last):
    store = dist.HashStore()
    starts = [start(store, 3, first_last) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_a_start_that_was_cut_off_is_forgotten():
    store = dist.HashStore()
    with pytest.raises(Exception, match=r"(?i)time"):  # rank 1 never came
        agree_on_round(store, 0, 2, timedelta(seconds=0.3))
    assert len(set(start(store, 2, first_last=True))) == 1
    with pytest.raises(TimeoutError, match="rank 1 of 2"):  # nobody answers under the old name
        agree_on_round(store, 1, 2, timedelta(seconds=0.3))
