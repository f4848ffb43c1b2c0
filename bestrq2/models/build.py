"""From configuration to model, and from a checkpoint folder to an encoder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bestrq2.config import (
    Config,
    ConfigError,
    EncoderConfig,
    MaskingConfig,
    ModelConfig,
    TargetsConfig,
    TransformerConfig,
)
from bestrq2.hashing import mix
from bestrq2.layers.chunk_sampling import ChunkSampler, SpeechBrainChunks, WeNetChunks
from bestrq2.layers.conformer import ConformerSettings
from bestrq2.layers.log_mel import LogMel
from bestrq2.layers.masking import RandomMasking
from bestrq2.layers.mixing import PairMixing
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.transformer import TransformerSettings
from bestrq2.ops import ChunkLayout

from .best_rq2 import BestRQ, BestRQ2
from .conformer import ConformerEncoder
from .teacher import Teacher
from .vit import ViTEncoder


def transformer_settings(config: TransformerConfig) -> TransformerSettings:
    names = TransformerConfig.__dataclass_fields__
    return TransformerSettings(**{name: value for name, value in asdict(config).items() if name in names})


def build_encoder(
    config: ModelConfig, window_seconds: float = 10.0, published_positions: bool = False, seed: int = 0
) -> ViTEncoder | ConformerEncoder:
    """The encoder alone, as it is used after pretraining. ``seed`` is that of the random chunks of training."""
    front = config.front_end
    normalized = front.normalize == "global" and front.mean is not None and front.std is not None
    log_mel = LogMel(
        front.sampling_rate,
        front.n_fft,
        front.win_length,
        front.hop_length,
        front.num_mels,
        front.f_min,
        front.f_max,
        mean=front.mean if normalized else 0.0,  # type: ignore[arg-type]
        std=front.std if normalized else 1.0,  # type: ignore[arg-type]
    )
    if config.encoder.kind == "conformer":
        return _conformer(config.encoder, log_mel, seed)
    return ViTEncoder(
        log_mel,
        config.encoder.patch_height,
        config.encoder.patch_width,
        transformer_settings(config.encoder),
        config.encoder.position,  # type: ignore[arg-type]
        window_seconds,
        published_positions,
        config.encoder.activation_checkpointing,
    )


def _conformer(config: EncoderConfig, log_mel: LogMel, seed: int) -> ConformerEncoder:
    own = config.conformer
    settings = ConformerSettings(
        config.width,
        config.depth,
        config.heads,
        config.hidden,
        own.kernel_size,
        own.conv_mode,  # type: ignore[arg-type]
        own.conv_norm,  # type: ignore[arg-type]
        own.activation,  # type: ignore[arg-type]
        config.bias,
        config.dropout,
        config.drop_path,
    )
    layout = ChunkLayout(own.chunk_size, own.left_context)
    sampler: ChunkSampler | None = None
    if own.chunk_training == "speechbrain":
        sampler = SpeechBrainChunks(seed=seed)
    elif own.chunk_training == "wenet":
        sampler = WeNetChunks(seed=seed)
    checkpointing = config.activation_checkpointing
    return ConformerEncoder(log_mel, settings, tuple(own.channels), layout, sampler, checkpointing)


def build_quantizer(targets: TargetsConfig, width: int) -> RandomProjectionQuantizer:
    """The quantizer of targets of ``width`` values; random until it is fitted, if it has to be."""
    return RandomProjectionQuantizer(
        width,
        targets.codebook_size,
        targets.codebook_dim,
        targets.num_codebooks,
        targets.normalize,  # type: ignore[arg-type]
        targets.seed,
        mean=targets.mean or 0.0,
        std=1.0 if targets.std is None else targets.std,
        projection=targets.projection,  # type: ignore[arg-type]
        centroid_steps=targets.centroid_steps,
    )


def build_masking(masks: MaskingConfig, seed: int) -> RandomMasking:
    return RandomMasking(
        masks.ratio,
        seed,
        masks.shared_per_batch,
        masks.span_length,
        block_rows=masks.block_rows,
        block_columns=masks.block_columns,
        kept=masks.kept,
        dispersion=masks.dispersion,
    )


def build_model(config: Config, teacher: Teacher | None = None) -> BestRQ2 | BestRQ:
    """The pretraining model that a configuration describes. Weights come from the global generator of torch.

    Args:
        config: the configuration.
        teacher: the encoder that ``model.targets.encoder`` names, opened; see
            :func:`bestrq2.interchange.opening.open_teacher`.

    Raises:
        ConfigError: for sizes that do not fit together, naming them, or a missing teacher.
    """
    model, targets, seed = config.model, config.model.targets, config.train.seed
    if targets.encoder is not None and teacher is None:
        raise ConfigError(
            f"model.targets.encoder: the targets are made by {targets.encoder}, which has to be opened for this model"
        )
    try:
        encoder = build_encoder(model, config.data.crop_seconds, seed=seed)
        quantizer = build_quantizer(targets, encoder.patch_dim if teacher is None else teacher.width)
        masking = build_masking(model.masking, seed)
        mixing = None
        if model.mixing.share:
            mixing = PairMixing(model.mixing.share, model.mixing.level_db, model.mixing.span, mix(seed, 3))
        options: dict[str, Any] = {"teacher": teacher, "mixing": mixing, "clip_weight": model.clip_weight}
        if model.name == "best_rq":
            return BestRQ(encoder, quantizer, masking, model.masking.noise_std, **options)
        return BestRQ2(encoder, quantizer, masking, transformer_settings(model.predictor), **options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def load_weights(model: torch.nn.Module, weights: dict[str, Any], origin: Path | str) -> None:
    """Load ``weights`` strictly.

    Raises:
        ConfigError: naming the first missing, unexpected or wrongly shaped tensor.
    """
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in weights:
            raise ConfigError(f"{origin}: no tensor {name!r} (expected shape {tuple(tensor.shape)})")
        if weights[name].shape != tensor.shape:
            raise ConfigError(
                f"{origin}: tensor {name!r} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            )
    extra = next((name for name in weights if name not in own), None)
    if extra is not None:
        raise ConfigError(f"{origin}: unexpected tensor {extra!r} of shape {tuple(weights[extra].shape)}")
    model.load_state_dict(weights)
