"""Schedule of checkpoints: when to write them, which to keep, and retries after a failed write."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor

from bestrq2.config import Config, config_to_dict
from bestrq2.errors import CheckpointError, system_reason
from bestrq2.runs.best import BEST, Measure, measure_of, ranked, read_scores, write_best
from bestrq2.runs.checkpoint import Checkpoint, folder_name, save_checkpoint
from bestrq2.runs.folder import RunFolder

from .state import Snapshot

logger = logging.getLogger(__name__)


class Saver:
    """Writes snapshots, on the first rank, one at a time, beside training if ``train.async_save``.

    A checkpoint appears under its name only when it is whole and on the disk, however the process ends. A failure (a
    full disk) is reported at once; training continues, because a later save may succeed. The scores for
    ``keep_best`` are in every checkpoint, so a kill between a checkpoint and the note about it loses nothing. Where a
    resumed run measures another loss, its best is found anew, and the best of the loss before stays.

    Args:
        step: that the run starts from.
        writes: only the first rank does.
        held_out: digest of the held-out clips, None without any.

    Attributes:
        saved_step: of the last checkpoint that was begun, at first the step the run started from.
        problem: why the last checkpoint could not be written, or None.
        scored: whether a checkpoint of this run has a loss that compares.
    """

    def __init__(
        self, run: RunFolder, config: Config, step: int, writes: bool = True, held_out: str | None = None
    ) -> None:
        self.parent, self.config, self.settings, self.writes = run.checkpoints, config, config.train, writes
        self.problem: CheckpointError | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last = time.monotonic()
        self.saved_step = step
        self.measure = measure_of(config_to_dict(config), held_out)
        self.scored = False
        self._best: list[tuple[float, int]] = []
        self._earlier: list[int] = []  # steps of the best by other measures

    def begin(self) -> None:
        """Go on from the checkpoints that the run has; the time until the next one is due begins."""
        self._last = time.monotonic()
        scores = [score for score in read_scores(self.parent) if score.step <= self.saved_step]
        comparing, *others = ranked(scores, self.measure)
        self.scored = bool(comparing)
        self._best, *earlier = [group[: self.settings.keep_best] for group in (comparing, *others)]
        self._earlier = [step for group in earlier for _, step in group]
        if self.writes and self.settings.keep_best and scores:
            self._tell_changes(scores[-1].measure)
        if self.writes and self._best:  # after a kill between a checkpoint and this note
            self._note_best()

    def changed_since(self, checkpoint: Checkpoint) -> bool:
        """Return True if losses do not compare with those before the checkpoint."""
        return bool(measure_of(checkpoint.config, checkpoint.extra.get("held_out")).changes(self.measure))

    def overdue(self) -> bool:
        """Return True if ``train.save_minutes`` have passed. The clock is monotonic: setting the time has no effect."""
        return 0 < self.settings.save_minutes * 60 <= time.monotonic() - self._last

    def save(self, snapshot: Snapshot, value: float | None, wait: bool) -> None:
        """Write a snapshot; ``value`` (lower is better) decides about ``keep_best``."""
        self.finish()
        self.scored = self.scored or value is not None
        self._last, self.saved_step = time.monotonic(), snapshot.step
        self._pending = self._pool.submit(self._write, snapshot, value)
        if wait or not self.settings.async_save:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self.finish()
        self._pool.shutdown()

    def _write(self, snapshot: Snapshot, value: float | None) -> None:
        best = [entry for entry in self._best if entry[1] != snapshot.step]
        if value is not None and value == value:
            best = sorted([*best, (value, snapshot.step)])[: self.settings.keep_best]
        # While steps are not finite the newest weights may be ruined: nothing is deleted for them.
        keep_last = 2**31 if snapshot.extra.get("bad_in_a_row") else self.settings.keep_last
        extra = snapshot.extra | {"score": value, "held_out": self.measure.clips}
        try:
            save_checkpoint(
                self.parent,
                snapshot.step,
                snapshot.weights,
                snapshot.training,
                config_to_dict(self.config),
                extra,
                keep_last,
                snapshot.averaged,
                [folder_name(step) for step in (*self._earlier, *(step for _, step in best))],
            )
            self._best, self.problem = best, None
            if best:
                self._note_best()
        except CheckpointError as error:
            self.problem = error
            logger.error("%s", error)
        except Exception as error:  # no memory for the bytes, say: as a full disk, it may pass
            self.problem = CheckpointError(
                f"could not save the checkpoint of step {snapshot.step}: {type(error).__name__}: {error}"
            )
            logger.error("%s", self.problem)

    def _tell_changes(self, before: Measure) -> None:
        if changes := before.changes(self.measure):
            kept = ", ".join(folder_name(step) for step in self._earlier)
            begins = f"goes on from {folder_name(self._best[0][1])}" if self._best else "begins anew"
            logger.info(
                f"note: losses do not compare with those before ({', '.join(changes)}): train.keep_best {begins}, and "
                f"the best before stays ({kept})"
            )

    def _note_best(self) -> None:
        try:
            write_best(self.parent, self._best)
        except OSError as error:  # the checkpoints are whole; only the note about them is not
            logger.warning(f"{self.parent / BEST} could not be written: {system_reason(error)}")
