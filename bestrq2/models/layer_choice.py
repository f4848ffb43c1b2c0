"""Choice of layers of an encoder."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

# Output of a block; the final output, by either name; what enters the first block.
Layer = int | None | Literal["final", "embeddings"]


def check_layers(layers: Sequence[Layer] | None, depth: int, embeddings: bool = False) -> list[Layer]:
    """``layers``, or the default: every block and the final output (None, or "final" in ``layers``). ``embeddings``:
    these may be chosen, too.

    Raises:
        ValueError: for none at all, or one outside 0..depth-1.
    """
    chosen: list[Layer] = [*range(depth), None] if layers is None else [None if n == "final" else n for n in layers]
    if not chosen:
        raise ValueError("expected at least one layer, got none")
    for layer in chosen:
        if layer is None or (isinstance(layer, int) and 0 <= layer < depth) or (embeddings and layer == "embeddings"):
            continue
        expected = f"0..{depth - 1}" if depth else "None alone (this encoder shows no layers)"
        raise ValueError(f"layer must lie in {expected}, got {layer}")
    return chosen


def block_list(wanted: Sequence[Layer]) -> list[Tensor] | None:
    """List to collect block outputs in, or None if none is wanted: they take memory."""
    return [] if any(isinstance(layer, int) for layer in wanted) else None


def choose_layers(output: Tensor, blocks: list[Tensor] | None, wanted: Sequence[Layer], embeddings: Tensor) -> Tensor:
    """The wanted ones of final output, block outputs and embeddings ``(B, T, D)``, stacked: ``(L, B, T, D)``."""
    found: dict[Layer, Tensor] = {None: output, "embeddings": embeddings, **dict(enumerate(blocks or ()))}
    return torch.stack([found[layer] for layer in wanted])
