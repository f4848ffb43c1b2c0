"""Conversion between text and values: YAML, ``key=value`` arguments, and the paths among the values.

A string is itself: ``${...}`` and ``???``, to which OmegaConf gives a meaning, have none here. So a folder may have any
name, and ``configuration -> YAML -> configuration`` changes nothing.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bestrq2.encodings import TextEncodingError, decode_text
from bestrq2.errors import ConfigError

# Keys whose values are names of files; those of a list are, too.
PATHS = (
    "data.source",
    "data.cache",
    "validation.source",
    "probe.manifest",
    "probe.events",
    "train.init_from",
    "frozen.source",
    "frozen.cache",
    "model.targets.encoder",
)
_ENCODERS = ("frozen.source", "model.targets.encoder")  # these may also be PACKAGE.MODULE:NAME
# Of these any text is a name, so that it is taken as it is, but for null, a list and what stands in quotes.
_NAMES = (*PATHS, "recipe", "train.wandb", "probe.label", "probe.group", "probe.split")
FREE_MAPPINGS = ("data.domain_weights",)  # their keys are the user's own names

_MOST_ALIASES = 16  # more can stand for billions of values

# YAML 1.2 for numbers (1e-4 is one, 010 is ten) and none of YAML 1.1's dates and sums of minutes (1:30), the same in
# both directions: what would be read as a number is written in quotes.
_FLOAT = re.compile(
    r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_INT = re.compile(r"[-+]?(?:[0-9][0-9_]*|0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+)$")
_DROPPED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


def _resolvers(base: Any) -> dict[str, list[tuple[str, Any]]]:
    found = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _DROPPED]
        for first, entries in base.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        numbers = [("tag:yaml.org,2002:int", _INT), ("tag:yaml.org,2002:float", _FLOAT)]
        found[first] = [*found.get(first, []), *numbers]
    return found


class _Loader(yaml.SafeLoader):
    """Also refuses keys that are there twice, of which one would be lost."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)
    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MOST_ALIASES:
                raise yaml.YAMLError(f"more than {_MOST_ALIASES} aliases (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.YAMLError(f"the key {key.value!r} is there twice, line {key.start_mark.line + 1}")
                seen.add(key.value)
                key.tag = "tag:yaml.org,2002:str"  # all keys are text: a domain may be called no, or 2024
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if re.match("[-+]?0[box]", text) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Escape the line ends of Unicode, which PyYAML writes as they are and reads as a space."""
        style = '"' if any(end in data for end in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def read_yaml(text: str, origin: str) -> dict[str, Any]:
    """The mapping that YAML describes.

    Raises:
        ConfigError: if it is no YAML or no mapping; it names ``origin``.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected sections such as model, data, train, got {type(values).__name__}")
    return values


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML that :func:`read_yaml` gives back, strings to the last character."""
    return yaml.dump(dict(values), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """A text file in UTF-8, or in UTF-16 with the mark that some editors write.

    Raises:
        ConfigError: if it cannot be read or is in another encoding; it says which line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{what} {os.fspath(path)}: cannot be read: {error.strerror or error}") from error
    try:
        return decode_text(content)
    except TextEncodingError as error:
        raise ConfigError(f"{what} {os.fspath(path)}: line {error.line}: {error}") from error


def read_override(text: str) -> tuple[str, Any]:
    """The key and the value of ``key=value``. A value is YAML (numbers, true, null, [a, b]); a name of a file is taken
    as it is written, whatever characters it has.

    Raises:
        ConfigError: if it has another form.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"expected overrides as key=value, got {text!r}")
    if not value.strip() and not (value and key in _NAMES):  # a variable of the shell that is not set
        raise ConfigError(f"{key}: nothing behind the '='; write {key}=null for none")
    if key in _NAMES and not re.fullmatch(r"\s*(null|~|\[.*\]|'.*'|\".*\"|[-+.\d]+|)\s*", value, re.S):
        return key, value
    try:
        found = yaml.load(value, Loader=_Loader)
        return key, _with_spaces(found) if key in FREE_MAPPINGS else found
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"override {text!r}: not valid YAML: {reason}") from error


def _with_spaces(value: Any) -> Any:
    """``{a:1}``, which in YAML is a key ``a:1`` without a value, as ``{a: 1}``."""
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, given in value.items():
        name, _, number = key.rpartition(":")
        if given is None and name and (_INT.match(number) or _FLOAT.match(number)):
            key, given = name, yaml.load(number, Loader=_Loader)
        if key in found:
            raise yaml.YAMLError(f"the key {key!r} is there twice")
        found[key] = given
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the key ``a.b``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def shield(values: Any) -> Any:
    """Plain containers whose strings OmegaConf takes for strings."""
    if isinstance(values, str):
        return re.sub(r"\0|(?<=\$)\{|^\?(?=\?\?\Z)", r"\0\g<0>", values)  # NUL: the next character is itself
    if isinstance(values, Mapping):
        return {key: shield(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [shield(value) for value in values]
    return values


def unshielded(value: Any) -> Any:
    """Undo :func:`shield` in containers, dataclasses and messages."""
    if isinstance(value, str):
        return re.sub(r"\0(.)", r"\1", value, flags=re.S)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{entry.name: unshielded(getattr(value, entry.name)) for entry in fields(value)})
    if isinstance(value, dict):
        return {key: unshielded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unshielded(item) for item in value]
    return value


def located(values: dict[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The same nested values with relative names of files taken from ``folder``: they mean the same anywhere."""
    for key in PATHS:
        *sections, last = key.split(".")
        inner: Any = values
        for section in sections:
            inner = inner.get(section) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and last in inner:
            inner[last] = _located(inner[last], folder, key in _ENCODERS)
    return values


def _located(value: Any, folder: str | os.PathLike[str], may_be_module: bool) -> Any:
    if isinstance(value, list):
        return [_located(item, folder, may_be_module) for item in value]
    if not isinstance(value, str) or not value or os.path.isabs(value):
        return value
    path = os.path.join(os.path.abspath(folder), value)
    if may_be_module and re.fullmatch(r"[\w.]+:\w+", value) and not os.path.exists(path):
        package = value.split(":")[0]
        if not package.endswith(".py"):
            return value  # PACKAGE.MODULE:NAME
    return path
