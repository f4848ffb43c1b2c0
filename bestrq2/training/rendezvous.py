"""Rendezvous of the ranks of one start, also when torchrun restarts them after a failure.

torchrun keeps one key-value store for all restarts, and the addresses that killed processes left there made restarted
ones wait for them forever (seen with torch 2.13 and gloo). So every start gets its own part of the store, agreed on as
follows. A restart count would not do: with several nodes each torchrun counts its own failures only.
"""

import os
import socket
import time
from datetime import timedelta
from uuid import uuid4

from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from bestrq2.errors import ConfigError, TrainingError

ROUND = "bestrq2/round"
POLL_SECONDS = 0.05


def joining_time() -> timedelta:
    """Time that the ranks wait for each other at the start: ten minutes, or ``BESTRQ2_JOIN_SECONDS``."""
    text = os.environ.get("BESTRQ2_JOIN_SECONDS", "600")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ConfigError(f"BESTRQ2_JOIN_SECONDS: expected a number of seconds above 0, got {text!r}")
    return timedelta(seconds=seconds)


def join_store(rank: int, size: int) -> dist.Store:
    """The key-value store of the ranks: torchrun's, or one that rank 0 serves at MASTER_ADDR:MASTER_PORT.

    Raises:
        ConfigError: if the environment does not say where.
        TrainingError: if it cannot be reached or served.
    """
    patience = joining_time()
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not (port or "").isdecimal():
        raise ConfigError(
            f"MASTER_ADDR and MASTER_PORT: expected the address of rank 0 and a port, got {host!r} and {port!r}; "
            "torchrun sets them"
        )
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return next(rendezvous("env://", rank, size, timeout=patience))[0]
        if rank:
            _await_server(host, int(port or 0), patience)  # quieter than the store, which prints traces of its stack
        # Not waiting for the other ranks here: agree_on_round does, and can say who is missing.
        return dist.TCPStore(host, int(port or 0), size, rank == 0, patience, wait_for_workers=False)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "in use" in str(error) or "EADDRINUSE" in str(error):
            raise TrainingError(f"port {port} is in use: choose another MASTER_PORT ({reason})") from error
        raise TrainingError(
            f"rank {rank} of {size} cannot reach rank 0 at {host}:{port} within {patience.total_seconds():g} s: start "
            f"it, or correct MASTER_ADDR and MASTER_PORT ({reason})"
        ) from error


def _await_server(host: str, port: int, patience: timedelta) -> None:
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=patience.total_seconds()).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def agree_on_round(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start that all of its ranks share and no earlier start had.

    Rank 0 publishes a fresh name. Every other rank answers the name it reads, with a fresh word of its own, and accepts
    a name only when rank 0 has confirmed that word under it: so a name left over from an earlier start, read before
    rank 0 replaced it, is never accepted.

    Raises:
        TrainingError: if not all ranks have answered within ``patience``; it names those that are missing.
    """
    own = uuid4().hex
    if rank == 0:
        store.set(ROUND, own)
        answers = [f"bestrq2/{own}/{other}" for other in range(1, size)]
        _wait_for(store, answers, patience)
        store.set(f"bestrq2/{own}/all", " ".join(store.get(answer).decode() for answer in answers))
        return own
    deadline = time.monotonic() + patience.total_seconds()
    while time.monotonic() < deadline:
        if store.check([ROUND]):
            name = store.get(ROUND).decode()
            store.set(f"bestrq2/{name}/{rank}", own)
            confirmed = f"bestrq2/{name}/all"
            if store.check([confirmed]) and own in store.get(confirmed).decode().split():
                return name
        time.sleep(POLL_SECONDS)
    raise TrainingError(
        f"rank {rank} of {size} waited {patience.total_seconds():g} s for rank 0, which did not answer: start it, and "
        "see its messages"
    )


def _wait_for(store: dist.Store, answers: list[str], patience: timedelta) -> None:
    deadline = time.monotonic() + patience.total_seconds()
    missing = answers
    while missing := [answer for answer in missing if not store.check([answer])]:
        if time.monotonic() > deadline:
            numbers = [answer.rpartition("/")[2] for answer in missing]
            names = f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers[:20])}"
            more = f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
            raise TrainingError(
                f"{names}{more} of {len(answers) + 1} did not join within {patience.total_seconds():g} s: start them, "
                "or correct WORLD_SIZE"
            )
        time.sleep(POLL_SECONDS)
