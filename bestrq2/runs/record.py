"""The record of a run, read from its folder for reports: at any time, also during the run or after a crash."""

import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.config import Config, ConfigError, config_to_dict, read_text, read_yaml
from bestrq2.errors import REASONS
from bestrq2.runs.checkpoint import list_checkpoints

from . import bad_batches, pictures
from .best import read_best
from .folder import RunFolder
from .metrics import read_metrics, series

_SKIP = re.compile(rf": ({'|'.join(map(re.escape, REASONS))})(?: \(.*\))?$")


@dataclass(frozen=True)
class CheckpointRecord:
    """``size`` in bytes; ``score``, lower is better, decides which are kept as the best; ``best``: none is lower."""

    name: str
    written: str
    size: int
    score: float | None
    best: bool


class RunRecord:
    """Contents of a run folder. Missing or damaged parts are empty, so a report does not fail on an old run.

    Attributes:
        folder, name: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        return read_metrics(self.folder)

    @cached_property
    def columns(self) -> list[str]:
        """Names of the columns that have a value somewhere."""
        return [name for name in (self.rows[0] if self.rows else {}) if any(row[name] for row in self.rows)]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column."""
        return series(self.rows, name)

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return float(values[-1]) if values.size else None

    def tail_mean(self, name: str) -> float | None:
        """Mean of a column over the last tenth of its rows, at least ten of them (fewer at the beginning of a run)."""
        values = self.series(name)[1]
        return float(values[-max(10, len(values) // 10) :].mean()) if values.size else None

    def best(self, name: str, largest: bool = False) -> tuple[float, int] | None:
        """The best value of a column, and its step."""
        steps, values = self.series(name)
        if not np.isfinite(values).any():
            return None
        place = int(np.nanargmax(values) if largest else np.nanargmin(values))
        return float(values[place]), int(steps[place])

    @property
    def step(self) -> int:
        """Last logged step."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Resolved configuration as nested dictionaries, not validated."""
        try:
            path = self.folder / "config.yaml"
            return read_yaml(read_text(path, "configuration"), str(path))
        except ConfigError:
            return {}

    def setting(self, name: str, default: Any = None) -> Any:
        """A configuration value by its dotted name."""
        return flatten(self.config).get(name, default)

    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from the defaults: name -> (value, default)."""
        defaults = flatten(config_to_dict(Config()))
        return {
            name: (value, defaults.get(name))
            for name, value in flatten(self.config).items()
            if value != defaults.get(name)
        }

    @cached_property
    def versions(self) -> list[dict[str, Any]]:
        """One record per start."""
        found = RunFolder(self.folder).read_versions()
        return [record for record in found if isinstance(record, dict)]

    @cached_property
    def pictures(self) -> list[tuple[int, Path]]:
        """(step, file), in order."""
        found = []
        for path in sorted((self.folder / pictures.FOLDER).glob("step-*.png")):
            step = path.stem.removeprefix("step-")
            if step.isdigit() and int(step) <= max(self.step, 0):
                found.append((int(step), path))
        return found

    @property
    def skip_files(self) -> list[Path]:
        """Lists of skipped files, that of the first rank first."""
        return sorted(self.folder.glob("skipped*.txt"), key=lambda path: (len(path.name), path.name))

    @cached_property
    def skips(self) -> dict[str, list[str]]:
        """Lines of the skipped files by reason, each file once, commonest reason first."""
        found: dict[str, dict[str, None]] = {}
        for path in self.skip_files:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                match = _SKIP.search(line)
                found.setdefault(match[1] if match else "other", {})[line] = None
        return {reason: list(lines) for reason, lines in sorted(found.items(), key=lambda item: -len(item[1]))}

    @cached_property
    def checkpoints(self) -> list[CheckpointRecord]:
        parent = self.folder / "checkpoints"
        ranked = read_best(parent)
        scores = {step: score for score, step in ranked}
        found = []
        for path in list_checkpoints(parent):
            try:
                size = sum(file.stat().st_size for file in path.iterdir())
                written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
            except OSError:  # deleted by the running training meanwhile
                continue
            digits = path.name.rpartition("-")[2]
            step = int(digits) if digits.isdecimal() else -1
            best = bool(ranked) and ranked[0][1] == step
            found.append(CheckpointRecord(path.name, written, size, scores.get(step), best))
        return found

    @cached_property
    def bad_batches(self) -> list[Path]:
        return sorted((self.folder / bad_batches.FOLDER).glob("step-*.safetensors"))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
