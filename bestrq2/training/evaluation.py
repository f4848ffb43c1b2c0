"""What is measured beside training, every so many steps: the masked loss on audio that is not trained on."""

from contextlib import closing
from dataclasses import replace

import torch

from bestrq2.config import Config
from bestrq2.data import Batch, batches
from bestrq2.models import BestRQ, BestRQ2

from .data_source import open_dataset
from .distributed import Ranks


class Evaluation:
    """Runs what the configuration asks for, on all ranks together.

    Training is left as it was: the mode of every module, the gradients, the random generators.

    Attributes:
        validates: whether there is validation audio.
        validation_loss: of the last validation, None before the first.
    """

    def __init__(
        self,
        config: Config,
        model: BestRQ2 | BestRQ,
        ranks: Ranks,
        device: torch.device,
        autocast: torch.dtype | None,
    ) -> None:
        self.config, self.model, self.ranks, self.device, self.autocast = config, model, ranks, device, autocast
        settings = config.validation
        self.validates = settings.source is not None
        self.validation_loss: float | None = None
        if self.validates:
            # The same crops every time: neither shares of domains nor batches of similar length.
            crops = replace(
                config.data, source=settings.source, batching="crops", batch_seconds=None, domain_weights={}
            )
            held_out = replace(config, data=crops)
            self.dataset = ranks.from_first(lambda: open_dataset(held_out, "Validation"))
            self.clips = min(settings.clips, len(self.dataset))

    def due(self, step: int, last: bool) -> bool:
        """Whether something is to be measured after ``step`` steps."""
        return self.validates and (last or step % self.config.validation.every == 0)

    def run(self, step: int) -> dict[str, float]:
        """Values by the names that the log gives them."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                return self._validate()
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss and accuracy over the same clips and masks every time, whatever the number of ranks."""
        train = self.config.train
        share = max(1, train.batch_size // (self.ranks.size * train.accumulate))
        batch_size = share * self.ranks.size
        steps = -(-self.clips // batch_size)
        loss = accuracy = targets = 0.0
        stream = batches(
            self.dataset, batch_size, num_steps=steps, workers=0, rank=self.ranks.rank, world_size=self.ranks.size
        )
        with closing(stream):
            for batch in stream:
                inside = batch.index < self.clips
                kept = batch if bool(inside.all()) else _rows(batch, inside)
                with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                    output = self.model(kept.waveform.to(self.device), kept.lengths, 0, kept.index)
                # A rank without a clip of its own in the last step still takes part in the pass (FSDP gathers weights).
                count = float(output.plan.predicted_lengths.sum()) if bool(inside.any()) else 0.0
                loss += float(output.loss) * count
                accuracy += float(output.accuracy) * count
                targets += count
        loss, accuracy, targets = self.ranks.sum([loss, accuracy, targets])
        self.validation_loss = loss / max(1.0, targets)
        return {"validation/loss": self.validation_loss, "validation/accuracy": accuracy / max(1.0, targets)}


def _rows(batch: Batch, inside: torch.Tensor) -> Batch:
    """The rows marked by ``inside``, or the first one where none is."""
    rows = torch.nonzero(inside)[:, 0] if bool(inside.any()) else torch.zeros(1, dtype=torch.int64)
    return replace(batch, waveform=batch.waveform[rows], lengths=batch.lengths[rows], index=batch.index[rows])
