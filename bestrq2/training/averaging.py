"""Exponential moving average of the trained weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bestrq2.errors import CheckpointError
from bestrq2.layers.conformer_convolution import MaskedBatchNorm
from bestrq2.training.distributed import placed_like, whole

PREFIX = "ema."


class WeightAverage:
    """A slow copy of the trained parameters: after every update ``average += (1 - d) * (parameter - average)``.

    Running statistics of batch norm are averaged with them, since those of the newest weights do not fit the average.
    d grows with the updates t as min(decay, (1 + t) / (10 + t)), so that the random initial weights are soon forgotten
    (as in TensorFlow's ExponentialMovingAverage).

    Args:
        model: the (possibly sharded) model; the average is sharded like it.
        decay: in (0, 1); 0.999 remembers about a thousand updates.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.statistics = _running_statistics(model)
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.followed = trained | self.statistics
        self.average = {name: tensor.detach().clone() for name, tensor in self.followed.items()}

    @torch.no_grad()
    def update(self) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        values = [tensor.detach() for tensor in self.followed.values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Gathered averages by parameter name (a collective call when sharded)."""
        return {name: whole(tensor) for name, tensor in self.average.items()}

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Inverse of :meth:`tensors`. Statistics that an earlier version did not average start anew.

        Raises:
            CheckpointError: naming the first tensor that is missing or of another shape.
        """
        for name, own in self.average.items():
            found = tensors.get(name)
            if found is None and name in self.statistics:
                continue
            if found is None or found.shape != own.shape:
                shape = None if found is None else tuple(found.shape)
                raise CheckpointError(f"averaged weight {name}: expected {tuple(own.shape)}, found {shape}")
            self.average[name] = placed_like(found, own)
        self.updates = updates


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules()
        if isinstance(module, MaskedBatchNorm) and any(p.requires_grad for p in module.parameters())
        for name, buffer in module.named_buffers(recurse=False)
    }
