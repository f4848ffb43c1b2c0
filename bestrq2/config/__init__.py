"""The configuration of a run: typed sections, YAML recipes, ``key=value`` overrides, and the model they describe.

Unknown keys, wrong types and impossible values are errors that name the key. The resolved configuration is saved in the
run folder and in every checkpoint; :func:`build_model` rebuilds the model from it alone.
"""

from bestrq2.errors import ConfigError

from .loading import (
    config_from_dict,
    config_from_yaml,
    config_to_dict,
    config_to_yaml,
    load_config,
    recipe_names,
    with_overrides,
)
from .sections import (
    Config,
    ConformerConfig,
    DataConfig,
    EncoderConfig,
    FrontEndConfig,
    FrozenConfig,
    MaskingConfig,
    MixingConfig,
    ModelConfig,
    OptimizerConfig,
    PredictorConfig,
    ProbeConfig,
    TargetsConfig,
    TrainConfig,
    ValidationConfig,
)
from .text import read_text, read_yaml, write_yaml

__all__ = [
    "Config",
    "ConfigError",
    "ConformerConfig",
    "DataConfig",
    "EncoderConfig",
    "FrontEndConfig",
    "FrozenConfig",
    "MaskingConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PredictorConfig",
    "ProbeConfig",
    "TargetsConfig",
    "TrainConfig",
    "ValidationConfig",
    "config_from_dict",
    "config_from_yaml",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
    "read_text",
    "read_yaml",
    "recipe_names",
    "with_overrides",
    "write_yaml",
]
