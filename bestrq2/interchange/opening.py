"""Models from run folders, exported files and published checkpoints."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bestrq2.config import Config, ConfigError, config_from_dict
from bestrq2.errors import CheckpointError
from bestrq2.models import BestRQ, BestRQ2, ConformerEncoder, ViTEncoder, build_model
from bestrq2.models.build import load_weights
from bestrq2.models.teacher import Teacher
from bestrq2.runs.changes import changed_keys
from bestrq2.runs.checkpoint import STATE, find_checkpoint, unreadable

from .hugging_face_folder import document_of, holds_own_weights, read_folder
from .published import from_published
from .published_keys import unknown_layout
from .tensors import CONFIG_ENTRY, assemble_encoder, config_in, read_tensors, refuse_pickle
from .transformers_encoder import is_transformers_folder


@dataclass
class OpenedModel:
    """A model before it is built.

    Attributes:
        config, weights: configuration, and tensors named as in a run's ``model.safetensors``.
        complete: whether the weights are those of the whole pretraining model rather than the encoder's alone.
        origin: the file or folder.
        step: training steps, 0 if unknown.
    """

    config: Config
    weights: dict[str, Tensor]
    complete: bool
    origin: Path
    step: int = 0


def open_source(path: str | Path, *, heads: int | None = None, hop_length: int | None = None) -> OpenedModel:
    """Read a run folder, a ``step-*`` folder, a weights file inside of one (``ema.safetensors``), an encoder file or
    folder that :mod:`bestrq2.export` wrote, or a published checkpoint (a ``.safetensors`` file, or the folder of its
    transformers export).

    Args:
        heads, hop_length: what no tensor of a published checkpoint says; see :func:`from_published`.

    Raises:
        CheckpointError: for a missing or damaged file, or one that may not be read.
        ConfigError: for a pickle, an unknown layout (listing its keys), tensors that do not fit, or ``heads`` or
            ``hop_length`` other than what the source states.
    """
    try:
        opened = _open(Path(path), heads, hop_length)
    except PermissionError as error:
        raise unreadable(Path(os.fsdecode(error.filename or path)), error) from error
    model = opened.config.model
    for name, given, own in (
        ("heads", heads, model.encoder.heads),
        ("hop_length", hop_length, model.front_end.hop_length),
    ):
        if given not in (None, own):
            raise ConfigError(
                f"{path}: {name}={given}: it states {name}={own} itself; leave it out, it is only for published "
                "checkpoints that do not"
            )
    return opened


def _open(path: Path, heads: int | None, hop_length: int | None) -> OpenedModel:
    refuse_pickle(path)
    if path.suffix == ".safetensors" and not (path.parent / STATE).exists():
        return _open_file(path, heads, hop_length)
    if is_transformers_folder(path):
        raise ConfigError(
            f"{path}: another model, in transformers' form, without a configuration of bestrq2; bestrq2.load opens "
            "it as an encoder"
        )
    if document_of(path) is not None:
        config, tensors = read_folder(path)
        return OpenedModel(config, tensors, False, path)
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path}: a PEFT adapter, which holds changes to weights and no encoder: save the merged model, "
            "model.merge_and_unload().save_pretrained(FOLDER)"
        )
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return _open_file(path / "model.safetensors", _heads_in(path / "config.json") or heads, hop_length)
    checkpoint = find_checkpoint(path)
    config = config_from_dict(checkpoint.config)
    if config.frozen.source:
        raise ConfigError(
            f"{path}: a head trained on a frozen encoder, which is {config.frozen.source}: open that instead"
        )
    return OpenedModel(config, checkpoint.weights(), True, checkpoint.folder, checkpoint.step)


def _open_file(path: Path, heads: int | None, hop_length: int | None) -> OpenedModel:
    tensors, metadata = read_tensors(path)
    if CONFIG_ENTRY in metadata:
        return OpenedModel(config_in(metadata, path), tensors, False, path)
    if document_of(path.parent) is not None and holds_own_weights(path, tensors):  # which another library wrote
        return OpenedModel(*read_folder(path.parent, path.name), False, path)

    def number(name: str, kind: type, otherwise: Any = None) -> Any:
        try:
            return kind(metadata[name]) if name in metadata else otherwise
        except ValueError as error:
            raise ConfigError(f"{path}: metadata {name!r} is no number: {metadata[name]!r}") from error

    if not any(name.endswith("attn.qkv.weight") for name in tensors):
        raise unknown_layout(path, "neither an encoder file of bestrq2 nor a published checkpoint", list(tensors))
    published = from_published(
        tensors,
        heads=number("heads", int, heads),
        predictor_heads=number("predictor_heads", int),
        hop_length=number("hop_length", int, hop_length),
        window_seconds=number("window_seconds", float),
        origin=path,
    )
    return OpenedModel(published.config, published.weights, published.complete, path)


def _heads_in(path: Path) -> int | None:
    """Attention heads in the config.json of a transformers export."""
    try:
        document = json.loads(path.read_bytes())
        heads = document.get("encoder_kwargs", {}).get("num_heads")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return heads if isinstance(heads, int) else None


def open_own(
    path: str | Path,
    *,
    published_positions: bool = False,
    heads: int | None = None,
    hop_length: int | None = None,
) -> ViTEncoder | ConformerEncoder:
    """The encoder of a run, of a file that :mod:`bestrq2.export` wrote, or of a published checkpoint.

    Arguments and errors as :func:`bestrq2.load`.
    """
    source = open_source(path, heads=heads, hop_length=hop_length)
    if published_positions and source.config.model.encoder.kind != "vit":
        raise ConfigError(f"{path}: published_positions is about positions of a ViT, this is a Conformer")
    return assemble_encoder(source.config, source.weights, source.origin, published_positions=published_positions)


def load_pretraining(path: str | Path, **hints: int | None) -> BestRQ2 | BestRQ:
    """The whole pretraining model, to go on training or to look at its predictions.

    Args:
        path, hints: as :func:`open_source`.

    Raises:
        ConfigError: if the file holds an encoder alone, or as :func:`open_source`.
    """
    source = open_source(path, **hints)
    if not source.complete:
        raise ConfigError(f"{path}: holds an encoder alone, without predictor, quantizer and head")
    with torch.device("cpu"):
        model = build_model(source.config, open_teacher(source.config)).float()
    load_weights(model, source.weights, source.origin)
    return model


def open_teacher(config: Config) -> Teacher | None:
    """The frozen encoder that ``model.targets.encoder`` names, or None if the targets are log-mel patches.

    Raises:
        ConfigError: if it is not the one that ``model.targets.digest`` records, or has no such layer.
        CheckpointError: as :func:`open_source`.
    """
    targets = config.model.targets
    if targets.encoder is None:
        return None
    try:
        source = open_source(targets.encoder)
    except CheckpointError as error:
        raise CheckpointError(f"model.targets.encoder: {error}") from error
    encoder = assemble_encoder(source.config, source.weights, source.origin)
    try:
        teacher = Teacher(encoder, targets.layer, _settings_digest(source.config))
    except ValueError as error:
        raise ConfigError(f"model.targets.encoder={targets.encoder}: {error}") from error
    found, recorded = teacher.digest(), targets.digest or ""
    if found.startswith(recorded):
        return teacher
    if found[:64] == recorded[:64]:
        raise ConfigError(
            f"model.targets.encoder={targets.encoder}: the weights that made the targets so far, with other settings "
            "(of its config, such as heads, window or spectrogram): bring these back"
        )
    raise ConfigError(
        f"model.targets.encoder={targets.encoder}: not the encoder or layer that made the targets so far (digest "
        f"{found[:16]} instead of {recorded[:16]}). Give the path of the same weights."
    )


# Settings of an encoder that are among its tensors, or change training alone, or which a teacher is asked for.
_NO_MATTER = {
    "mean",
    "std",
    "normalize",
    "dropout",
    "drop_path",
    "activation_checkpointing",
    "chunk_training",
    "join_rows",
}


def _settings_digest(config: Config) -> str:
    """Digest of what decides an encoder's features beside its weights. Settings that are as usual are left out, so that
    a later version may have more of them."""
    used = {
        key: value
        for key, (_, value) in sorted(changed_keys(Config(), config).items())
        if key.startswith(("model.encoder.", "model.front_end.", "data.crop_seconds"))
        and key.rpartition(".")[2] not in _NO_MATTER
    }
    return hashlib.sha256(json.dumps(used).encode()).hexdigest()[:16]
