"""Open a trained encoder from a run or checkpoint folder."""

from pathlib import Path

import torch

from bestrq2.checkpoint import find_checkpoint
from bestrq2.config import config_from_dict

from .build import build_encoder, load_weights
from .conformer import ConformerEncoder
from .vit import ViTEncoder


def load(
    path: str | Path, *, device: str | torch.device = "cpu", published_positions: bool = False
) -> ViTEncoder | ConformerEncoder:
    """Load the encoder of a run, frozen and in evaluation mode.

    Args:
        path: a run folder (its newest intact checkpoint is used) or a ``step-*`` folder.
        device: where to put it.
        published_positions: see :class:`ViTEncoder`.

    Raises:
        CheckpointError: if there is no intact checkpoint.
        ConfigError: if its tensors do not fit its configuration, naming the first mismatch.
    """
    checkpoint = find_checkpoint(Path(path))
    config = config_from_dict(checkpoint.config)
    encoder = build_encoder(config.model, config.data.crop_seconds, published_positions, config.train.seed)
    prefix = "encoder."
    weights = {name[len(prefix) :]: tensor for name, tensor in checkpoint.weights().items() if name.startswith(prefix)}
    load_weights(encoder, weights, checkpoint.folder)
    return encoder.to(device).eval().requires_grad_(False)
