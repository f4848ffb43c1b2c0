"""Ranks that start again agree on a fresh part of the store, whatever earlier starts left in it."""

import socket
import threading
from datetime import timedelta

import pytest
from torch import distributed as dist

from bestrq2.errors import ConfigError, TrainingError
from bestrq2.training.distributed import Ranks
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
    with pytest.raises(TrainingError, match=r"^rank 1 of 2 did not join within 0.3 s"):
        agree_on_round(store, 0, 2, timedelta(seconds=0.3))
    assert len(set(start(store, 2, first_last=True))) == 1
    with pytest.raises(
        TrainingError, match=r"rank 1 of 2 waited 0.3 s for rank 0"
    ):  # no process listens under the old name
        agree_on_round(store, 1, 2, timedelta(seconds=0.3))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not: start the ranks by torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"RANK: expected 0..1 for WORLD_SIZE=2, got 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT: expected the address of rank 0"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch, environment, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Ranks.start()


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "rank 1 of 2 did not join within 0.4 s"), (1, "rank 1 of 2 cannot reach rank 0 at")]
)
def test_a_rank_that_is_alone_says_who_is_missing(monkeypatch, rank, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("BESTRQ2_JOIN_SECONDS", "0.4")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(TrainingError, match=message):
        Ranks.start()
