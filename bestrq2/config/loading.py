"""YAML recipes, ``key=value`` overrides, saved configurations."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import LiteralNode

from bestrq2.errors import ConfigError

from .rules import check_values
from .sections import Config
from .text import (
    FREE_MAPPINGS,
    located,
    nested,
    read_override,
    read_text,
    read_yaml,
    shield,
    unshielded,
    write_yaml,
)


def recipe_names() -> list[str]:
    """Names of the recipes in the package, for ``--config``."""
    return sorted(p.name[:-5] for p in resources.files("bestrq2.recipes").iterdir() if p.name.endswith(".yaml"))


# What options are called elsewhere, for the hint of an unknown key.
_OTHER_NAMES = {
    "hidden_size": "model.encoder.width",
    "lr": "optimizer.learning_rate",
    "mask_ratio": "model.masking.ratio",
    "max_steps": "train.steps",
    "n_mels": "model.front_end.num_mels",
    "num_layers": "model.encoder.depth",
    "num_workers": "data.workers",
    "sample_rate": "model.front_end.sampling_rate",
}


_structured = cache(OmegaConf.structured)


def _schema() -> DictConfig:
    """Every setting with its default. A copy takes a fifth of the time in which OmegaConf makes it of the classes."""
    return copy.deepcopy(_structured(Config))


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


def _is_entry(key: str) -> bool:
    return any(key.startswith(f"{mapping}.") for mapping in FREE_MAPPINGS)


def _merge(base: DictConfig, layer: DictConfig, origin: str, one_entry: bool = False) -> DictConfig:
    """``layer`` over ``base``. Mappings of the user's own names replace those of ``base``, but for ``one_entry``."""
    known = _known_keys(Config())
    for key in _leaves(layer):
        if key and key not in known and not _is_entry(key):
            last = key.split(".")[-1]
            same = [k for k in known if k.split(".")[-1] == last]  # the option, under another section
            close = get_close_matches(key, same, n=1, cutoff=0) or get_close_matches(key, known, n=1)
            close = [_OTHER_NAMES[last]] if last in _OTHER_NAMES else close
            hint = f"; did you mean {close[0]!r}?" if close else f"; known sections: {', '.join(_sections())}"
            raise ConfigError(f"{origin}: unknown configuration key {key!r}{hint}")
    _fit(base, layer, origin)
    for name in () if one_entry else FREE_MAPPINGS:
        section, _, last = name.rpartition(".")
        if _node(layer, name) is not None:
            _node(base, section)[last] = {}
    try:
        return OmegaConf.unsafe_merge(base, layer)  # type: ignore[return-value]  # without copies: both end here
    except OmegaConfBaseException as error:
        raise ConfigError(f"{origin}: {_mismatch(base, layer, error)}") from error


_KINDS = {
    IntegerNode: "a whole number",
    FloatNode: "a number",
    BooleanNode: "true or false",
    StringNode: "text",
    int: "whole numbers",
    float: "numbers",
    str: "texts",
}


def _node(config: DictConfig, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part) if isinstance(node, DictConfig) else None
    return node


def _mismatch(base: DictConfig, layer: DictConfig, error: OmegaConfBaseException) -> str:
    """The key of a value that does not fit, what was expected there, and the value."""
    key = str(getattr(error, "full_key", None) or "").split("[")[0]
    expected, given = (_node(config, key) for config in (base, layer))
    if expected is None:  # an entry under a name of the user's own
        key = key.rpartition(".")[0]
        expected, given = (_node(config, key) for config in (base, layer))
    if isinstance(expected, ListConfig | DictConfig):
        of = _KINDS.get(expected._metadata.element_type, "values")
        kind = f"a list of {of}" if isinstance(expected, ListConfig) else f"names with {of}, such as {{a: 1, b: 2}}"
    elif isinstance(expected, LiteralNode):
        kind = "one of " + ", ".join(str(choice) for choice in get_args(expected.ref_type))
    else:
        kind = _KINDS.get(type(expected), "")
    if not kind or given is None:
        return f"{key}: {unshielded(str(error)).splitlines()[0]}"
    plain = OmegaConf.to_container(given) if isinstance(given, ListConfig | DictConfig) else given._value()
    got = "nothing" if plain is None else repr(unshielded(plain))
    return f"{key}: expected {kind}, got {got}"


def _fit(base: DictConfig, layer: DictConfig, origin: str, prefix: str = "") -> None:
    """Check that sections are given as such, and make whole numbers such as 1e3 integers where these are expected, and
    nothing an empty mapping.

    Raises:
        ConfigError: for a section that is nothing, or a single value.
    """
    for key in list(layer):
        if "." in str(key) and key not in base:
            section, _, name = str(key).rpartition(".")
            raise ConfigError(
                f"{origin}: {prefix}{key!s}: expected sections inside each other, as {section}: {{{name}: ...}}, got a "
                "name with dots"
            )
        own, given = (node._get_node(key) if key in node else None for node in (base, layer))
        value = layer[key]
        if isinstance(own, DictConfig) and is_dataclass(own._metadata.object_type):
            if not isinstance(value, DictConfig):
                plain = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
                got = "nothing" if value is None else str(unshielded(plain))
                raise ConfigError(
                    f"{origin}: {prefix}{key!s}: expected a section of settings (key: value lines), got {got}"
                )
            _fit(own, value, origin, f"{prefix}{key!s}.")
        elif isinstance(own, DictConfig):
            if value is None:
                layer[key] = {}
            elif not isinstance(value, DictConfig) or any(
                isinstance(given, DictConfig | ListConfig) for given in value.values()
            ):
                plain = OmegaConf.to_container(value) if isinstance(value, DictConfig | ListConfig) else value
                raise ConfigError(
                    f"{origin}: {prefix}{key!s}: expected names with numbers, such as {{a: 1, b: 2}}, got "
                    f"{unshielded(plain)!r}"
                )
        elif isinstance(own, IntegerNode) and isinstance(value, float) and value.is_integer():
            layer[key] = int(value)
        elif isinstance(own, ListConfig) and own._metadata.element_type is int and isinstance(given, ListConfig):
            for place, item in enumerate(given):
                if isinstance(item, float) and item.is_integer():
                    given[place] = int(item)


