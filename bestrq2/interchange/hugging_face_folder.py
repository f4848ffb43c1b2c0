"""Transformers folders of our encoders, for ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` and for us.

:func:`write_folder` makes one; :func:`read_folder` also reads what ``save_pretrained`` made of it: one file or shards,
in any floating dtype, with the configuration in config.json alone.
"""

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path

from torch import Tensor

from bestrq2.config import Config, ConfigError, config_from_dict, config_to_dict
from bestrq2.durability import whole_file
from bestrq2.errors import CheckpointError
from bestrq2.runs.checkpoint import unreadable

from .staging import Check, staged
from .tensors import assemble_encoder, read_tensors, write_encoder_file

MODEL_TYPE = "bestrq2"
PREFIX = "bestrq2."  # of the encoder inside of a larger transformers model
CODE = ("configuration_bestrq2.py", "modeling_bestrq2.py", "feature_extraction_bestrq2.py")
FILES = ("model.safetensors", "config.json", "preprocessor_config.json", *CODE)


def write_folder(
    folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Path, look_again: Check | None = None
) -> list[Path]:
    """Write config.json, model.safetensors, preprocessor_config.json and the code that transformers runs, all of them
    or none.

    Args:
        folder: made if need be.
        config, weights: of a run (all weights, or the encoder's alone).
        origin: of the weights, for errors.
        look_again: see :func:`~bestrq2.interchange.staging.staged`.

    Raises:
        CheckpointError, OSError: if a file cannot be written.
        ConfigError: if the weights do not fit the configuration, or another process is writing there.
    """
    encoder = assemble_encoder(config, weights, origin)
    documents = {
        "config.json": {
            "architectures": ["BestRQ2Model"],
            "auto_map": {
                "AutoConfig": "configuration_bestrq2.BestRQ2Config",
                "AutoModel": "modeling_bestrq2.BestRQ2Model",
            },
            "model_type": MODEL_TYPE,
            "dtype": "float32",
            "hidden_size": encoder.output_dim,
            "num_hidden_layers": encoder.depth,
            "sampling_rate": encoder.sampling_rate,
            "hop_size_in_ms": encoder.hop_size_in_ms,
            "bestrq2_config": config_to_dict(config),
        },
        "preprocessor_config.json": {
            "auto_map": {"AutoFeatureExtractor": "feature_extraction_bestrq2.BestRQ2FeatureExtractor"},
            "feature_extractor_type": "BestRQ2FeatureExtractor",
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": encoder.sampling_rate,
        },
    }
    code = resources.files("bestrq2.interchange.hugging_face")
    texts = {name: code.joinpath(name).read_text(encoding="utf-8") for name in CODE}
    texts |= {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}
    names = sorted(FILES, key=lambda name: name == "config.json")  # without it, the others are no model
    with staged(folder, names, look_again, alone="--hf") as stage:
        write_encoder_file(stage / "model.safetensors", config, weights)
        for name, text in texts.items():
            with whole_file(stage / name) as file:
                file.write(text)
    return [folder / name for name in FILES]


def document_of(folder: Path) -> dict[str, object] | None:
    """The config.json of one of our encoders in a transformers folder, or None for any other folder.

    Raises:
        CheckpointError: if it may not be read.
    """
    try:
        document = json.loads((folder / "config.json").read_bytes())
    except PermissionError as error:
        raise unreadable(folder / "config.json", error) from error
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("model_type") == MODEL_TYPE else None


def read_folder(folder: Path, name: str | None = None) -> tuple[Config, dict[str, Tensor]]:
    """Configuration, and tensors named ``encoder.*``, of a folder with such a config.json.

    Args:
        folder: which :func:`document_of` finds to be one.
        name: of one of its files, such as ``model.fp16.safetensors``; None: the weights that transformers would take.

    Raises:
        ConfigError: for a config.json without a usable ``bestrq2_config``, or an index that names files elsewhere.
        CheckpointError: for missing or damaged weights.
    """
    own = (document_of(folder) or {}).get("bestrq2_config")
    if not isinstance(own, dict) or not own:
        raise ConfigError(
            f"{folder / 'config.json'}: expected bestrq2_config, the configuration of the encoder, got {own!r}"
        )
    try:
        config = config_from_dict(own)
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: bestrq2_config cannot be used: {error}") from error
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder) if name is None else _files_with(folder, name):
        found, _ = read_tensors(path)
        repeated = next((name for name in found if name in tensors), None)
        if repeated is not None:
            raise CheckpointError(f"{path}: tensor {repeated!r} is in another shard, too")
        tensors.update(found)
    if any(name.startswith(f"{PREFIX}encoder.") for name in tensors):
        tensors = {name[len(PREFIX) :]: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return config, tensors


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors or the shards of its index; where there is neither, those of the one variant, as in
    ``model.fp16.safetensors``."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    indices = [index] if index.is_file() else sorted(folder.glob("model.safetensors.index.*.json"))
    if indices:
        return _shards(folder, _one_of(indices, folder))
    variants = [path for path in sorted(folder.glob("model.*.safetensors")) if path.is_file()]
    if not variants:
        raise CheckpointError(f"{folder}: expected model.safetensors, or model.safetensors.index.json and its shards")
    return [_one_of(variants, folder)]


def _files_with(folder: Path, name: str) -> list[Path]:
    """One file, or all shards if it is one of them."""
    for index in sorted(folder.glob("model.safetensors.index*.json")):
        if folder / name in (shards := _shards(folder, index)):
            return shards
    return [folder / name]


def holds_own_weights(path: Path, names: Iterable[str]) -> bool:
    """Return True if a file in such a folder, with tensors of these names, is the encoder or a shard of it, and no
    other model that lies there."""
    return (
        any(name.endswith("encoder.front_end.mean") for name in names) or len(_files_with(path.parent, path.name)) > 1
    )


def _one_of(paths: list[Path], folder: Path) -> Path:
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ConfigError(f"{folder}: expected the weights of one variant, got {names}")
    return paths[0]


def _shards(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read as an index of shards: {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ConfigError(f"{index}: expected names of .safetensors files in this folder, got {name!r}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}")
    return [folder / name for name in names]
