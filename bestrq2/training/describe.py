"""Description of a run, printed before its first step."""

import torch

from bestrq2 import ops
from bestrq2.config import Config
from bestrq2.hardware import describe_device
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.ops._impl.native import extension_obstacle
from bestrq2.runs.folder import RunFolder

from .distributed import Ranks


def describe_run(
    config: Config,
    model: BestRQ2 | BestRQ,
    run: RunFolder,
    ranks: Ranks,
    device: torch.device,
    autocast: torch.dtype | None,
    peak: tuple[float, str],
) -> None:
    """Print sizes, device, ranks and folder, and record the versions that this start runs with.

    Args:
        autocast: None for fp32.
        peak: FLOP/s that utilisation is measured against, and where the number comes from.
    """
    say = ranks.say
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = "fp32" if autocast is None else f"{str(autocast).removeprefix('torch.')} autocast"
    say(f"Model: {config.recipe} ({config.model.name}), encoder {encoder:,} parameters, {trained:,} trained")
    say(f"Device: {describe_device(device)}, {precision}; operations: {', '.join(ops.available_backends())}")
    if ranks.size > 1:
        kind = "sharded over (FSDP2)" if config.train.strategy == "fsdp" else "replicated on (DDP)"
        share = config.train.batch_size // ranks.size
        say(f"Ranks: {kind} {ranks.size} processes, {share} clips of every step each")
    if (missing := extension_obstacle()) is not None:
        say(f"note: the slower PyTorch path runs: {missing}")
    say(f"Run: {run.path} (utilisation against {peak[0] / 1e12:.2f} TFLOP/s, {peak[1]})")
    if ranks.is_first:
        run.write_versions(describe_device(device), ranks.size)
