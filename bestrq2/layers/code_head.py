"""The classifier of the codes at masked positions, with its loss."""

import torch
from torch import Tensor, nn

from bestrq2 import ops


class CodeHead(nn.Module):
    """Linear head on masked positions and its cross-entropy, one classifier per codebook, never storing all logits.

    Shapes:
        hidden ``(B, Np, D)``, codes ``(B, Np, G)``, valid ``(B, Np)`` bool or None
        -> loss (mean over codebooks of the mean over valid rows) and top-1 accuracy, 0-d float32.
    """

    def __init__(self, width: int, codebook_size: int, num_codebooks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_codebooks, codebook_size, width))
        self.bias = nn.Parameter(torch.zeros(num_codebooks, codebook_size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, hidden: Tensor, codes: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        most = None if valid is None else valid.numel()  # padding is all that is left out, so nearly every row counts
        loss, accuracies = ops.masked_cross_entropy(
            hidden,
            self.weight,
            codes,
            mask=valid,
            bias=self.bias,
            ignore_index=None,
            return_accuracy=True,
            max_rows=most,
        )
        return loss, accuracies.mean()

    def predictions(self, hidden: Tensor) -> Tensor:
        """Most likely codes ``(..., G)``, for inspection."""
        return torch.stack([(hidden @ w.T + b).argmax(-1) for w, b in zip(self.weight, self.bias)], dim=-1)

    def flops(self, rows: float) -> float:
        return 2.0 * rows * self.weight.numel()
