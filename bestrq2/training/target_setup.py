"""Before the first step: a seed of the targets chosen among many, projections and codes fitted, a teacher noted."""

import logging

import torch
from torch import Tensor

from bestrq2.config import Config
from bestrq2.data import CropDataset, batches
from bestrq2.errors import TrainingError
from bestrq2.hashing import mix
from bestrq2.interchange.opening import open_teacher
from bestrq2.layers.padding import length_mask
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.target_fitting import code_entropy
from bestrq2.models import BestRQ, BestRQ2, ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.models.build import build_quantizer
from bestrq2.models.teacher import Teacher

from .distributed import Ranks

logger = logging.getLogger(__name__)

SAMPLE_BATCH = 16  # clips


def settle_targets(config: Config, dataset: CropDataset, device: torch.device) -> Config:
    """Record the teacher's digest, and choose the seed where there are candidates.

    Candidate 0 is ``model.targets.seed`` itself, the others are hashes of it. Each is fitted as the run's own targets
    will be; the one with the highest entropy of codes over the first ``fit_clips`` clips becomes
    ``model.targets.seed``.

    Raises:
        ConfigError: if the teacher cannot be opened or is another one than the configuration records.
        TrainingError: if the targets cannot be fitted.
    """
    targets = config.model.targets
    teacher = open_teacher(config)
    if teacher is not None:
        targets.digest = teacher.digest()
        logger.info(f"Teacher: {targets.encoder}, {_layer_name(teacher)}, digest {targets.digest[:16]}")
    if targets.seed_candidates == 1:
        return config
    encoder = build_encoder(config.model, config.data.crop_seconds).to(device)
    first = build_quantizer(targets, encoder.patch_dim if teacher is None else teacher.width)
    sample = sample_values(config, dataset, encoder, first, teacher, device)
    candidates = [targets.seed, *(mix(targets.seed, number) >> 33 for number in range(1, targets.seed_candidates))]
    entropies = {}
    for seed in candidates:
        targets.seed = seed
        quantizer = build_quantizer(targets, first.patch_dim)
        _fit(quantizer, sample)
        entropies[seed] = code_entropy(_codes(quantizer, sample, device), targets.codebook_size)
    targets.seed = max(entropies, key=lambda seed: entropies[seed])
    targets.seed_candidates = 1
    values = sorted(entropies.values())
    logger.info(
        f"Targets: seed {targets.seed} of {len(values)} candidates, {values[-1]:.2f} bits of code entropy "
        f"(lowest {values[0]:.2f}, median {values[len(values) // 2]:.2f}) over {len(sample)} patches"
    )
    return config


def fit_targets(
    model: BestRQ2 | BestRQ, config: Config, dataset: CropDataset, device: torch.device, ranks: Ranks
) -> None:
    """Fit the quantizer of a new model, if it is to be fitted, on the first rank; all get the same tensors.

    Raises:
        TrainingError: if the sample does not suffice, on every rank.
    """
    if not model.quantizer.needs_fit:
        return

    def fitted() -> dict[str, Tensor]:
        quantizer = model.quantizer
        sample = sample_values(config, dataset, model.encoder.to(device), quantizer, model.teacher, device)
        _fit(quantizer, sample)
        entropy = code_entropy(_codes(quantizer, sample, device), quantizer.codebook_size)
        logger.info(
            f"Targets: fitted to {len(sample)} patches, {entropy:.2f} bits of code entropy ({quantizer.extra_repr()})"
        )
        return {name: tensor.cpu() for name, tensor in quantizer.state_dict().items()}

    model.quantizer.load_state_dict(ranks.from_first(fitted))


@torch.no_grad()
def sample_values(
    config: Config,
    dataset: CropDataset,
    encoder: ViTEncoder | ConformerEncoder,
    quantizer: RandomProjectionQuantizer,
    teacher: Teacher | None,
    device: torch.device,
) -> Tensor:
    """Normalised patches, or a teacher's features, of the first ``model.targets.fit_clips`` clips of the training
    order: ``(S, P)`` float32 on the CPU."""
    clips = config.model.targets.fit_clips
    size = min(SAMPLE_BATCH, clips)
    parts = []
    for batch in batches(dataset, size, num_steps=-(-clips // size), workers=0):
        waveform = batch.waveform.to(device)
        patches = encoder.patches(waveform, batch.lengths)
        values = patches.values if teacher is None else teacher.features(waveform, batch.lengths, patches)
        normalised = quantizer.normalise(values.to(quantizer.mean.device), patches.lengths).cpu()
        inside = length_mask(patches.lengths, normalised.shape[1], normalised.device)
        parts.append(normalised[inside])
    return torch.cat(parts)


def _fit(quantizer: RandomProjectionQuantizer, sample: Tensor) -> None:
    try:
        quantizer.fit(sample)
    except ValueError as error:
        raise TrainingError(
            f"model.targets cannot be fitted: {error}. Raise model.targets.fit_clips, or take a smaller codebook_size, "
            "codebook_dim or num_codebooks."
        ) from error


def _codes(quantizer: RandomProjectionQuantizer, sample: Tensor, device: torch.device) -> Tensor:
    """Codes ``(S, G)`` on the CPU of normalised patches."""
    return quantizer.to(device).codes_of_normalised(sample.to(device)).cpu()


def _layer_name(teacher: Teacher) -> str:
    return "final output" if teacher.layer is None else f"output of block {teacher.layer}"
