"""A target for whole clips: the pooled context predicts which codes the hidden patches have, in any order."""

import torch
from torch import Tensor, nn

from bestrq2.layers.padding import valid_mask
from bestrq2.layers.precision import wide


class ClipHead(nn.Module):
    """Linear head on the mean of the seen tokens' features, one classifier per codebook.

    Its target is the distribution of the codes of the clip's masked patches, so nothing that it has to know was seen.
    The loss is the mean over masked patches of ``-log p(code | clip)``: the cross-entropy with that distribution, every
    clip weighted by its masked patches, as in the loss on patches. It adds up over micro-batches and ranks alike.

    (EAT, Chen et al. 2024, found +1.3 mAP from one such global loss of weight 1; its target is the teacher's mean
    feature, which frozen codes do not have.)

    Shapes:
        context ``(B, Ns, D)`` with ``seen_lengths (B,)`` valid tokens on the CPU, codes ``(B, Np, G)``, valid
        ``(B, Np)`` bool or None -> loss, 0-d float32.
    """

    def __init__(self, width: int, codebook_size: int, num_codebooks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_codebooks, codebook_size, width))
        self.bias = nn.Parameter(torch.zeros(num_codebooks, codebook_size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, context: Tensor, seen_lengths: Tensor, codes: Tensor, valid: Tensor | None) -> Tensor:
        with torch.autocast(context.device.type, enabled=False):
            pooled = _mean(wide(context), seen_lengths)
            logits = torch.einsum("bd,gvd->bgv", pooled, self.weight.to(pooled.dtype)) + self.bias
            own = logits.log_softmax(-1).gather(-1, codes.transpose(1, 2))  # (B, G, Np)
        if valid is None:
            return -own.mean() if own.numel() else own.sum()
        # Where no clip has a masked patch, the loss is 0 rather than 0 / 0.
        counted = valid[:, None]
        return -torch.where(counted, own, 0).sum() / (counted.sum().clamp(min=1) * own.shape[1])

    def flops(self) -> float:
        """Matrix-product operations of one forward pass over one clip."""
        return 2.0 * self.weight.numel()


def _mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Mean ``(B, D)`` of the first ``lengths (B,)`` of ``tokens (B, N, D)``."""
    inside = valid_mask(lengths, tokens.shape[1], tokens.device)
    if inside is None:
        return tokens.mean(1)
    count = lengths.clamp(min=1).to(tokens.device, non_blocking=True)[:, None]
    return torch.where(inside[..., None], tokens, 0).sum(1) / count