def _sections() -> list[str]:
    return [entry.name for entry in fields(Config) if is_dataclass(getattr(Config(), entry.name))]


def _layer(values: Mapping[str, Any], origin: str) -> DictConfig:
    try:
        layer = OmegaConf.create(shield(values))
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {unshielded(str(error)).splitlines()[0]}") from error
    assert isinstance(layer, DictConfig)
    return layer


def _read_recipe(name: str) -> tuple[dict[str, Any], str, str | None]:
    """A recipe of the package by name, or a YAML file by path; its label; the recipe it is based on.

    Relative names of files in it, also of the recipe it is based on, are taken from the folder of the file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {name}: no such file")
        values, label = located(read_yaml(read_text(path, "--config"), f"--config {name}"), path.parent), path.stem
    else:
        if name not in recipe_names():
            renamed = {"best_rq2_transfer_grid_small": ["best_rq2_transfer_small"]}
            close = renamed.get(name) or get_close_matches(name, recipe_names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"--config {name!r}: expected a YAML file or one of {', '.join(recipe_names())}{hint}")
        text = resources.files("bestrq2.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        values, label = read_yaml(text, name), name
    base = values.pop("based_on", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"--config {name}: based_on: expected the name of a recipe, got {base!r}")
    if base is not None and base.endswith((".yaml", ".yml")):
        base = os.path.join(path.parent, base)
    return values, label, base


def load_config(recipe: str, overrides: Sequence[str] | None = None, values: Mapping[str, Any] | None = None) -> Config:
    """Defaults, then the recipe (and the recipe it is ``based_on``), then ``key=value`` overrides, then ``values``.

    Args:
        recipe: name of a recipe of the package, or of a YAML file.
        overrides: text as on a command line. Relative names of files are taken from the present folder.
        values: by dotted key, as they are: nothing in a string has a meaning.

    Raises:
        ConfigError: for an unknown recipe or key, a malformed override, a wrong type, or an impossible value.
    """
    of_package = Path(recipe).suffix not in (".yaml", ".yml")  # its content is the same every time
    merged = copy.deepcopy(_packaged(recipe)) if of_package else _with_recipe(recipe)
    return _with_overrides(merged, overrides or (), values or {})


def chosen_keys(recipe: str, overrides: Sequence[str] = ()) -> list[str]:
    """Keys that a user set for this model: by overrides, in their own recipe, and in those of theirs that it is based
    on, up to the one that chooses the model. Those of the package are shared by models that use other parts of them.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    keys = [leaf for text in overrides for leaf in _leaves(_layer(nested(*read_override(text)), f"override {text!r}"))]
    name: str | None = recipe
    while name is not None and Path(name).suffix in (".yaml", ".yml") and "model.name" not in keys:
        content, own, name = _read_recipe(name)
        keys += _leaves(_layer(content, f"recipe {own}"))
    return list(dict.fromkeys(keys))


def _with_recipe(recipe: str) -> DictConfig:
    layers: list[tuple[DictConfig, str]] = []
    name: str | None = recipe
    label = None
    while name:
        content, own, base = _read_recipe(name)
        named = content.get("recipe")
        label = label or (named if isinstance(named, str) and named else own)
        if len(layers) > 8:
            raise ConfigError(f"--config {recipe}: based_on refers to itself")
        layers.append((_layer(content, f"recipe {own}"), f"recipe {own}"))
        name = base
    merged = _schema()
    for layer, origin in reversed(layers):
        merged = _merge(merged, layer, origin)
    merged.recipe = shield(label)
    return merged


_packaged = cache(_with_recipe)


def with_overrides(config: Config, overrides: Sequence[str], values: Mapping[str, Any] | None = None) -> Config:
    """A configuration with ``key=value`` overrides and then ``values`` applied.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    base = _merge(_schema(), _layer(config_to_dict(config), "configuration"), "configuration")
    return _with_overrides(base, overrides, values or {})


def _with_overrides(merged: DictConfig, overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
    given = [(f"override {text!r}", *read_override(text)) for text in overrides]
    given += [(key, key, value) for key, value in values.items()]
    for origin, key, value in given:
        layer = _layer(located(nested(key, value), os.curdir), origin)
        merged = _merge(merged, layer, origin, one_entry=_is_entry(key))
    return _checked(merged)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Rebuild a saved configuration.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    return _checked(_merge(_schema(), _layer(values, "saved configuration"), "saved configuration"))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, of which :func:`config_from_dict` makes the same configuration again."""
    return asdict(config)


def config_to_yaml(config: Config) -> str:
    """YAML of which :func:`config_from_yaml` makes the same configuration again."""
    return write_yaml(config_to_dict(config))


def config_from_yaml(text: str, origin: str = "saved configuration") -> Config:
    """
    Raises:
        ConfigError: as :func:`load_config`.
    """
    return config_from_dict(read_yaml(text, origin))


def _checked(merged: DictConfig) -> Config:
    try:
        config: Config = unshielded(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {unshielded(str(error)).splitlines()[0]}") from error
    except ValueError as error:  # of the settings of a layer
        raise ConfigError(f"model: {error}") from error
    check_values(config)
    return config
