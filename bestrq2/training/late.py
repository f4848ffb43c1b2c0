"""Loss and gradient norm of a step, read while the device works on the next one.

A step on a GPU ends with a wait for its loss, and until the host has queued the next step the device has nothing to do.
Where nothing depends on the values at once they are copied to the host behind the update, and read after the next
step has been queued.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bestrq2.data import Batch
from bestrq2.models.best_rq2 import PretrainOutput

from .step import StepTotals


def measures(output: PretrainOutput, touching: bool) -> Tensor:
    """Loss, accuracy, loss of whole clips, and, if asked for, the touching share (else 0): ``(4,)``."""
    loss = output.loss.detach()
    clip = torch.zeros_like(loss) if output.clip_loss is None else output.clip_loss.detach()
    share = output.touching_share() if touching else torch.zeros_like(loss)
    return torch.stack((loss, output.accuracy, clip, share))


@dataclass
class Reading:
    """Values of a step that the device may still compute.

    Attributes:
        number: of the step, from 1 on.
        batch: kept for the case that its loss is not finite.
        totals: of the step, without the sums that are in ``values``.
        values: sums of loss, accuracy, loss of whole clips and touching targets, then the gradient norm: ``(5,)``.
        queued: whether the update was handed to the device before anybody has seen the values.
    """

    number: int
    batch: Batch
    totals: StepTotals
    values: Tensor
    queued: bool
    _copied: Any = field(default=None, init=False)

    def start(self) -> None:
        """Queue the copy to the host behind the work of the step, so that reading waits for no later work.

        Of the batch the audio alone is kept: what was prepared of it would stay beside that of the next two steps.
        """
        self.batch = replace(self.batch, prepared=None)
        if self.values.device.type == "cuda":
            host = torch.empty(self.values.shape, dtype=self.values.dtype, pin_memory=True)
            host.copy_(self.values, non_blocking=True)
            self._copied = torch.cuda.current_stream(self.values.device).record_event()
            self.values = host

    def read(self) -> list[float]:
        """The values; waits for the step, and after :meth:`start` for nothing behind it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.values.tolist()
