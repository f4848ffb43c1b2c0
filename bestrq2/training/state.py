"""Everything that changes while training: what a checkpoint holds and a resumed run gets back."""

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bestrq2.config import Config
from bestrq2.errors import REASONS
from bestrq2.layers.code_usage import CodeUsage
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.models.build import load_weights
from bestrq2.models.frozen import FrozenHead
from bestrq2.runs.checkpoint import Checkpoint

from .averaging import PREFIX, WeightAverage
from .distributed import Ranks, whole, wrap_model
from .loss_scale import LossScale
from .optimizer import make_optimizer, optimizer_tensors, restore_optimizer


@dataclass
class Progress:
    """Counters since the first step of the run, over all ranks and all restarts."""

    step: int = 0
    elapsed_seconds: float = 0.0  # up to the last start
    audio_seconds: float = 0.0
    skipped_files: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0  # steps up to now that were not finite; those that fp16 explains are not counted
    evaluated_step: int = -1  # of the last evaluation, and what it found
    validation_loss: float | None = None
    # Sums over the steps since the last checkpoint with a training loss for keep_best; those not finite are left out.
    unscored_steps: int = 0
    unscored_loss: float = 0.0
    unscored_targets: float = 0.0

    def take_score(self) -> float | None:
        """Return the mean training loss since the last call, None without targets."""
        value = self.unscored_loss / self.unscored_targets if self.unscored_targets else None
        self.unscored_steps, self.unscored_loss, self.unscored_targets = 0, 0.0, 0.0
        return value


@dataclass(frozen=True)
class Snapshot:
    """Tensors of a checkpoint, copied to the CPU so that training may go on while they are written."""

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    extra: dict[str, Any]

    def not_finite(self) -> list[str]:
        """Names of weights, averaged or not, that hold NaN or infinity."""
        weights = {**self.weights, **{f"average of {name}": tensor for name, tensor in (self.averaged or {}).items()}}
        return [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]


class TrainingState:
    """Model, optimizer, weight average, code usage, loss scale and counters.

    Attributes:
        model: the pretraining model, its parameters sharded under FSDP.
        parallel: what the loop calls: the model, or its wrapper for several ranks.
    """

    def __init__(
        self,
        config: Config,
        model: BestRQ2 | BestRQ | FrozenHead,
        ranks: Ranks,
        device: torch.device,
        autocast: torch.dtype | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        settings = config.train
        self.ranks = ranks
        if checkpoint is not None:
            load_weights(model, ranks.all_agree(checkpoint.weights), checkpoint.folder)
        self.model = cast(Any, model.to(device).train())  # one of several classes with the same methods
        self.parallel: nn.Module = wrap_model(self.model, settings.strategy, ranks, device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.average = WeightAverage(self.model, settings.ema_decay) if settings.ema_decay else None
        self.scale = LossScale(enabled=autocast == torch.float16)
        num_codebooks, codebook_size, _ = self.model.head.weight.shape
        self.usage = CodeUsage(num_codebooks, codebook_size).to(device)
        self.progress = Progress()
        self.skips: Counter[str] = Counter()  # files by reason, of this rank
        if checkpoint is not None:
            self._restore(checkpoint)
        self.started = time.perf_counter()

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, extra = self.ranks.all_agree(checkpoint.training_state), checkpoint.extra
        restore_optimizer(self.model, self.optimizer, tensors)
        if self.ranks.is_first:  # the others count from zero: the sum over ranks is what the checkpoint says
            self.usage.load_state_dict({name: tensors[f"usage.{name}"] for name in self.usage.state_dict()})
            self.skips.update(extra.get("skips", {}))
        averaged = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        if self.average is not None and averaged:  # a run may switch averaging on later
            self.average.restore(averaged, extra["ema_updates"])
        self.scale.restore(extra.get("loss_scale"))
        known = {name: extra[name] for name in Progress.__dataclass_fields__ if name in extra}
        self.progress = Progress(**{**known, "step": checkpoint.step})

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier starts included."""
        return self.progress.elapsed_seconds + time.perf_counter() - self.started

    def total_usage(self) -> CodeUsage:
        """Code usage over all ranks, on the CPU (a collective call)."""
        if self.ranks.size == 1:
            return self.usage
        num_codebooks, codebook_size = self.usage.counts.shape
        total = CodeUsage(num_codebooks, codebook_size, self.usage.decay)
        total.load_state_dict({name: self.ranks.summed(tensor) for name, tensor in self.usage.state_dict().items()})
        return total

    def snapshot(self, **extra: Any) -> Snapshot | None:
        """Copy everything; None on all ranks but the first (a collective call)."""
        weights = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        training = optimizer_tensors(self.model, self.optimizer)
        usage = self.total_usage().state_dict()
        training.update({f"usage.{name}": tensor for name, tensor in usage.items()})
        if self.ranks.size > 1:  # go on as a resumed run does, so that sums are rounded alike
            first = self.ranks.is_first
            self.usage.load_state_dict(usage if first else {name: t * 0 for name, t in usage.items()})
        average = None if self.average is None else self.average.tensors()
        skips = [round(count) for count in self.ranks.sum([self.skips[reason] for reason in REASONS])]
        if not self.ranks.is_first:
            return None
        extra |= asdict(self.progress) | {"elapsed_seconds": self.elapsed, "loss_scale": self.scale.state()}
        extra["skips"] = dict(zip(REASONS, skips))
        averaged = None
        if self.average is not None and average is not None:
            training.update({PREFIX + name: tensor for name, tensor in average.items()})
            averaged = _copied({**weights, **average})
            extra["ema_updates"] = self.average.updates
        return Snapshot(self.progress.step, _copied(weights), _copied(training), averaged, extra)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
