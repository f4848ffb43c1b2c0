"""From the configuration to the training data: find it, report it, measure its statistics."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from bestrq2.config import Config, ConfigError
from bestrq2.data import BucketDataset, CropDataset, Skip, batches, collect, tiny_dataset
from bestrq2.data.cache_build import open_cache
from bestrq2.data.files import ARCHIVES
from bestrq2.errors import TrainingError, counted, printable, system_reason
from bestrq2.models import build_encoder
from bestrq2.training.statistics import measure_statistics

logger = logging.getLogger(__name__)

FIRST_LOOK_CLIPS = 64


def open_dataset(config: Config, purpose: str = "Data", split: str = "train") -> CropDataset:
    """Find the audio and say, under the name ``purpose``, what was found and what was left out."""
    data, front = config.data, config.model.front_end
    shortest = (config.model.encoder.frames_per_token - 1) * front.hop_length / front.sampling_rate
    min_seconds = max(shortest, data.min_seconds or 0.0)
    left_out: list[Skip] = []
    if data.source is None:
        files = tiny_dataset()
        logger.info(f"{purpose}: the {len(files)} clips shipped with bestrq2 (use --data FOLDER for your own)")
    else:
        files, report = collect(data.source, min_seconds=min_seconds, progress=sys.stderr.isatty(), split=split)
        name = data.source if isinstance(data.source, str) else ", ".join(data.source)
        hours = sum(file.duration or 0.0 for file in files) / 3600
        logger.info(f"{purpose}: {counted(len(files), 'file')}, {hours:.2f} h from {name}")
        for note in report.notes:
            logger.info(f"note: {note}")
        left_out = report.skips
        if report.skips:
            logger.warning("\n  ".join([str(report), *report.examples()]))
        if unused := {suffix: report.ignored[suffix] for suffix in sorted(ARCHIVES) if report.ignored[suffix]}:
            counts = ", ".join(f"{number} {suffix}" for suffix, number in unused.items())
            logger.info(f"note: ignored {counts} next to audio files; pass them explicitly to use them")
    common: dict[str, Any] = {
        "seed": config.train.seed,
        "min_seconds": min_seconds,
        "domain_weights": data.domain_weights,
    }
    if data.cache is not None:
        make_folder("data.cache", data.cache)
        cache, found = open_cache(data.cache, files, front.sampling_rate, progress=sys.stderr.isatty())
        logger.info(f"Cache: {found}")
        common["cache"] = cache
    try:
        if data.batching == "buckets":
            # Per unit of batch size: a first look or a micro-step of fewer samples then has as much less audio.
            row = None if data.batch_seconds is None else data.batch_seconds / config.train.batch_size
            dataset: CropDataset = BucketDataset(
                files, data.crop_seconds, front.sampling_rate, row_seconds=row, **common
            )
        else:
            dataset = CropDataset(files, data.crop_seconds, front.sampling_rate, join_short=data.join_short, **common)
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    dataset.left_out = left_out
    return dataset


def make_folder(key: str, folder: str) -> None:
    """Make the folder that a key of the configuration names.

    Raises:
        ConfigError: if it cannot be made, as the old place of a run that was moved.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder {printable(folder)} cannot be made: {system_reason(error)}"
        raise ConfigError(f"{key}: {what}; {key}=FOLDER names another one") from error


def fill_statistics(config: Config, dataset: CropDataset) -> Config:
    """Measure mean and deviation where "global" normalisation asks for them and the recipe gives none."""
    front, targets = config.model.front_end, config.model.targets
    if front.normalize == "global" and targets.normalize == "global":
        raise ConfigError(
            "model.targets.normalize: expected none, patch or utterance (model.front_end.normalize=global already "
            "standardises the patches), got 'global'"
        )
    section = front if front.normalize == "global" else targets if targets.normalize == "global" else None
    if section is None or (section.mean is not None and section.std is not None):
        return config
    plain = build_encoder(config.model).front_end
    batch_size = min(8, config.train.batch_size)
    sample = batches(dataset, batch_size, num_steps=FIRST_LOOK_CLIPS // batch_size, workers=0)
    try:
        measured = measure_statistics(plain, sample, torch.device("cpu"))
    except ValueError as error:
        raise TrainingError(f"statistics for global normalisation: {error}") from error
    section.mean, section.std = round(measured.mean, 4), round(measured.std, 4)
    logger.info(f"Statistics: mean {section.mean:.2f} dB, deviation {section.std:.2f} dB over {measured.clips} clips")
    return config
