"""The log of training: rows of numbers and a progress bar."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from bestrq2.config import Config, config_to_dict
from bestrq2.console import progress_bar
from bestrq2.errors import REASONS
from bestrq2.hardware import memory_metrics
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import MetricsLog, skip_metrics

from .describe import postfix
from .distributed import Ranks
from .health import HealthCheck
from .state import TrainingState
from .step import StepTotals


class TrainingLog:
    """Rows of ``run`` and its progress bar. The first rank has them; elsewhere a call does what is collective alone.

    Nothing is written before :meth:`open`. Rates in a row are those since the row before, or since :meth:`begin`.

    Args:
        health: measured with the rows.
        peak: FLOP/s of one rank that utilisation is measured against.

    Attributes:
        rows: None before :meth:`open`, and on all ranks but the first.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        state: TrainingState,
        health: HealthCheck,
        ranks: Ranks,
        device: torch.device,
        peak: float,
    ) -> None:
        self.config, self.run, self.state, self.health = config, run, state, health
        self.ranks, self.device, self.peak = ranks, device, peak
        self.rows: MetricsLog | None = None
        self._bar = progress_bar(disable=True)  # until it is shown
        self._interval, self._began = StepTotals(), time.perf_counter()

    def open(self, last_step: int) -> None:
        """Open the files (a collective call); rows after ``last_step`` are dropped."""
        self.ranks.from_first(lambda: self._open(last_step))

    def _open(self, last_step: int) -> None:
        self.rows = MetricsLog(self.run.path, last_step, self.config.train.wandb, config_to_dict(self.config))

    def begin(self) -> None:
        """Begin an interval between two rows."""
        self._interval, self._began = StepTotals(), time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the body is left out of the rates: throughput is that of training."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    @contextmanager
    def showing(self, step: int) -> Iterator[None]:
        """Show the progress bar, from ``step`` on."""
        total, hidden = self.config.train.steps, not self.ranks.is_first
        with progress_bar(total=total, initial=step, unit="step", disable=hidden) as self._bar:
            yield

    def add(self, totals: StepTotals) -> None:
        """Add to the interval."""
        self._interval.add(totals)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        self._bar.update()

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Return True if a row of this step, written before a kill, has these numbers."""
        return self.rows is not None and self.rows.has(step, names)

    def write(self, row: Mapping[str, float]) -> None:
        """Write a row of measurements: ``step`` and any numbers."""
        if self.rows is not None:
            self.rows.write(row)

    def write_step(self, totals: StepTotals, learning_rate: float, grad_norm: float) -> None:
        """Write the row of a step and begin the next interval (a collective call)."""
        state, progress, interval = self.state, self.state.progress, self._interval
        usage = state.total_usage()
        skips = self.ranks.sum([state.skips.get(reason, 0) for reason in REASONS])
        memory = memory_metrics(self.device)
        memory = {name: max(self.ranks.gathered(value)) for name, value in memory.items()}
        with self.paused():
            health = self.health.measure(progress.step)
        if self.rows is None:
            return
        now = time.perf_counter()
        seconds = now - self._began
        row = {
            "step": progress.step,
            "loss": totals.mean_loss,
            "accuracy": totals.mean_accuracy,
            **usage.metrics(),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "mask_ratio": totals.realised_ratio,
            "padding_share": interval.padding_share,
            "audio_seconds": progress.audio_seconds,
            "audio_seconds_per_second": interval.audio_seconds / seconds,
            # The first batch of an interval is waited for at the end of the one before.
            "data_wait": min(1.0, interval.waited / seconds / self.ranks.size),
            "mfu": interval.flops / seconds / (self.peak * self.ranks.size),
            **memory,
            "skipped_files": progress.skipped_files,
            "skipped_steps": progress.skipped_steps,
            "elapsed_seconds": state.elapsed,
            "touching_share": totals.touching_share,
            **({"clip_loss": totals.mean_clip_loss} if state.model.clip_weight else {}),
            **health,
            **skip_metrics({reason: round(count) for reason, count in zip(REASONS, skips)}),
        }
        self.rows.write(row)
        self._bar.set_postfix_str(postfix(row), refresh=False)
        self._interval, self._began = StepTotals(), now

    def flush(self) -> None:
        """Hand everything to the system, so that a kill loses none of it."""
        if self.rows is not None:
            self.rows.flush()

    def close(self) -> None:
        if self.rows is not None:
            self.rows.close()
