"""When checkpoints are written, which are kept, and that none is lost on the way."""

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from bestrq2.checkpoint import PREFIX, CheckpointError, save_checkpoint
from bestrq2.config import Config, config_to_dict

from .run_folder import RunFolder
from .state import Snapshot

BEST = "best.json"


class Saver:
    """Writes snapshots, on the first rank, one at a time, beside training if ``train.async_save``.

    A checkpoint appears under its name only when it is whole and on the disk, however the process ends. A failure (a
    full disk) is said at once; training goes on, because a later save may succeed.

    Attributes:
        problem: why the last checkpoint could not be written, or None.
    """

    def __init__(self, run: RunFolder, config: Config, step: int) -> None:
        self.parent, self.config, self.settings = run.checkpoints, config, config.train
        self.problem: CheckpointError | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last = time.monotonic()
        self._best = [entry for entry in read_best(self.parent) if entry[1] <= step]

    def overdue(self) -> bool:
        """Whether ``train.save_minutes`` have passed. A monotonic clock: setting the time changes nothing."""
        return 0 < self.settings.save_minutes * 60 <= time.monotonic() - self._last

    def save(self, snapshot: Snapshot, value: float | None, wait: bool) -> None:
        """Write a snapshot; ``value`` (lower is better) decides about ``keep_best``."""
        self.finish()
        self._last = time.monotonic()
        self._pending = self._pool.submit(self._write, snapshot, value)
        if wait or not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.finish()
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot, value: float | None) -> None:
        best = [entry for entry in self._best if entry[1] != snapshot.step]
        if value is not None and value == value:
            best = sorted([*best, (value, snapshot.step)])[: self.settings.keep_best]
        try:
            save_checkpoint(
                self.parent,
                snapshot.step,
                snapshot.weights,
                snapshot.training,
                config_to_dict(self.config),
                snapshot.extra,
                self.settings.keep_last,
                snapshot.averaged,
                [folder_name(step) for _, step in best],
            )
            self._best = best
            if best:
                write_best(self.parent, best)
            self.problem = None
        except CheckpointError as error:
            self.problem = error
            tqdm.write(f"error: {error}")
        except OSError as error:  # the checkpoint is whole; only the note about the best ones is not
            tqdm.write(f"warning: {self.parent / BEST} could not be written: {error}")


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def read_best(parent: Path) -> list[tuple[float, int]]:
    """(value, step) of the best checkpoints that still exist, best first."""
    try:
        entries = json.loads((parent / BEST).read_text())
        found = [(float(entry["value"]), int(entry["step"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return sorted(entry for entry in found if (parent / folder_name(entry[1])).is_dir())


def write_best(parent: Path, best: list[tuple[float, int]]) -> None:
    """Record the best checkpoints, and let the link ``best`` point to the first."""
    partial = parent / f"{BEST}.partial"
    partial.write_text(json.dumps([{"value": value, "step": step} for value, step in best]) + "\n")
    partial.replace(parent / BEST)
    link = parent / ".best.partial"
    link.unlink(missing_ok=True)
    os.symlink(folder_name(best[0][1]), link)
    link.replace(parent / "best")
