"""From configuration to model, and from a checkpoint folder to an encoder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bestrq2.config import Config, ConfigError, ModelConfig, TransformerConfig
from bestrq2.layers.log_mel import LogMel
from bestrq2.layers.masking import RandomMasking
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.transformer import TransformerSettings

from .best_rq2 import BestRQ, BestRQ2
from .vit import ViTEncoder


def _settings(config: TransformerConfig) -> TransformerSettings:
    names = TransformerConfig.__dataclass_fields__
    return TransformerSettings(**{name: value for name, value in asdict(config).items() if name in names})


def build_encoder(config: ModelConfig, window_seconds: float = 10.0, published_positions: bool = False) -> ViTEncoder:
    """The encoder alone, as it is used after pretraining."""
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
    return ViTEncoder(
        log_mel,
        config.encoder.patch_height,
        config.encoder.patch_width,
        _settings(config.encoder),
        config.encoder.position,  # type: ignore[arg-type]
        window_seconds,
        published_positions,
        config.encoder.activation_checkpointing,
    )


def build_model(config: Config) -> BestRQ2 | BestRQ:
    """The pretraining model that a configuration describes. Weights come from the global generator of torch.

    Raises:
        ConfigError: for sizes that do not fit together, naming them.
    """
    model, targets = config.model, config.model.targets
    try:
        encoder = build_encoder(model, config.data.crop_seconds)
        quantizer = RandomProjectionQuantizer(
            encoder.patch_dim,
            targets.codebook_size,
            targets.codebook_dim,
            targets.num_codebooks,
            targets.normalize,  # type: ignore[arg-type]
            targets.seed,
            mean=targets.mean or 0.0,
            std=1.0 if targets.std is None else targets.std,
        )
        masking = RandomMasking(model.masking.ratio, config.train.seed, model.masking.shared_per_batch)
        if model.name == "best_rq":
            return BestRQ(encoder, quantizer, masking)
        return BestRQ2(encoder, quantizer, masking, _settings(model.predictor))
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
