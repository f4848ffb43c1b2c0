"""Lines about a run, logged before its first step and beside the progress bar."""

import math

import torch

from bestrq2 import ops
from bestrq2.config import Config
from bestrq2.hardware import describe_device, multiplies_in_hardware
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.ops.common.native import extension_obstacle
from bestrq2.runs.folder import RunFolder

from .distributed import Ranks


def about_model(config: Config, model: BestRQ2 | BestRQ) -> str:
    """A line with the sizes of a pretraining model."""
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"Model: {config.recipe} ({config.model.name}), encoder {encoder:,} parameters, {trained:,} trained"


def describe_run(
    config: Config,
    about: str,
    run: RunFolder,
    ranks: Ranks,
    device: torch.device,
    autocast: torch.dtype | None,
    peak: tuple[float, str],
) -> None:
    """Log model, device, ranks and folder, and record the versions that this start runs with.

    Args:
        about: a line about the model, such as :func:`about_model`.
        autocast: None for fp32.
        peak: FLOP/s that utilisation is measured against, and where the number comes from.
    """
    say = ranks.say
    precision = "fp32" if autocast is None else f"{str(autocast).removeprefix('torch.')} autocast"
    say(about)
    say(f"Device: {describe_device(device)}, {precision}; operations: {', '.join(ops.available_backends())}")
    if not multiplies_in_hardware(device, autocast):
        say(f"note: matrix products in {str(autocast).removeprefix('torch.')} have no hardware here: fp32 is faster")
    if ranks.size > 1:
        kind = "sharded over (FSDP2)" if config.train.strategy == "fsdp" else "replicated on (DDP)"
        share = config.train.batch_size // ranks.size
        say(f"Ranks: {kind} {ranks.size} processes, {share} clips of every step each")
    if (missing := extension_obstacle()) is not None:
        say(f"note: the slower PyTorch path runs: {missing}")
    say(f"Run: {run.path} (utilisation against {peak[0] / 1e12:.2f} TFLOP/s, {peak[1]})")
    saved, measured = config.train.save_every, config.validation.every
    if config.train.keep_best and config.validation.source and (both := math.lcm(saved, measured)) != saved:
        say(
            f"note: train.keep_best compares the checkpoints of every {both} steps: they are saved every {saved} steps,"
            f" the held-out loss is measured every {measured}"
        )
    if ranks.is_first:
        run.write_versions(describe_device(device), ranks.size)


def is_finite(value: float) -> bool:
    return value - value == 0.0


def postfix(row: dict[str, float]) -> str:
    return (
        f"loss {row['loss']:.3f}, acc {row['accuracy']:.3f} (unigram {row['unigram']:.3f}), "
        f"ppl {row['perplexity']:.0f}, grad {row['grad_norm']:.2f}, lr {row['learning_rate']:.1e}, "
        f"{row['audio_seconds_per_second']:.0f} s/s, wait {row['data_wait']:.0%}, mfu {row['mfu']:.1%}"
    )
