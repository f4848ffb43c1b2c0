"""Code usage before any training: random targets can start collapsed."""

import logging

import torch

from bestrq2.config import Config
from bestrq2.data import CropDataset, batches
from bestrq2.layers.code_usage import CodeUsage
from bestrq2.layers.padding import length_mask
from bestrq2.models import BestRQ, BestRQ2

from .open_data import FIRST_LOOK_CLIPS

logger = logging.getLogger(__name__)


@torch.no_grad()
def first_look(model: BestRQ2 | BestRQ, dataset: CropDataset, config: Config, device: torch.device) -> CodeUsage:
    """Code usage of the targets over the first clips of the training data, with a warning of clips without a target."""
    usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size, decay=1.0).to(device)
    batch_size = min(16, config.train.batch_size)
    clips = without = 0
    for batch in batches(dataset, batch_size, num_steps=max(1, FIRST_LOOK_CLIPS // batch_size), workers=0):
        waveform = batch.waveform.to(device)
        patches = model.encoder.patches(waveform, batch.lengths)
        codes = model.target_codes(waveform, batch.lengths, patches)
        usage.update(codes, length_mask(patches.lengths, codes.shape[1], device))
        clips += len(batch)
        without += sum(model.num_predicted(length, 0) == 0 for length in batch.lengths.split(1))
    if without:
        logger.warning(
            f"{without} of the first {clips} clips are a single patch, of which nothing is masked: they teach nothing. "
            "data.min_seconds leaves such clips out, data.join_short=true joins them"
        )
    return usage


def describe_targets(look: CodeUsage, model: BestRQ2 | BestRQ) -> None:
    """Log what the targets use, and advice if it is little."""
    found, size = look.metrics(), model.quantizer.codebook_size
    logger.info(
        f"Targets: {found['codes_used']:.0f} of {size} codes used by {float(look.total):.0f} patches, "
        f"perplexity {found['perplexity']:.1f}, commonest code {found['unigram']:.1%}"
    )
    quantizer, front_end = model.quantizer, getattr(model.encoder, "front_end", None)
    raw = front_end is None or not (front_end.mean.any() or (front_end.std != 1).any())
    advice = look.advice(quantizer.normalize, quantizer.projection_kind, measured=raw and model.teacher is None)
    if advice is not None:
        logger.warning("%s", advice)
