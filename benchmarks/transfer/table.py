"""Scores as one CSV, one table with intervals and paired differences, and one picture.

Two kinds of uncertainty are kept apart. Brackets are 95 % bootstrap intervals over groups of test clips, seeds
averaged: would other clips say the same? ``+-`` is half a 95 % t interval over training seeds: would another run say
the same? It needs at least two seeds. A difference counts only if it is outside of both.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.transfer.plan import Plan
from benchmarks.transfer.scores import BASELINE, Score
from bestrq2.charts import chart_label, plain_text
from bestrq2.durability import whole_file
from bestrq2.probing.features import ENCODER, RANDOM
from bestrq2.probing.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEAN = "mean"
_COLUMNS = ("candidate", "seed", "features", "task", "metric", "chance", "value", "low", "high")


@dataclass(frozen=True)
class Cell:
    """A score in percent: the mean over seeds, its interval over test clips, and half of that over seeds (NaN: one)."""

    value: float
    low: float
    high: float
    spread: float

    def text(self, sign: str = "") -> str:
        spread = "" if np.isnan(self.spread) else f" +-{self.spread:.1f}"
        return f"{self.value:{sign}.1f}{spread} [{self.low:{sign}.1f}, {self.high:{sign}.1f}]"

    @property
    def sure(self) -> bool:
        """Return True if a difference is outside of both intervals; never with a single seed."""
        outside = self.low > 0 or self.high < 0
        return outside and not np.isnan(self.spread) and abs(self.value) > self.spread


def half_interval(values: np.ndarray) -> float:
    """Half of the 95 % t interval of the mean of ``(K,)`` values; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan")
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


class Results:
    """Scores of a comparison by what they are of.

    Args:
        plan: whose order of candidates and tasks is kept.
        tasks: names.
        scores: of all runs that are done.
    """

    def __init__(self, plan: Plan, tasks: Sequence[str], scores: Sequence[Score]) -> None:
        self.plan, self.tasks = plan, list(tasks)
        self.of = {(s.candidate, s.features, s.seed, s.task): s for s in scores}
        names = [candidate.name for candidate in plan.candidates]
        rows = [(name, features) for name in names for features in (ENCODER, RANDOM)]
        self.rows = [row for row in [*rows, (BASELINE, BASELINE)] if self.seeds(row)]

    def seeds(self, row: tuple[str, str]) -> list[int]:
        """Seeds for which every task has a score."""
        found = {seed for name, features, seed, _ in self.of if (name, features) == row}
        return sorted(seed for seed in found if all((*row, seed, task) in self.of for task in self.tasks))

    def _numbers(self, row: tuple[str, str], seed: int, task: str) -> tuple[float, np.ndarray]:
        tasks = self.tasks if task == MEAN else [task]
        chosen = [self.of[(*row, seed, name)] for name in tasks]
        return float(np.mean([s.value for s in chosen])), np.mean([s.samples for s in chosen], axis=0)

    def cell(self, row: tuple[str, str], task: str) -> Cell:
        return _cell([self._numbers(row, seed, task) for seed in self.seeds(row)])

    def difference(self, row: tuple[str, str], other: tuple[str, str], task: str) -> Cell | None:
        """``row - other``, seed by seed and resample by resample; a baseline without seeds is the same for each."""
        seeds = self.seeds(row)
        if other[0] != BASELINE:
            seeds = [seed for seed in seeds if seed in self.seeds(other)]
        if not seeds:
            return None
        pairs = []
        for seed in seeds:
            own, known = self._numbers(row, seed, task), self._numbers(other, 0 if other[0] == BASELINE else seed, task)
            pairs.append((own[0] - known[0], own[1] - known[1]))
        return _cell(pairs)


def _cell(numbers: Sequence[tuple[float, np.ndarray]]) -> Cell:
    values = 100 * np.array([value for value, _ in numbers])
    whole = Estimate.of(float(values.mean()), 100 * np.mean([samples for _, samples in numbers], axis=0))
    return Cell(whole.value, whole.low, whole.high, half_interval(values))


