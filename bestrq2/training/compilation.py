"""torch.compile of encoder and predictor blocks: when, and once for all layers and lengths.

Measured (docs/benchmarks.md, "Training step"): on CPUs the passes of layers/block_rows.py are faster than what inductor
makes of the plain formulas, and nothing waits for a compiler. On GPUs the plain formulas would be some 700 kernels a
step, so blocks are compiled there.
"""

from typing import Any

import torch
from torch import nn

from bestrq2.layers.conformer import Conformer, ConformerBlock
from bestrq2.layers.transformer import Block, Transformer


def compiles(setting: bool | None, device: torch.device) -> bool:
    """``train.compile``; None: on CUDA devices only."""
    return device.type == "cuda" if setting is None else setting


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile every block in place. All blocks of a width share one compilation: their forward passes hold no constants
    of their own. Only the number of tokens is dynamic. ``options`` are those of torch.compile."""
    for module in model.modules():
        if isinstance(module, (Block, ConformerBlock)):
            module.compile(**options)
        elif isinstance(module, (Transformer, Conformer)):
            module.compiled = True
