"""Training a head on a frozen encoder: embeddings are cached once, then only the head is trained."""

import json
import logging
import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bestrq2.config import Config, ConfigError
from bestrq2.data import Batch, CropDataset
from bestrq2.data.fingerprint import data_identity
from bestrq2.errors import BestRQError
from bestrq2.hardware import choose_device
from bestrq2.hashing import mix
from bestrq2.interchange import load
from bestrq2.interchange.tensors import module_digest
from bestrq2.models.build import build_masking
from bestrq2.models.frozen import FrozenHead
from bestrq2.runs.checkpoint import Checkpoint
from bestrq2.runs.folder import RunFolder

from .distributed import Ranks
from .embedding_cache import EmbeddingCache, build_cache
from .embedding_data import EmbeddingDataset
from .interrupt import StopSignal
from .open_data import make_folder
from .trainer import Trainer

logger = logging.getLogger(__name__)


def build_head(config: Config, input_dim: int) -> FrozenHead:
    """The head that a configuration describes; its weights are a function of ``train.seed``."""
    torch.manual_seed(mix(config.train.seed, 1) >> 1)
    targets = config.model.targets
    masking = build_masking(config.model.masking, config.train.seed)
    if masking.dispersion and not config.frozen.every_frame:
        raise ConfigError("model.masking.dispersion: expected 0 with --frozen-encoder, which has no log-mel patches")
    masked = None if config.frozen.every_frame else masking
    try:
        return FrozenHead(input_dim, config.model.predictor, targets.codebook_size, targets.num_codebooks, masked)
    except ValueError as error:
        raise ConfigError(f"model.predictor: {error}") from error


def open_frozen(config: Config) -> nn.Module:
    """The encoder that ``--frozen-encoder`` names; see :func:`bestrq2.load`."""
    return load(config.frozen.source or "", trust_remote_code=config.frozen.trust_remote_code)


def check_encoder(config: Config, checkpoint: Checkpoint) -> None:
    """Refuse to resume a run with another encoder.

    Raises:
        ConfigError: if its weights are not those that the run began with, or it is gone.
    """
    source = config.frozen.source or ""
    try:
        encoder = open_frozen(config)
    except BestRQError as error:
        file, python, _ = source.rpartition(".py:")
        if os.path.exists(f"{file}.py" if python else source):
            raise
        raise ConfigError(f"{error}. If it was moved, name the new place: --frozen-encoder PLACE") from error
    if checkpoint.extra.get("encoder_sha256") != module_digest(encoder):
        raise ConfigError(
            f"frozen.source: {config.frozen.source} is not the encoder that this run began with (its weights differ)"
        )


class HeadTrainer(Trainer):
    """Trains a head on the cached embeddings of a frozen encoder, in the loop of pretraining.

    At the end the encoder is opened again, to show that it is what it was.
    """

    def __init__(
        self,
        config: Config,
        dataset: EmbeddingDataset,
        run: RunFolder,
        ranks: Ranks,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.digest = dataset.cache.digest
        # Settings as another version of a library has them may differ in name alone: no reason to refuse.
        settings = dataset.cache.settings
        before = "" if checkpoint is None else checkpoint.extra.get("encoder_settings", "")
        if ranks.is_first and before not in ("", settings):
            logger.warning(
                f"frozen.source: {config.frozen.source} has the weights that this run began with, but its settings or "
                "code, or the versions of its libraries, have changed: its embeddings may be others"
            )
        # Neither pictures nor health of an encoder: a head has none.
        measured = replace(config, train=replace(config.train, pictures_every=0, health_every=0))
        super().__init__(config, build_head(config, dataset.cache.width), dataset, run, ranks, checkpoint, measured)

    def _stream(self, start_step: int, num_steps: int) -> Generator[Batch, None, None]:
        return self.dataset.batches(self.settings.batch_size, start_step, num_steps, self.ranks.rank, self.ranks.size)

    def _identity(self) -> dict[str, Any]:
        encoder = {"encoder_sha256": self.digest, "encoder_settings": self.dataset.cache.settings}
        return data_identity(self.dataset.source) | encoder

    def _about(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return (
            f"Frozen encoder: {self.config.frozen.source}, sha256 {self.digest[:16]}; {len(self.dataset)} windows; "
            f"head {trained:,} parameters"
        )

    def _first_look(self) -> None:
        """Nothing to measure: the head has no encoder, and its targets are in the cache."""

    def _finish(self, stop: StopSignal | None) -> int:
        code = super()._finish(stop)
        if stop is not None:
            return code
        source = self.config.frozen.source
        after = module_digest(open_frozen(self.config))
        if after != self.digest:
            raise ConfigError(f"frozen.source: {source} changed on disk during the run (sha256 {after[:16]})")
        proof = {"source": source, "sha256_before": self.digest, "sha256_after": after}
        (self.run.path / "frozen.json").write_text(json.dumps(proof, indent=1) + "\n")
        logger.info(f"The weights of the encoder are unchanged (sha256 {after[:16]})")
        return code


def train_head(
    config: Config,
    dataset: CropDataset,
    run: RunFolder,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    write: bool = False,
) -> int:
    """Cache the embeddings, train a head on them, and show that the encoder is what it was. Returns the exit code.

    With ``write`` the configuration goes to the run folder, once the encoder is known to be the run's own.
    """
    device = choose_device(config.train.device, ranks.local_rank)
    root = Path(config.frozen.cache) if config.frozen.cache else run.path / "embeddings"
    if checkpoint is not None:  # before embeddings are computed and written
        ranks.all_agree(lambda: check_encoder(config, checkpoint))

    def cache(quiet: bool = False) -> EmbeddingCache:
        if config.frozen.cache:
            make_folder("frozen.cache", config.frozen.cache)
        return build_cache(root, config, dataset.files, open_frozen(config), device, quiet)

    if ranks.size > 1:  # the first rank makes the cache, and all of them find it complete
        ranks.from_first(lambda: len(cache()))
    embeddings = ranks.all_agree(lambda: cache(quiet=ranks.size > 1))
    for skip in embeddings.skips if ranks.is_first else ():
        logger.warning(f"skipped {skip}")
    trainer = HeadTrainer(config, EmbeddingDataset(embeddings, dataset, config), run, ranks, checkpoint)
    if write:
        ranks.from_first(lambda: run.write_config(config))
    return trainer.train()
