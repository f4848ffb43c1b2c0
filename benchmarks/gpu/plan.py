"""The stages of a GPU run, in their order, and what every stage is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """``seconds`` is its share of a run of 570 s, or with ``fixed`` its deadline. It runs
    ``python -m benchmarks.gpu.<module>``."""

    name: str
    seconds: float
    module: str
    background: bool = False  # beside the stages that follow, until the last of them
    fixed: bool = False


STAGES = (
    Stage("facts", 10, "facts"),
    Stage("build", 150, "build", background=True),
    Stage("warm", 40, "warm"),
    Stage("smoke", 40, "smoke"),
    Stage("rows", 245, "rows"),  # 40 s for each of its groups
    Stage("step", 120, "training_step"),  # 40 s for ours, 80 for those of peers
    Stage("tests", 60, "gpu_tests"),
    Stage("tune", 20, "tiles"),
    Stage("rows-tuned", 10, "rows"),
    Stage("train", 15, "short_run"),
    Stage("sanitizer", 5, "sanitizer"),
)
INTERPRETED = ("warm", "smoke", "rows", "tune", "rows-tuned", "sanitizer")
"""Stages of a rehearsal whose kernels run in Triton's interpreter."""

ROOT = Path(__file__).resolve().parents[2]
PACK_SECONDS = 5.0  # for the last summary and the archive of the logs


@dataclass(frozen=True)
class RunOptions:
    """Options of the command line."""

    out: Path
    seconds: float
    wheels: Path | None = None
    commit: str | None = None
    rehearse: bool = False


@dataclass
class Request:
    """Request to a stage, as JSON in a file that its command line names."""

    stage: str
    out: Path
    work: Path  # logs, notes and caches; not among the results
    seconds: float  # until its deadline
    rehearse: bool
    commit: str | None = None
    device: str = "cuda"
    notes: dict[str, Any] = field(default_factory=dict)  # what earlier stages left, by stage
    started: float = field(default_factory=time.monotonic)

    def write(self, path: Path) -> None:
        values = asdict(self) | {"out": str(self.out), "work": str(self.work)}
        path.write_text(json.dumps(values))

    def left(self) -> float:
        """Seconds until the deadline; 0 or less: stop now."""
        return self.seconds - (time.monotonic() - self.started)

    def note(self, values: Mapping[str, Any]) -> None:
        """Leave something for later stages and the summary; replaces the note of this stage."""
        path = self.work / f"{self.stage}.note.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(dict(values)))
        temporary.replace(path)

    @property
    def broken(self) -> list[str]:
        """Operations that failed the smoke test."""
        return list(self.notes.get("smoke", {}).get("broken", []))


def read_request(path: Path) -> Request:
    values = json.loads(path.read_text())
    values |= {"out": Path(values["out"]), "work": Path(values["work"]), "started": time.monotonic()}
    return Request(**values)


def read_notes(work: Path) -> dict[str, Any]:
    """Notes that the stages so far have left, by stage; an unreadable note is left out."""
    return dict(_notes(work))


def _notes(work: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(work.glob("*.note.json")):
        try:
            yield path.name.removesuffix(".note.json"), json.loads(path.read_text())
        except (OSError, ValueError):
            continue


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
