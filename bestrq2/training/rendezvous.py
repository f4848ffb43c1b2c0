"""How the ranks of one start find each other, also when torchrun starts them again after a failure.

torchrun keeps one key-value store for all restarts, and the addresses that killed processes left there made restarted
ones wait for them for ever (seen with torch 2.13 and gloo). So every start gets its own part of the store, agreed on as
follows. A restart count would not do: with several nodes each torchrun counts its own failures only.
"""

import time
from datetime import timedelta
from uuid import uuid4

from torch import distributed as dist

ROUND = "bestrq2/round"
POLL_SECONDS = 0.05


def agree_on_round(store: dist.Store, rank: int, size: int, patience: timedelta) -> str:
    """A name for this start that all of its ranks share and no earlier start had.

    Rank 0 publishes a fresh name. Every other rank answers the name it reads, with a fresh word of its own, and accepts
    a name only when rank 0 has confirmed that word under it: so a name left over from an earlier start, read before
    rank 0 replaced it, is never accepted.

    Raises:
        TimeoutError: if not all ranks have answered within ``patience``.
    """
    own = uuid4().hex
    if rank == 0:
        store.set(ROUND, own)
        answers = [f"bestrq2/{own}/{other}" for other in range(1, size)]
        if answers:
            store.wait(answers, patience)
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
    raise TimeoutError(f"rank {rank} of {size} waited {patience} for rank 0")
