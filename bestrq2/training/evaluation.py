"""Measurements during training: the masked loss on held-out audio, a probe, pictures."""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from bestrq2.config import Config, ConfigError, ProbeConfig
from bestrq2.data import Batch, CropDataset, DataError, batches
from bestrq2.data.copies import copied_files
from bestrq2.data.fingerprint import file_list_digest
from bestrq2.data.splits import shared_clips
from bestrq2.errors import counted, printable, system_reason
from bestrq2.hashing import mix
from bestrq2.models import BestRQ, BestRQ2, build_encoder
from bestrq2.probing import ProbeTask, packaged_task, run_probe
from bestrq2.probing.labels import check_testable, read_clips
from bestrq2.runs.metrics import MetricsLog

from .distributed import Ranks, shared
from .health import whole_encoder
from .open_data import open_dataset
from .snapshots import evaluating, fixed_batch, fixed_pictures
from .step import check_targets

logger = logging.getLogger(__name__)


class Evaluation:
    """Runs what the configuration asks for, on all ranks together.

    Training is left as it was: the mode of every module, the gradients, the random generators. The last step measures
    everything that is asked for at all.

    Attributes:
        validates: whether there is validation audio.
        held_out: digest of its clips, None without any.
        validation_loss: of the last validation, None before the first.
        validated_step: when that was.
    """

    def __init__(
        self,
        config: Config,
        model: BestRQ2 | BestRQ,
        ranks: Ranks,
        device: torch.device,
        autocast: torch.dtype | None,
        dataset: CropDataset,
        run_path: Path,
    ) -> None:
        self.run_path = run_path
        self.config, self.model, self.ranks, self.device, self.autocast = config, model, ranks, device, autocast
        settings = config.validation
        self.validates = settings.source is not None
        self.held_out: str | None = None
        self.validation_loss: float | None = None
        self.validated_step = -1
        self.unread = 0.0  # files that the last validation could not read
        if self.validates:
            # The same crops every time: neither shares of domains nor batches of similar length.
            crops = replace(
                config.data, source=settings.source, batching="crops", batch_seconds=None, domain_weights={}
            )
            held_out = replace(config, data=crops)
            self.dataset = ranks.from_first(lambda: _held_out(held_out))
            check_targets(model, self.dataset, "validation.source")
            self.clips = min(settings.clips, len(self.dataset))
            held, used = self.dataset.files, dataset.files
            self.held_out = f"{file_list_digest(held)[:16]}-{self.clips}"
            if known := ranks.from_first(
                lambda: [item.path for item in shared_clips(held, used, copied_files(held, used))]
            ):
                logger.warning(
                    f"Validation: {len(known)} of {counted(len(held), 'clip')} of validation.source are also trained "
                    f"on, first {printable(known[0])}: the validation loss, and checkpoints kept by it, say nothing of "
                    "other audio"
                )
        self.pictured = ranks.from_first(lambda: fixed_batch(dataset)) if config.train.pictures_every else None
        self.task = probe_task(config.probe)

    def check_probe(self) -> None:
        """Refuse a probe that cannot be done, before its first time. Later that is a warning.

        Raises:
            ConfigError: where it is not what its labels allow, or they cannot be read.
        """
        if self.task is None:
            return
        try:
            check_testable(read_clips(self.task), self.task)
        except (ValueError, OSError) as error:
            raise ConfigError(f"probe: {_reason(error)}") from error

    def due(self, step: int, last: bool) -> bool:
        """Return True if something is to be measured after ``step`` steps."""
        return any(self._due(step, last).values())

    def _due(self, step: int, last: bool) -> dict[str, bool]:
        config = self.config
        every = {
            "validation": config.validation.every if self.validates else 0,
            "probe": config.probe.every,
            "pictures": config.train.pictures_every if step else 0,
        }
        return {name: number > 0 and (last or step % number == 0) for name, number in every.items()}

    def run(self, step: int, last: bool, log: MetricsLog | None) -> dict[str, float]:
        """Measure what is due after ``step`` steps: values by the names that the log gives them.

        Pictures go to ``log``, which is None on all ranks but the first.

        Raises:
            ConfigError: at step 0, if the probe's task cannot be done; later that is a warning.
        """
        found: dict[str, float] = {}
        due = self._due(step, last)
        if due["validation"]:
            try:
                with evaluating(self.model):
                    found |= self._validate()
                self.validated_step = step
            except DataError as error:
                if step == 0:
                    raise
                if self.ranks.is_first:  # training must not be lost for it
                    logger.warning(f"step {step}: no validation: {str(error).splitlines()[0]}")
        if due["probe"]:
            found |= self._probe(step)
        if due["pictures"] and self.pictured is not None:
            with self._autocast():
                fixed_pictures(self.run_path if self.ranks.is_first else None, self.model, self.pictured, step, log)
        return found

    def loss_at(self, step: int) -> float | None:
        """The held-out loss after ``step`` steps; None if it was not measured then."""
        return self.validation_loss if step == self.validated_step else None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def _probe(self, step: int) -> dict[str, float]:
        """Of the encoder as it is, on the first rank; the others wait at their next common sum."""
        encoder = whole_encoder(self.model, self.config, self.device)
        if not self.ranks.is_first or self.task is None:
            return {}
        try:
            found = run_probe(encoder, self.task, untrained=self._untrained)
        except (ValueError, OSError) as error:
            if step == 0:
                raise ConfigError(f"probe: {_reason(error)}") from error
            logger.warning(f"step {step}: no probe: {_reason(error)}")  # training must not be lost for it
            return {}
        return {f"probe/{name}": value for name, value in found.items()}

    def _untrained(self) -> nn.Module:
        """The encoder as training began."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.config.train.seed, 1) >> 1)
            return build_encoder(self.config.model, self.config.data.crop_seconds).to(self.device)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss and accuracy over the same clips and masks every time, whatever the number of ranks."""
        train = self.config.train
        share = max(1, train.batch_size // (self.ranks.size * train.accumulate))
        batch_size = share * self.ranks.size
        steps = -(-self.clips // batch_size)
        loss = accuracy = targets = skips = 0.0
        stream = batches(
            self.dataset, batch_size, num_steps=steps, workers=0, rank=self.ranks.rank, world_size=self.ranks.size
        )
        with closing(stream):
            for _ in range(steps):
                batch = self._next(stream)
                skips += len(batch.skips)
                inside = batch.index < self.clips
                kept = batch if bool(inside.all()) else _rows(batch, inside)
                with self._autocast():
                    output = self.model(kept.waveform.to(self.device), kept.lengths, step=0, index=kept.index)
                # A rank without a clip of its own in the last step still takes part in the pass (FSDP gathers weights).
                count = float(output.plan.predicted_lengths.sum()) if bool(inside.any()) else 0.0
                loss += float(output.loss) * count
                accuracy += float(output.accuracy) * count
                targets += count
        loss, accuracy, targets, skips = self.ranks.sum([loss, accuracy, targets, skips])
        if skips != self.unread and self.ranks.is_first:
            logger.warning(
                f"validation: {round(skips)} of {self.clips} clips could not be read ({round(self.unread)} before): "
                "others are measured in their place, so that the losses do not compare"
            )
        self.unread = skips
        self.validation_loss = loss / max(1.0, targets)
        return {"validation/loss": self.validation_loss, "validation/accuracy": accuracy / max(1.0, targets)}

    def _next(self, stream: Iterator[Batch]) -> Batch:
        """The next batch of this rank.

        Raises:
            DataError: on every rank, if one of them cannot have its batch.
        """
        batch, problem = None, ""
        try:
            batch = next(stream)
        except DataError as error:
            problem = str(error)
        if self.ranks.sum([batch is None])[0] or batch is None:
            raise shared(DataError(next(filter(None, self.ranks.texts(problem)), "no audio")))
        return batch


def _held_out(config: Config) -> CropDataset:
    try:
        return open_dataset(config, "Validation", "validation")
    except DataError as error:
        raise DataError(f"validation.source: {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{printable(os.fsdecode(error.filename))}: {system_reason(error)}"
    return str(error)


def probe_task(config: ProbeConfig) -> ProbeTask | None:
    """The task that a configuration describes; None without a probe."""
    if not config.every:
        return None
    chosen = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name != "every"}
    if config.manifest is not None:
        return ProbeTask(**chosen)
    for name in ("label", "group"):  # unless they are chosen, those of the clips of the package
        if chosen[name] == getattr(ProbeConfig(), name):
            del chosen[name]
    return packaged_task(**chosen)


def _rows(batch: Batch, inside: torch.Tensor) -> Batch:
    """The rows marked by ``inside``, or the first one where none is."""
    rows = torch.nonzero(inside)[:, 0] if bool(inside.any()) else torch.zeros(1, dtype=torch.int64)
    return replace(batch, waveform=batch.waveform[rows], lengths=batch.lengths[rows], index=batch.index[rows])
