"""A linear classifier together with its masked cross-entropy, as a module."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bestrq2 import ops
from bestrq2.ops.common.arguments import integer


class LinearMaskedCrossEntropy(nn.Module):
    """``cross_entropy(linear(hidden), targets)`` over the masked rows, without storing the logits.

    Replaces an ``nn.Linear`` and the loss behind it; weight and bias have the names, shapes and initial values of that
    layer, so its state dict loads. See :func:`bestrq2.ops.masked_cross_entropy` for the loss.

    Args:
        in_features: D, width of a row.
        num_classes: V.
        bias: whether the classifier has one.
        num_codebooks: G classifiers on the same rows: weight ``(G, V, D)``, bias ``(G, V)``. None: one, ``(V, D)``.
        ignore_index, reduction, label_smoothing, z_loss, recompute: of :func:`bestrq2.ops.masked_cross_entropy`.
        device, dtype: of the parameters.

    Shapes:
        hidden ``(..., D)``, targets ``(...)`` or ``(..., G)`` integers, mask ``(...)`` bool or row weights
        -> 0-d loss, or one like targets for reduction "none"

    Example:
        >>> head = LinearMaskedCrossEntropy(64, 512)
        >>> head(torch.randn(2, 50, 64), torch.randint(512, (2, 50)), mask=torch.rand(2, 50) < 0.5).shape
        torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        num_codebooks: int | None = None,
        ignore_index: int | None = -100,
        reduction: Literal["mean", "sum", "none"] = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        recompute: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        books = () if num_codebooks is None else (integer("num_codebooks", num_codebooks, 1),)
        shape = (*books, integer("num_classes", num_classes, 1), integer("in_features", in_features, 1))
        self.ignore_index, self.reduction, self.recompute = ignore_index, reduction, recompute
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[:-1], device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``nn.Linear`` does; after ``to_empty`` they hold anything."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, hidden: Tensor, targets: Tensor, mask: Tensor | None = None, *, return_accuracy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss, with ``return_accuracy`` also the top-1 accuracy of the masked rows."""
        return ops.masked_cross_entropy(
            hidden,
            self.weight,
            targets,
            mask=mask,
            bias=self.bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            return_accuracy=return_accuracy,
            recompute=self.recompute,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """``(..., V)``, or ``(..., G, V)`` with several codebooks: for inference, where they are wanted."""
        if self.weight.dim() == 2:
            return F.linear(hidden, self.weight, self.bias)
        logits = F.linear(hidden, self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten())
        return logits.unflatten(-1, self.weight.shape[:2])

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, bias={self.bias is not None}, reduction={self.reduction!r}"
