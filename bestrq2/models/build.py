"""From configuration to model, and from a checkpoint folder to an encoder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq2.config import Config, ConfigError, EncoderConfig, MaskingConfig, ModelConfig, TargetsConfig
from bestrq2.errors import counted
from bestrq2.hashing import mix
from bestrq2.layers.chunk_sampling import ChunkSampler, SpeechBrainChunks, WeNetChunks
from bestrq2.layers.conformer import ConformerSettings
from bestrq2.layers.log_mel import LogMel
from bestrq2.layers.masking import RandomMasking
from bestrq2.layers.mixing import PairMixing
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.ops import ChunkLayout

from .best_rq2 import BestRQ, BestRQ2
from .conformer import ConformerEncoder
from .teacher import Teacher
from .vit import ViTEncoder


@contextmanager
def _named_settings() -> Iterator[None]:
    """Tell what layers refuse as a fault of the configuration, of which they are the settings."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


@_named_settings()
def build_encoder(
    config: ModelConfig, window_seconds: float = 10.0, published_positions: bool = False, seed: int = 0
) -> ViTEncoder | ConformerEncoder:
    """The encoder alone, as it is used after pretraining. ``seed`` is that of the random chunks of training.

    Raises:
        ConfigError: for sizes that do not fit together, naming them.
    """
    front, own = config.front_end, config.encoder
    mean, std = 0.0, 1.0
    if front.normalize == "global" and front.mean is not None and front.std is not None:
        mean, std = front.mean, front.std
    log_mel = LogMel(
        sampling_rate=front.sampling_rate,
        n_fft=front.n_fft,
        win_length=front.win_length,
        hop_length=front.hop_length,
        num_mels=front.num_mels,
        f_min=front.f_min,
        f_max=front.f_max,
        mean=mean,
        std=std,
        floor_db=front.floor_db,
    )
    if own.kind == "conformer":
        return _conformer(own, log_mel, seed)
    return ViTEncoder(
        log_mel,
        patch_height=own.patch_height,
        patch_width=own.patch_width,
        transformer=own,
        position=own.position,
        window_seconds=window_seconds,
        published_positions=published_positions,
        activation_checkpointing=own.activation_checkpointing,
        join_rows=own.join_rows,
    )


def _conformer(config: EncoderConfig, log_mel: LogMel, seed: int) -> ConformerEncoder:
    own = config.conformer
    settings = ConformerSettings(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        hidden=config.hidden,
        kernel_size=own.kernel_size,
        conv_mode=own.conv_mode,
        conv_norm=own.conv_norm,
        activation=own.activation,
        bias=config.bias,
        dropout=config.dropout,
        drop_path=config.drop_path,
    )
    layout = ChunkLayout(own.chunk_size, own.left_context)
    sampler: ChunkSampler | None = None
    if own.chunk_training == "speechbrain":
        sampler = SpeechBrainChunks(seed=seed)
    elif own.chunk_training == "wenet":
        sampler = WeNetChunks(seed=seed)
    return ConformerEncoder(
        log_mel,
        settings,
        channels=tuple(own.channels),
        layout=layout,
        chunk_sampler=sampler,
        activation_checkpointing=config.activation_checkpointing,
    )


def build_quantizer(targets: TargetsConfig, width: int) -> RandomProjectionQuantizer:
    """The quantizer of targets of ``width`` values; random until it is fitted, if it has to be."""
    return RandomProjectionQuantizer(
        width,
        codebook_size=targets.codebook_size,
        codebook_dim=targets.codebook_dim,
        num_codebooks=targets.num_codebooks,
        normalize=targets.normalize,
        seed=targets.seed,
        mean=targets.mean or 0.0,
        std=1.0 if targets.std is None else targets.std,
        projection=targets.projection,
        centroid_steps=targets.centroid_steps,
        plain_codebooks=targets.plain_codebooks,
    )


def build_masking(masks: MaskingConfig, seed: int) -> RandomMasking:
    return RandomMasking(
        masks.ratio,
        seed=seed,
        shared_per_batch=masks.shared_per_batch,
        span_length=masks.span_length,
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
    with _named_settings():
        encoder = build_encoder(model, config.data.crop_seconds, seed=seed)
        quantizer = build_quantizer(targets, encoder.patch_dim if teacher is None else teacher.width)
        masking = build_masking(model.masking, seed)
        mixing = None
        if model.mixing.share:
            mixing = PairMixing(model.mixing.share, model.mixing.level_db, model.mixing.span, mix(seed, 3))
        options: dict[str, Any] = {"teacher": teacher, "mixing": mixing, "clip_weight": model.clip_weight}
        if model.name == "best_rq":
            return BestRQ(encoder, quantizer, masking, model.masking.noise_std, **options)
        return BestRQ2(encoder, quantizer, masking, model.predictor, **options)


def load_weights(model: torch.nn.Module, weights: dict[str, Any], origin: Path | str) -> None:
    """Load ``weights`` strictly, in the dtype of the model, and only finite ones.

    Codebooks and the statistics of the front end decide the targets and are never rounded: where a file that was
    converted as a whole has them in half precision, they must be what the model's own are rounded to; these are kept.

    Raises:
        ConfigError: naming the first missing, unexpected or wrongly shaped tensor, one of a wrong dtype, or one that
            is not finite.
    """
    own = model.state_dict()
    exact = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, LogMel | RandomProjectionQuantizer)
        for name, _ in module.named_buffers(recurse=False)
    }
    weights = dict(weights)
    for name, tensor in own.items():
        if name not in weights:
            raise ConfigError(f"{origin}: no tensor {name!r} (expected shape {tuple(tensor.shape)})")
        if weights[name].shape != tensor.shape:
            raise ConfigError(
                f"{origin}: tensor {name!r} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            )
        weights[name] = _checked(weights[name], tensor, name, name in exact, origin)
    extra = next((name for name in weights if name not in own), None)
    if extra is not None:
        raise ConfigError(f"{origin}: unexpected tensor {extra!r} of shape {tuple(weights[extra].shape)}")
    check_finite(weights, origin)
    model.load_state_dict(weights)


def check_finite(weights: Mapping[str, Tensor], origin: Path | str) -> None:
    """Refuse a model that training broke: its features would be no numbers, or not those of the weights that it lost.

    Raises:
        ConfigError: naming the first tensor with NaN or infinite values.
    """
    for name, tensor in weights.items():
        # The extremes are NaN where a value is; they are found 20 times as fast as isfinite() looks at every value.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ConfigError(
                f"{origin}: tensor {name!r} holds NaN or infinity in {count} of {counted(tensor.numel(), 'value')}: "
                "the file is damaged, or its training diverged; use an earlier checkpoint"
            )


def _checked(found: Tensor, own: Tensor, name: str, exact: bool, origin: Path | str) -> Tensor:
    """``found``, or ``own`` if that is what ``found`` was rounded from.

    Raises:
        ConfigError: for a dtype that cannot be loaded as ``own``.
    """
    if found.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16) and own.is_floating_point():
        raise ConfigError(f"{origin}: tensor {name!r} is {found.dtype}, expected a floating tensor like {own.dtype}")
    if exact and found.dtype in (torch.bfloat16, torch.float16):
        if not torch.equal(own.to(found.device, found.dtype), found):
            raise ConfigError(
                f"{origin}: tensor {name!r} is {found.dtype}, expected float32: its rounding changes features or "
                "targets; leave it out when the others are converted"
            )
        return own
    return found
