"""Write a transformers folder, for ``AutoModel.from_pretrained(folder, trust_remote_code=True)`` and for us."""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from torch import Tensor

from bestrq2.config import Config, config_to_dict

from .tensors import assemble_encoder, write_encoder_file

CODE = ("configuration_bestrq2.py", "modeling_bestrq2.py", "feature_extraction_bestrq2.py")


def write_folder(folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Path) -> list[Path]:
    """Write config.json, model.safetensors, preprocessor_config.json and the code that transformers runs.

    Raises:
        CheckpointError, OSError: if a file cannot be written.
        ConfigError: if the weights do not fit the configuration.
    """
    encoder = assemble_encoder(config, weights, origin)
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": {
            "architectures": ["BestRQ2Model"],
            "auto_map": {
                "AutoConfig": "configuration_bestrq2.BestRQ2Config",
                "AutoModel": "modeling_bestrq2.BestRQ2Model",
            },
            "model_type": "bestrq2",
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
    write_encoder_file(folder / "model.safetensors", config, weights)
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    code = resources.files("bestrq2.interchange.hugging_face")
    for name in CODE:
        (folder / name).write_text(code.joinpath(name).read_text())
    return [folder / name for name in ("model.safetensors", *documents, *CODE)]
