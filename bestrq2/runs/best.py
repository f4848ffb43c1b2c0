"""The best checkpoints of a run: those of the lowest loss, among losses that compare."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bestrq2.config import Config, config_to_dict
from bestrq2.config.describing import shown
from bestrq2.errors import CheckpointError

from .checkpoint import folder_name, list_checkpoints, read_state

BEST = "best.json"
# What may change on resume and gives the loss another meaning.
_CLIPS = ("validation.source", "validation.clips")
_OF_ALL = (
    "model.masking.ratio",
    "model.masking.span_length",
    "model.masking.shared_per_batch",
    "model.masking.noise_std",
    "model.encoder.conformer.chunk_size",
    "model.encoder.conformer.left_context",
    "model.encoder.conformer.chunk_training",
)
_OF_TRAINING = ("model.encoder.dropout", "model.encoder.drop_path", "model.predictor.dropout")


@dataclass(frozen=True)
class Measure:
    """Everything that a loss was measured with, beside the weights.

    Attributes:
        settings: by key, those of :func:`measure_of`.
        clips: digest of the held-out clips; None without any, or where an earlier version wrote none.
    """

    settings: Mapping[str, Any]
    clips: str | None

    def changes(self, later: "Measure") -> list[str]:
        """Reasons why a later loss does not compare, as ``key: old -> new``."""
        known = self.clips is not None and later.clips is not None
        same = known and self.clips == later.clips  # wherever they are by now
        changed = [
            f"{key}: {shown(old)} -> {shown(later.settings[key])}"
            for key, old in self.settings.items()
            if key in later.settings and old != later.settings[key] and not (same and key in _CLIPS)
        ]
        others = known and not same and not any(text.startswith(_CLIPS) for text in changed)
        return [*changed, "other files in validation.source"] if others else changed


class Score(NamedTuple):
    value: float
    step: int
    measure: Measure


def measure_of(config: Mapping[str, Any], clips: str | None) -> Measure:
    """The measure of a run with this configuration, as a checkpoint holds it, perhaps of an earlier version."""
    source = _value(config, "validation.source")
    keys = (*_CLIPS, *_OF_ALL, *(_OF_TRAINING if source is None else ()))
    settings = {key: _value(config, key) for key in keys}
    if source is None:
        del settings["validation.clips"]
    return Measure(settings, clips)


def read_scores(parent: Path) -> list[Score]:
    """The loss of every intact checkpoint that has one, oldest first.

    Raises:
        CheckpointError: if one may not be read.
    """
    found = []
    for folder in list_checkpoints(parent):
        try:
            state = read_state(folder)
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            continue
        value = state["extra"].get("score")
        if isinstance(value, (int, float)) and value == value:
            measure = measure_of(state["config"], state["extra"].get("held_out"))
            found.append(Score(float(value), state["step"], measure))
    return found


def ranked(scores: Sequence[Score], measure: Measure | None = None) -> list[list[tuple[float, int]]]:
    """(value, step), best first, in one list for every measure: first that of ``measure``, by default the last one's,
    which may be empty, then earlier ones."""
    groups: list[tuple[Measure, list[tuple[float, int]]]] = [] if measure is None else [(measure, [])]
    for value, step, own in reversed(scores):
        group = next((group for known, group in groups if not own.changes(known)), None)
        if group is None:
            groups.append((own, group := []))
        group.append((value, step))
    return [sorted(group) for _, group in groups] or [[]]


def read_best(parent: Path) -> list[tuple[float, int]]:
    """(value, step) of the checkpoints whose loss compares with the newest one, best first.

    Raises:
        CheckpointError: if one may not be read.
    """
    return ranked(read_scores(parent))[0]


def write_best(parent: Path, best: Sequence[tuple[float, int]]) -> None:
    """Record the best checkpoints, and let the link ``best`` point to the first."""
    partial = parent / f"{BEST}.partial"
    partial.write_text(json.dumps([{"value": value, "step": step} for value, step in best]) + "\n")
    partial.replace(parent / BEST)
    link = parent / ".best.partial"
    link.unlink(missing_ok=True)
    os.symlink(folder_name(best[0][1]), link)
    link.replace(parent / "best")


def _value(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found.get(name, _MISSING) if isinstance(found, Mapping) else _MISSING
    return _value(_DEFAULTS, key) if found is _MISSING else found


_MISSING, _DEFAULTS = object(), config_to_dict(Config())
