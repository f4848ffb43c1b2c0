"""Labels and features brought together: the clips that could be read, their folds, and one matrix per features."""

from dataclasses import dataclass, field, replace

import numpy as np

from bestrq2.config import ConfigError

from .evaluation import Outcome, Rows, chance, clip_rows, frame_rows, probe_features, probe_retrieval
from .events import behind_the_end
from .features import Features
from .folds import NEVER, make_folds
from .labels import LabelledClips, settle
from .task import ProbeTask

FEW_GROUPS = 10


@dataclass
class Experiment:
    """
    Attributes:
        task: what is asked.
        clips: those that can be used.
        folds: ``(N,)`` fold in which a clip is tested; empty for retrieval.
        rows: what heads are fitted to; None for retrieval.
        values: matrix ``(rows, D)`` of every kind of features, by name.
        seconds: of every clip.
        parts: by name, how many layers the head weights.
    """

    task: ProbeTask
    clips: LabelledClips
    folds: np.ndarray
    rows: Rows | None
    values: dict[str, np.ndarray]
    seconds: list[float]
    parts: dict[str, int] = field(default_factory=dict)

    def probe(self, name: str, head: str) -> Outcome:
        """One head on one kind of features; retrieval has no head."""
        if self.rows is None:
            return probe_retrieval(self.values[name], self.clips, self.task)
        parts = self.parts.get(name, 1)
        return probe_features(self.values[name], self.rows, self.clips, self.seconds, self.task, head, parts)

    def chance(self, outcome: Outcome) -> float:
        return chance(self.rows, outcome)


def assemble(labels: LabelledClips, features: Features, task: ProbeTask, hop: float) -> Experiment:
    """
    Args:
        labels: of all clips, as :func:`~bestrq2.probing.labels.read_clips` gives them.
        features: of those among them that could be read; ``hop`` is theirs, in seconds, if they are frames.

    Raises:
        ConfigError: if too little is left to train on and test.
    """
    readable = labels.take(features.usable)
    for skip in features.skips:
        readable.left_out[f"unreadable: {skip.reason}"] += 1
    lost: list[str] = []
    if task.kind == "events":
        readable, lost = _audible(readable, features.seconds)
    try:
        clips, kept = settle(readable, task)
    except ConfigError as error:
        raise ConfigError("; ".join([str(error), *lost])) from error
    clips.warnings += lost
    per_clip = {name: [values[i] for i in kept] for name, values in features.of.items()}
    seconds = [features.seconds[i] for i in kept]
    if task.kind == "retrieval":
        values = {name: np.stack(rows).astype(np.float64) for name, rows in per_clip.items()}
        return Experiment(task, clips, np.zeros(0, np.int64), None, values, seconds, features.parts)
    folds = make_folds(clips, task)
    tested = len(np.unique(clips.groups[folds != NEVER]))
    if tested < FEW_GROUPS:
        clips.warnings.append(f"only {tested} groups are tested: their intervals say little")
    if task.kind == "events":
        counts = [len(frames) for frames in next(iter(per_clip.values()))]
        rows = frame_rows(clips, folds, counts, hop)
        values = {name: np.concatenate(frames) for name, frames in per_clip.items()}
    else:
        rows = clip_rows(clips, folds)
        values = {name: np.stack(vectors).astype(np.float64) for name, vectors in per_clip.items()}
    return Experiment(task, clips, folds, rows, values, seconds, features.parts)


def _audible(clips: LabelledClips, seconds: list[float]) -> tuple[LabelledClips, list[str]]:
    """The clips without the events that begin behind their end: no frame has them, so they make no class testable. And
    a warning, if there are any."""
    lost = behind_the_end(clips.events, seconds, [file.path for file in clips.files])
    events = [rows[rows[:, 0] < length] for rows, length in zip(clips.events, seconds)]
    targets = np.zeros_like(clips.targets)
    for row, found in enumerate(events):
        targets[row, found[:, 2].astype(int)] = True
    return replace(clips, events=events, targets=targets), lost
