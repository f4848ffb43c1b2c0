"""Tile configurations in layers: ``configs/<op>/default.json``, ``sm_<architecture>.json`` (of the first of its family,
then its own), ``<device name>.json``.

A later layer replaces single kernels of an earlier one. No search happens at run time: ``python benchmarks/tune.py OP``
measures and writes the file of the present GPU. It tries the configurations that the op's module lists as
``CANDIDATES = {"<kernel>": [{...}, ...]}`` (same keys and form as in the files). For that, launchers call
:func:`load_configs` at every launch; a file is read once.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"
ARCHITECTURES = (80, 90, 100)  # what default.json is compiled for

_overrides: dict[str, "Override"] = {}


@dataclass(frozen=True)
class ConfigFile:
    """One layer as a file holds it: kernel name (or ``"<kernel>/<shape bucket>"``) -> constants and launch options."""

    name: str
    architectures: tuple[int, ...]  # that it is used on, of those that are compiled for
    configs: dict[str, Any]


def device_file(device_name: str) -> str:
    """File name of a device's configuration: ``"NVIDIA H100 80GB HBM3"`` -> ``"NVIDIA_H100_80GB_HBM3.json"``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", device_name).strip("_") + ".json"


def load_configs(op: str, device: torch.device | None = None) -> dict[str, Any]:
    """Return the tile configurations of ``op`` for a device (None or a CPU: the default ones).

    The values hold the compile-time constants, ``num_warps`` and ``num_stages`` to launch with. The result is shared:
    do not modify it.
    """
    configs = merged(FOLDER, op, *_names(device))
    if op in _overrides:
        _overrides[op].lookups += 1
        return configs | _overrides[op].configs
    return configs


@cache
def _names(device: torch.device | None) -> tuple[str | None, int | None]:
    if device is None or device.type != "cuda":
        return None, None
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), 10 * major + minor


def layers(op: str, device_name: str | None, architecture: int | None, folder: Path | None = None) -> list[Path]:
    """The files of ``op`` that apply to a device, the most general first."""
    names = ["default.json"]
    if architecture:  # sm_89 takes what was chosen for sm_80, too, and sm_103 that for sm_100
        names += [f"sm_{number}.json" for number in sorted({architecture // 10 * 10, architecture})]
    if device_name:
        names.append(device_file(device_name))
    return [path for name in names if (path := (folder or FOLDER) / op / name).exists()]


@cache
def merged(folder: Path, op: str, device_name: str | None, architecture: int | None) -> dict[str, Any]:
    """The configurations of all layers of a device."""
    configs: dict[str, Any] = {}
    for path in layers(op, device_name, architecture, folder):
        configs |= read_file(path).configs
    return configs


def read_file(path: Path) -> ConfigFile:
    """Read one layer. The file of a device names its architecture, as the number under ``"architecture"``."""
    configs = json.loads(path.read_text())
    architecture = configs.pop("architecture", None)
    by_name = re.fullmatch(r"sm_(\d+)\.json", path.name)
    if by_name:
        architecture = int(by_name[1])
    elif architecture is None and path.name != "default.json":
        raise ValueError(f'{path} does not name its architecture: expected an entry like "architecture": 90')
    return ConfigFile(path.name, ARCHITECTURES if architecture is None else (architecture,), configs)


class Override:
    """Configurations that replace those of the files, and how often a launcher has asked for them."""

    def __init__(self, configs: Mapping[str, Any]) -> None:
        self.configs = dict(configs)
        self.lookups = 0


@contextmanager
def override(op: str, configs: Mapping[str, Any]) -> Iterator[Override]:
    """Launch the kernels of ``op`` with other configurations in a block: how tune.py tries candidates."""
    previous = _overrides.get(op)
    _overrides[op] = Override(configs)
    try:
        yield _overrides[op]
    finally:
        if previous is None:
            del _overrides[op]
        else:
            _overrides[op] = previous


@dataclass(frozen=True)
class Shipped:
    """One shipped file together with everything that is loaded with it."""

    name: str
    keys: tuple[str, ...]  # its own entries
    configs: dict[str, Any]  # of all layers
    architectures: tuple[int, ...]
    replaced: Mapping[int, frozenset[str]]  # entries that the layer of an architecture replaces there

    def serves(self, key: str) -> tuple[int, ...]:
        """Architectures on which the entry ``key`` of this file is used."""
        return tuple(number for number in self.architectures if key not in self.replaced.get(number, ()))


def shipped(op: str) -> list[Shipped]:
    """Every configuration file of ``op``: what the compile tests must cover, each for the architectures it serves."""
    files = [read_file(path) for path in sorted((FOLDER / op).glob("*.json"))]
    default = next(file.configs for file in files if file.name == "default.json")
    general = {file.architectures[0]: file.configs for file in files if file.name.startswith("sm_")}
    found = []
    for file in files:
        of_all = file.name == "default.json"
        below = {} if of_all else general.get(file.architectures[0], {})
        replaced = {number: frozenset(configs) for number, configs in general.items()} if of_all else {}
        found.append(
            Shipped(file.name, tuple(file.configs), default | below | file.configs, file.architectures, replaced)
        )
    return found
