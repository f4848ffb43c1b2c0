"""Health of the encoder beside its loss: how large the outputs of its blocks are, and how many directions they use."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bestrq2.config import Config
from bestrq2.data import Batch, CropDataset
from bestrq2.models import BestRQ, BestRQ2, ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.ops.common.devices import exact_device

from .distributed import Ranks, is_sharded, whole
from .snapshots import evaluating, fixed_batch

HEALTH_CLIPS = 8


def whole_encoder(model: BestRQ2 | BestRQ, config: Config, device: torch.device) -> ViTEncoder | ConformerEncoder:
    """The encoder as one process can call it: itself, or a copy if its weights are sharded (a collective call)."""
    encoder = model.encoder
    if not any(is_sharded(parameter) for parameter in encoder.parameters()):
        return encoder
    weights = {name: whole(tensor).cpu() for name, tensor in encoder.state_dict().items()}
    copy = build_encoder(config.model, config.data.crop_seconds)
    copy.load_state_dict(weights)
    return copy.to(device)


class HealthCheck:
    """Measures the encoder of a run every ``train.health_every`` steps, on the same clips each time: at step 0, in the
    first row of the log at or after every multiple, and in the last."""

    def __init__(
        self, config: Config, model: BestRQ2 | BestRQ, dataset: CropDataset, ranks: Ranks, device: torch.device
    ) -> None:
        self.config, self.model, self.dataset, self.ranks, self.device = config, model, dataset, ranks, device
        self.clips: Batch | None = None

    def measure(self, step: int) -> dict[str, float]:
        """Result of :func:`encoder_health` after ``step`` steps, on the first rank, if it is time to (a collective
        call); otherwise nothing."""
        train = self.config.train
        every, before = train.health_every, step - train.log_every  # the step of the row before
        if not every or not (step in (0, train.steps) or step // every > before // every):
            return {}
        encoder = whole_encoder(self.model, self.config, self.device)
        if self.clips is None:
            self.clips = self.ranks.from_first(lambda: fixed_batch(self.dataset, HEALTH_CLIPS, HEALTH_CLIPS))
        return encoder_health(encoder, self.clips) if self.ranks.is_first else {}


@torch.no_grad()
def encoder_health(encoder: ViTEncoder | ConformerEncoder, batch: Batch) -> dict[str, float]:
    """Measure on whole, unmasked clips, each encoded alone, in evaluation mode and fp32.

    Returns:
        ``health/rms/0`` ...: root mean square of each block's output over all tokens and channels, and
        ``health/effective_rank``: of the final features of all tokens, see :func:`effective_rank`.
    """
    device = next(encoder.parameters()).device
    squares: list[list[float]] = [[0.0, 0.0] for _ in range(encoder.depth)]
    features: list[Tensor] = []

    def count(number: int) -> Callable[[nn.Module, tuple, Tensor], None]:
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            squares[number][0] += float(output.to(exact_device(output.device)).double().square().sum())
            squares[number][1] += output.numel()

        return hook

    hooks = [block.register_forward_hook(count(number)) for number, block in enumerate(encoder.encoder.blocks)]
    hooks.append(
        encoder.encoder.norm.register_forward_hook(lambda _, __, output: features.append(output.flatten(0, -2)))
    )
    try:
        # Compiled blocks would be compiled once more for this shape and mode.
        with (
            evaluating(encoder),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            for row, length in enumerate(batch.lengths.tolist()):
                encoder.encode(batch.waveform[row : row + 1, :length].to(device))
    finally:
        for hook in hooks:
            hook.remove()
    found = {f"health/rms/{number}": (total / max(1.0, size)) ** 0.5 for number, (total, size) in enumerate(squares)}
    return found | {"health/effective_rank": effective_rank(torch.cat(features))}


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the singular values of ``features (N, D)`` about their mean, as shares of their sum
    (Roy and Vetterli 2007; RankMe, Garrido et al. 2023, leaves the mean in).

    From 1 (all features on a line) to min(N - 1, D); 0 if all are equal, NaN if one is not finite. A fall during
    training means collapsing features. Values of different N do not compare.
    """
    features = features.to(exact_device(features.device)).double()
    centred = features - features.mean(0)
    small = centred @ centred.T if centred.shape[0] < centred.shape[1] else centred.T @ centred
    if not bool(small.isfinite().all()):
        return float("nan")
    singular = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    if float(singular.sum()) <= 1e-12:
        return 0.0
    share = singular / singular.sum()
    return float((-(share * share.clamp(min=1e-300).log()).sum()).exp())
