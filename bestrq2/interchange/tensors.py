"""Safetensors files with metadata, and our own encoders in one such file.

An encoder file holds the tensors of the encoder under ``encoder.`` and, in its metadata, the configuration that
rebuilds it: nothing else is needed to open it, and nothing in it is executable.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bestrq2.config import Config, ConfigError, config_from_dict, config_to_dict
from bestrq2.durability import save_file
from bestrq2.errors import CheckpointError, system_reason
from bestrq2.models import ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.models.build import load_weights
from bestrq2.real_content import real_content

CONFIG_ENTRY = "bestrq2_config"  # metadata name under which an encoder file keeps its configuration
ENCODER = "encoder."


def module_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of every parameter and buffer."""
    return tensors_digest([*module.named_parameters(), *module.named_buffers()])


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_digest(module: nn.Module) -> str:
    """SHA-256 over what a module and those inside of it are and were set to: the same weights with another number of
    heads, window or floor of the spectrogram give other features. Paths and versions are left out."""
    digest, seen = hashlib.sha256(), set[int]()
    for name, part in module.named_modules():
        digest.update(f"{name}\0{type(part).__qualname__}\n".encode())
        for key, value in sorted(vars(part).items()):
            if key not in _OF_EVERY_MODULE and id(value) not in seen:
                if hasattr(value, "to_dict"):  # of transformers: a large one, which every part refers to
                    seen.add(id(value))
                if (plain := _plain(value)) is not None:
                    digest.update(f"{key} {json.dumps(plain, sort_keys=True)}\n".encode())
    return digest.hexdigest()


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _plain(value: Any) -> Any:
    """A setting as JSON has it, None for what is none."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if not isinstance(value, type) and hasattr(value, "to_dict"):
        value = value.to_dict()
    elif not isinstance(value, type) and is_dataclass(value):
        value = {"": type(value).__qualname__, **vars(value)}
    if isinstance(value, dict):
        left_out = ("_name_or_path", "transformers_version")
        return {str(key): _plain(part) for key, part in value.items() if key not in left_out}
    return None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {real_content(path) or error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either complete or absent.

    Raises:
        CheckpointError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, partial, {"format": "pt", **metadata})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written: {system_reason(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's own tensors out of those of a pretraining model, without the prefix."""
    return {name[len(ENCODER) :]: tensor for name, tensor in weights.items() if name.startswith(ENCODER)}


def write_encoder_file(path: Path, config: Config, weights: Mapping[str, Tensor]) -> None:
    """Write the encoder out of ``weights`` (names as in a run's ``model.safetensors``) to one file.

    Raises:
        CheckpointError: if it cannot be written.
    """
    kept = {name: tensor for name, tensor in weights.items() if name.startswith(ENCODER)}
    write_tensors(path, kept, {CONFIG_ENTRY: json.dumps(config_to_dict(config))})


def config_in(metadata: dict[str, str], origin: Path) -> Config:
    """The configuration in the metadata of an encoder file.

    Raises:
        ConfigError: if it is not one.
    """
    try:
        return config_from_dict(json.loads(metadata[CONFIG_ENTRY]))
    except ValueError as error:
        raise ConfigError(f"{origin}: its configuration cannot be used: {error}") from error


def assemble_encoder(
    config: Config, weights: Mapping[str, Tensor], origin: Path, *, published_positions: bool = False
) -> ViTEncoder | ConformerEncoder:
    """An encoder in evaluation mode that takes no gradients: float32, on the CPU, whatever torch's defaults are.

    Raises:
        ConfigError: if the tensors do not fit the configuration, naming the first mismatch.
    """
    with torch.device("cpu"):
        encoder = build_encoder(config.model, config.data.crop_seconds, published_positions, config.train.seed).float()
    load_weights(encoder, encoder_weights(weights), origin)
    return encoder.eval().requires_grad_(False)


PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")


def refuse_pickle(path: Path) -> None:
    """
    Raises:
        ConfigError: if ``path`` is a pickle by its name, whatever it is. Unpickling runs code of whoever made the file.
    """
    if path.suffix.lower() in PICKLES:
        if (what := real_content(path)) and not what.startswith("a ZIP"):
            raise ConfigError(f"{path}: {what}")
        raise ConfigError(
            f"{path}: pickled checkpoints are never opened here, because that runs code from the file. Where you trust "
            "it, convert it once: weights = torch.load(PATH, weights_only=True, map_location='cpu'); "
            "weights = weights.get('state_dict', weights); safetensors.torch.save_file({k: v.contiguous() for k, v in "
            "weights.items()}, 'model.safetensors'), and open the .safetensors file"
        )
