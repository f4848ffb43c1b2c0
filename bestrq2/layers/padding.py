"""Masks of padded batches: the entries that belong to a clip."""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, size: int, device: torch.device) -> Tensor:
    """``(B, size)`` bool on ``device``: the first ``lengths[b]`` entries."""
    queued = lengths.device.type == "cpu"  # from a GPU the copy would be read before it has arrived
    return torch.arange(size, device=device) < lengths.to(device, non_blocking=queued)[:, None]


def valid_mask(lengths: Tensor, size: int, device: torch.device) -> Tensor | None:
    """:func:`length_mask`, or None when it marks all entries."""
    return None if bool((lengths == size).all()) else length_mask(lengths, size, device)
