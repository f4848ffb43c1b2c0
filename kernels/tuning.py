"""Tile configurations: ``configs/<op>/<device name>.json`` with ``default.json`` beside it.

No search happens at run time. ``python benchmarks/tune.py OP`` measures and writes the file of the present GPU.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "configs"


def device_file(device_name: str) -> str:
    """File name of a device's configuration: ``"NVIDIA H100 80GB HBM3"`` -> ``"NVIDIA_H100_80GB_HBM3.json"``."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", device_name).strip("_") + ".json"


@cache
def load_configs(op: str, device_name: str | None = None) -> dict[str, Any]:
    """Return the tile configurations of ``op`` for a device, or the default ones where it has none of its own.

    Each file holds one JSON object; its keys are kernel names (or ``"<kernel>/<shape bucket>"``), its values the
    compile-time constants, ``num_warps`` and ``num_stages`` to launch with.
    """
    if device_name:
        tuned = FOLDER / op / device_file(device_name)
        if tuned.exists():
            return json.loads(tuned.read_text())
    return json.loads((FOLDER / op / "default.json").read_text())


def all_configs(op: str) -> dict[str, dict[str, Any]]:
    """Every shipped configuration file of ``op``, by file name: what the compile tests must cover."""
    return {path.name: json.loads(path.read_text()) for path in sorted((FOLDER / op).glob("*.json"))}
