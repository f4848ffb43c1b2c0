"""AdamW with warm-up and cosine decay, and its state as plain named tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bestrq2.checkpoint import CheckpointError
from bestrq2.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Rate of update ``step`` (0-based): linear warm-up to the peak, then cosine to ``final_ratio`` of it."""
    warmup = math.floor(steps * config.warmup)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    floor = config.final_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; ``decay_all=False`` spares vectors (norms, biases) and tokens the decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = sum(size > 1 for size in parameter.shape) >= 2
            (decayed if config.decay_all or is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    low, high = config.betas
    return torch.optim.AdamW([g for g in groups if g["params"]], config.learning_rate, (low, high), config.epsilon)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name, for a checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`.

    Raises:
        CheckpointError: if a parameter's moments are missing or of another shape.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if f"optimizer.step.{name}" not in tensors:
            continue  # never updated before the checkpoint was written
        state = {"step": tensors[f"optimizer.step.{name}"].clone()}
        for key in MOMENTS:
            value = tensors.get(f"optimizer.{key}.{name}")
            if value is None or value.shape != parameter.shape:
                found = None if value is None else tuple(value.shape)
                raise CheckpointError(f"optimizer.{key}.{name}: expected {tuple(parameter.shape)}, found {found}")
            state[key] = value.to(parameter.device, parameter.dtype, copy=True)
        optimizer.state[parameter] = state
