"""The next batch is fetched, and its copy to the device begun, while the device works on the current one."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch

from bestrq2.data import Batch


@dataclass(frozen=True)
class Fed:
    """A batch whose waveform is on the device (or on its way), and the seconds that the loop waited for it."""

    batch: Batch
    waited: float


class Feeder:
    """Iterates over ``stream`` with one batch in hand. Closing it ends the data workers.

    Call :meth:`prefetch` after the work of a step was handed to the device and before waiting for its result.
    """

    def __init__(self, stream: Generator[Batch, None, None], device: torch.device) -> None:
        self.stream, self.device = stream, device
        self._next: Fed | Exception | None = None

    def prefetch(self) -> None:
        """Fetch the next batch now. An error of the data is kept until that batch's turn."""
        if self._next is not None:
            return
        start = time.perf_counter()
        try:
            batch = next(self.stream, None)
        except Exception as error:
            self._next = error
            return
        waited = time.perf_counter() - start
        self._next = None if batch is None else Fed(batch.to(self.device, non_blocking=True), waited)

    @property
    def error(self) -> Exception | None:
        """Why the next batch, already asked for, cannot be had."""
        return self._next if isinstance(self._next, Exception) else None

    def __iter__(self) -> Iterator[Fed]:
        while True:
            self.prefetch()
            fed, self._next = self._next, None
            if isinstance(fed, Exception):
                raise fed
            if fed is None:
                return
            yield fed

    def close(self) -> None:
        self.stream.close()
