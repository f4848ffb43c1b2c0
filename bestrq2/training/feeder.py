"""The next batch is fetched, copied to the device and prepared there while the device works on the current one."""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from bestrq2.data import Batch
from bestrq2.hardware import is_out_of_memory

Preparation: TypeAlias = Callable[[Batch, int], Batch]


def preparation(model: Any, device: torch.device, autocast: torch.dtype | None) -> Preparation | None:
    """Front end, mask and codes of ``model`` for the batch of a step, with the bits that its forward pass gives; None
    for a model without them."""
    if not hasattr(model, "prepare"):
        return None

    def prepare(batch: Batch, step: int) -> Batch:
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            return replace(batch, prepared=model.prepare(*batch.inputs, step, batch.index))

    return prepare


@dataclass(frozen=True)
class Fed:
    """A batch whose waveform is on the device (or on its way), and the seconds that the loop waited for it."""

    batch: Batch
    waited: float


class Feeder:
    """Iterates over ``stream`` with one batch in hand. Closing it ends the data workers.

    Call :meth:`prefetch` after the work of a step was handed to the device and before waiting for its result. On CUDA
    the copy, and the conversion of int16 to float32, run on a stream of their own: on the stream of the training they
    would begin when the present step has ended. Batches are delivered in float32 everywhere.

    Args:
        prepare: ``(batch, step) -> batch`` with what the model computes of it before its trained weights come in, on
            the stream of the copy, where nothing of the training has to be waited for. None: left to the step.
        step: of the first batch.
    """

    def __init__(
        self,
        stream: Generator[Batch, None, None],
        device: torch.device,
        prepare: Preparation | None = None,
        step: int = 0,
    ) -> None:
        self.stream, self.device, self.prepare, self.step = stream, device, prepare, step
        self._next: Fed | Exception | None = None
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        if self._copying is not None:  # constants of the model may be on their way
            self._copying.wait_stream(torch.cuda.current_stream(device))

    def prefetch(self) -> None:
        """Fetch the next batch now. An error of the data, or of its copy, is kept until that batch's turn."""
        if self._next is not None:
            return
        start = time.perf_counter()
        try:
            batch = next(self.stream, None)
            waited = time.perf_counter() - start
            self._next = None if batch is None else Fed(self._on_device(batch), waited)
        except Exception as error:
            self._next = error

    def _on_device(self, batch: Batch) -> Batch:
        if self._copying is None:
            return self._prepared(batch.to(self.device, non_blocking=True).as_float())
        with torch.cuda.stream(self._copying):
            batch = self._prepared(batch.to(self.device, non_blocking=True).as_float())
            self._copied = self._copying.record_event()
        return batch

    def _prepared(self, batch: Batch) -> Batch:
        step, self.step = self.step, self.step + 1
        if self.prepare is None:
            return batch
        try:
            return self.prepare(batch, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return batch  # the step tries again when the memory of the present one is free, and reports it

    def _await(self, batch: Batch) -> None:
        """Let the stream of the training wait for the copy, and keep its memory until that stream is done with it."""
        if self._copied is not None:
            training = torch.cuda.current_stream(self.device)
            training.wait_event(self._copied)
            prepared = () if batch.prepared is None else batch.prepared.tensors()
            for tensor in (*batch.inputs, *prepared):
                if tensor.is_cuda:
                    tensor.record_stream(training)

    @property
    def error(self) -> Exception | None:
        """The error of the next batch, which is already requested, or None."""
        return self._next if isinstance(self._next, Exception) else None

    def __iter__(self) -> Iterator[Fed]:
        while True:
            self.prefetch()
            fed, self._next = self._next, None
            if isinstance(fed, Exception):
                raise fed
            if fed is None:
                return
            self._await(fed.batch)
            yield fed

    def close(self) -> None:
        self.stream.close()
