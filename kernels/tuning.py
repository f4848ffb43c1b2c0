"""Tile configurations: ``configs/<op>/<device name>.json`` with ``default.json`` beside it.

No search happens at run time. ``python benchmarks/tune.py OP`` measures and writes the file of the present GPU: it
tries the configurations that the op's module lists as ``CANDIDATES = {"<kernel>": [{...}, ...]}`` (same keys and form
as in the files). For that, launchers call :func:`load_configs` at every launch; a file is read once.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"

_overrides: dict[str, "Override"] = {}


def device_file(device_name: str) -> str:
    """File name of a device's configuration: ``"NVIDIA H100 80GB HBM3"`` -> ``"NVIDIA_H100_80GB_HBM3.json"``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", device_name).strip("_") + ".json"


def load_configs(op: str, device_name: str | None = None) -> dict[str, Any]:
    """Return the tile configurations of ``op`` for a device, or the default ones where it has none of its own.

    Each file holds one JSON object; its keys are kernel names (or ``"<kernel>/<shape bucket>"``), its values the
    compile-time constants, ``num_warps`` and ``num_stages`` to launch with. The result is shared: do not modify it.
    """
    configs = _read(op, device_name)
    if op in _overrides:
        _overrides[op].lookups += 1
        return configs | _overrides[op].configs
    return configs


@cache
def _read(op: str, device_name: str | None) -> dict[str, Any]:
    if device_name:
        tuned = FOLDER / op / device_file(device_name)
        if tuned.exists():
            return json.loads(tuned.read_text())
    return json.loads((FOLDER / op / "default.json").read_text())


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


def all_configs(op: str) -> dict[str, dict[str, Any]]:
    """Every shipped configuration file of ``op``, by file name: what the compile tests must cover."""
    return {path.name: json.loads(path.read_text()) for path in sorted((FOLDER / op).glob("*.json"))}
