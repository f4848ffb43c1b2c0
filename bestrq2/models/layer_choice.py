"""Choice of layers of an encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_layers(layers: Sequence[int | None] | None, depth: int) -> list[int | None]:
    """``layers``, or the default: every block and the final output (None).

    Raises:
        ValueError: for none at all, or one outside 0..depth-1.
    """
    chosen = [*range(depth), None] if layers is None else list(layers)
    if not chosen:
        raise ValueError("expected at least one layer, got none")
    for layer in chosen:
        if layer is not None and not 0 <= layer < depth:
            expected = f"0..{depth - 1}" if depth else "None alone (this encoder shows no layers)"
            raise ValueError(f"layer must lie in {expected}, got {layer}")
    return chosen


def block_list(wanted: Sequence[int | None]) -> list[Tensor] | None:
    """List to collect block outputs in, or None if none is wanted: they take memory."""
    return None if set(wanted) == {None} else []


def choose_layers(output: Tensor, blocks: list[Tensor] | None, wanted: Sequence[int | None]) -> Tensor:
    """The wanted ones of block outputs and final output ``(B, T, D)``, stacked: ``(L, B, T, D)``."""
    return torch.stack([output if layer is None or blocks is None else blocks[layer] for layer in wanted])
