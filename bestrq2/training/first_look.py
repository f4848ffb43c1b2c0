"""Code usage before any training: random targets can start collapsed."""

import torch

from bestrq2.config import Config
from bestrq2.data import CropDataset, batches
from bestrq2.layers.code_usage import CodeUsage
from bestrq2.models import BestRQ, BestRQ2

from .open_data import FIRST_LOOK_CLIPS


@torch.no_grad()
def first_look(model: BestRQ2 | BestRQ, dataset: CropDataset, config: Config, device: torch.device) -> CodeUsage:
    """Code usage of the targets over the first clips of the training data."""
    usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size, decay=1.0).to(device)
    batch_size = min(16, config.train.batch_size)
    for batch in batches(dataset, batch_size, num_steps=max(1, FIRST_LOOK_CLIPS // batch_size), workers=0):
        waveform = batch.waveform.to(device)
        patches = model.encoder.patches(waveform, batch.lengths)
        codes = model.target_codes(waveform, batch.lengths, patches)
        inside = torch.arange(codes.shape[1]) < patches.lengths[:, None]
        usage.update(codes, inside.to(device))
    return usage