def title(row: tuple[str, str]) -> str:
    """Name of a row, as it is drawn."""
    name, features = chart_label(row[0]), row[1]
    return name if features in (ENCODER, BASELINE) else f"{name}, untrained"


def _cell_of(name: str) -> str:
    """A name in a table of Markdown, where a bar ends a cell."""
    return name.replace("|", "\\|")


def text(results: Results) -> str:
    """The table in Markdown: scores in percent, then the mean's paired differences."""
    columns = [*results.tasks, MEAN]
    heads = " | ".join(map(_cell_of, columns))
    lines = [f"| features | seeds | {heads} |", "|---" * (len(columns) + 2) + "|"]
    for row in results.rows:
        cells = [results.cell(row, task).text() for task in columns]
        count = "-" if row[0] == BASELINE else str(len(results.seeds(row)))
        lines.append(f"| {_cell_of(title(row))} | {count} | " + " | ".join(cells) + " |")
    first = (results.plan.candidates[0].name, ENCODER)
    lines += ["", f"| paired difference | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for row in results.rows:
        if row[1] != ENCODER:
            continue
        for other in (first, (row[0], RANDOM), (BASELINE, BASELINE)):
            if other == row or other not in results.rows:
                continue
            gaps = [results.difference(row, other, task) for task in columns]
            cells = ["" if gap is None else gap.text("+") + (" *" if gap.sure else "") for gap in gaps]
            lines.append(f"| {_cell_of(title(row))} - {_cell_of(title(other))} | " + " | ".join(cells) + " |")
    lines += ["", "Brackets: 95 % over test clips. +-: 95 % over seeds. *: outside of both."]
    return "\n".join(lines)


def write_csv(path: Path, scores: Sequence[Score], facts: dict[str, Any]) -> None:
    """One row a score, with the run's facts and those of the comparison; written at once."""
    run_columns = sorted({key for score in scores for key in score.run})
    with whole_file(path) as file:
        writer = csv.writer(file)
        writer.writerow([*_COLUMNS, *run_columns, *facts])
        for score in scores:
            own = [score.run.get(key, "") for key in run_columns]
            numbers = [f"{getattr(score, name):.5f}" for name in ("chance", "value", "low", "high")]
            row = [score.candidate, score.seed, score.features, score.task, score.metric, *numbers]
            writer.writerow([*row, *own, *facts.values()])


def draw(path: Path, results: Results) -> None:
    """A row for every kind of features, a panel for every task and for the mean: interval over clips, seeds as dots."""
    with plain_text(), whole_file(path, "wb") as file:
        _figure(results).savefig(file, format="png", dpi=120)


def _figure(results: Results) -> "Figure":
    from matplotlib.figure import Figure

    columns = [MEAN, *results.tasks]
    height = 1.2 + 0.32 * len(results.rows)
    figure = Figure(figsize=(2.1 * len(columns) + 2.5, height), layout="constrained")
    for number, (axes, task) in enumerate(
        zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns)
    ):
        for place, row in enumerate(results.rows):
            cell = results.cell(row, task)
            colour = {ENCODER: "C0", RANDOM: "C7"}.get(row[1], "C1")
            axes.plot([cell.low, cell.high], [place, place], color=colour, linewidth=1)
            axes.plot(cell.value, place, "o", color=colour, markersize=6)
            seeds = [100 * results._numbers(row, seed, task)[0] for seed in results.seeds(row)]
            axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=9)
        axes.set_title(chart_label(task), fontsize=9)
        axes.set_xlabel("%", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        if number == 0:
            axes.set_yticks(range(len(results.rows)), [title(row) for row in results.rows], fontsize=8)
            axes.invert_yaxis()
    figure.suptitle(f"{chart_label(results.plan.name)}: bars 95 % over test clips, ticks seeds", fontsize=9)
    return figure
