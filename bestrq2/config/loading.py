"""YAML recipes, ``key=value`` overrides, saved configurations."""

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bestrq2.errors import ConfigError

from .rules import check_values
from .sections import Config


def recipe_names() -> list[str]:
    """Names of the recipes in the package, for ``--config``."""
    return sorted(p.name[:-5] for p in resources.files("bestrq2.recipes").iterdir() if p.name.endswith(".yaml"))


_FREE_KEYS = ("data.domain_weights.",)  # below these, the keys are the user's own names


def _known_keys(schema: Any, prefix: str = "") -> list[str]:
    keys = []
    for entry in fields(schema):
        value = getattr(schema, entry.name)
        name = prefix + entry.name
        keys += [name, *_known_keys(value, name + ".")] if is_dataclass(value) else [name]
    return keys


def _leaves(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig):
        return [prefix.rstrip(".")]
    return [leaf for key in node for leaf in _leaves(node._get_node(key), f"{prefix}{key!s}.")] or [prefix.rstrip(".")]


def _merge(base: DictConfig, layer: DictConfig, origin: str) -> DictConfig:
    known = _known_keys(Config())
    for key in _leaves(layer):
        if key and key not in known and not key.startswith(_FREE_KEYS):
            close = get_close_matches(key, known, n=1) or [k for k in known if k.endswith("." + key.split(".")[-1])][:1]
            hint = f"; did you mean {close[0]!r}?" if close else f"; known sections: {', '.join(_sections())}"
            raise ConfigError(f"{origin}: unknown configuration key {key!r}{hint}")
    try:
        return OmegaConf.merge(base, layer)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error


def _sections() -> list[str]:
    return [entry.name for entry in fields(Config) if is_dataclass(getattr(Config(), entry.name))]


def _read_recipe(name: str) -> tuple[DictConfig, str]:
    """A recipe of the package by name, or a YAML file by path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {name}: no such file")
        text, label = path.read_text(), path.stem
    else:
        if name not in recipe_names():
            raise ConfigError(f"--config {name!r}: expected a YAML file or one of {', '.join(recipe_names())}")
        text, label = resources.files("bestrq2.recipes").joinpath(f"{name}.yaml").read_text(), name
    try:
        loaded = OmegaConf.create(text)
    except Exception as error:
        raise ConfigError(f"--config {name}: not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"--config {name}: expected sections such as {', '.join(_sections())}, got a list")
    return loaded, label


def load_config(recipe: str, overrides: list[str] | None = None) -> Config:
    """Defaults, then the recipe (and the recipe it is ``based_on``), then ``key=value`` overrides.

    Raises:
        ConfigError: for an unknown recipe or key, a malformed override, a wrong type, or an impossible value.
    """
    layers: list[tuple[DictConfig, str]] = []
    name: str | None = recipe
    label = None
    while name:
        layer, own = _read_recipe(name)
        label = label or own
        if len(layers) > 8:
            raise ConfigError(f"--config {recipe}: based_on refers to itself")
        name = layer.pop("based_on", None)
        layers.append((layer, f"recipe {own}"))
    merged = OmegaConf.structured(Config)
    for layer, origin in reversed(layers):
        merged = _merge(merged, layer, origin)
    merged.recipe = label
    return _with_overrides(merged, overrides or [])


def with_overrides(config: Config, overrides: list[str]) -> Config:
    """A configuration with ``key=value`` overrides applied.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _with_overrides(OmegaConf.structured(config), overrides)


def _with_overrides(merged: DictConfig, overrides: list[str]) -> Config:
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"expected overrides as key=value, got {override!r}")
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise ConfigError(f"override {override!r}: {error}") from error
        merged = _merge(merged, layer, f"override {override!r}")
    return _checked(merged)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a saved configuration.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _checked(_merge(OmegaConf.structured(Config), OmegaConf.create(values), "saved configuration"))


def config_to_dict(config: Config) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def config_to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _checked(merged: DictConfig) -> Config:
    try:
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except ValueError as error:  # of the settings of a layer
        raise ConfigError(f"model: {error}") from error
    check_values(config)
    return config
