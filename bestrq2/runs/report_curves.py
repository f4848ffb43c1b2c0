"""The curves of one or several runs, as a figure of many small panels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bestrq2.charts import chart_label, plain_text

from .record import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS, PANEL = 3, (4.8, 3.1)  # panels in a row; inches of one
POINTS = 1500  # of a curve: a line has no more pixels
COLOURS = ("#1f6fb4", "#e07b00", "#2a9d4a", "#c0392b", "#7d52b5", "#0c9aa5", "#b8860b", "#d35db3", "#6b6b6b", "#111111")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")
BASELINE, BASELINE_COLOUR = "unigram", "#6b6b6b"


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    Attributes:
        title, unit: texts of the panel and its y axis.
        curves: (column or pattern of columns, label); "{}" in a label is what the pattern's group matched.
        scale: factor on the values, 100 for percent.
        log: logarithmic y axis, if all values are positive.
        from_zero: the y axis begins at 0.
        noisy: many points are drawn faintly, with their running mean.
        only_if_nonzero: left out when all its values are 0.
    """

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    scale: float = 1.0
    log: bool = False
    from_zero: bool = False
    noisy: bool = False
    only_if_nonzero: bool = False


PANELS = (
    Panel("Loss", "masked cross-entropy (nats)", (("loss", "training"), ("validation/loss", "validation")), noisy=True),
    Panel(
        "Masked accuracy",
        "% of masked patches",
        (("accuracy", "training"), ("validation/accuracy", "validation"), ("unigram", "always the commonest code")),
        scale=100,
        from_zero=True,
        noisy=True,
    ),
    Panel("Target codes", "codes", (("perplexity", "perplexity"), ("codes_used", "codes used")), log=True),
    Panel("Perplexity of each codebook", "codes", ((r"perplexity/(\d+)", "codebook {}"),), from_zero=True),
    Panel("Codes used of each codebook", "codes", ((r"codes_used/(\d+)", "codebook {}"),), from_zero=True),
    Panel("Commonest code of each codebook", "% of patches", ((r"unigram/(\d+)", "codebook {}"),), 100, from_zero=True),
    Panel("Probes", "score", ((r"probe/(.+)", "{}"),)),
    Panel("Validation, other", "", ((r"validation/(?!loss$|accuracy$)(.+)", "{}"),)),
    Panel("Loss of whole clips", "cross-entropy (nats)", (("clip_loss", ""),), noisy=True),
    Panel("Output of each block", "RMS", ((r"health/rms/(\d+)", "block {}"),), log=True),
    Panel("Effective rank of the features", "directions", (("health/effective_rank", ""),), from_zero=True),
    Panel("Gradient norm", "before clipping", (("grad_norm", ""),), log=True, noisy=True),
    Panel("Learning rate", "", (("learning_rate", ""),), from_zero=True),
    Panel("Throughput", "seconds of audio per second", (("audio_seconds_per_second", ""),), from_zero=True, noisy=True),
    Panel("Utilisation (MFU)", "% of peak FLOP/s", (("mfu", ""),), scale=100, from_zero=True, noisy=True),
    Panel("Waiting for data", "% of the time", (("data_wait", ""),), scale=100, from_zero=True, noisy=True),
    Panel(
        "Peak memory", "GiB", (("memory_gib", "resident, CPU"), ("cuda_memory_gib", "allocated, GPU")), from_zero=True
    ),
    Panel(
        "Mask and padding",
        "%",
        (
            ("mask_ratio", "masked patches"),
            ("touching_share", "of these beside a visible one"),
            ("padding_share", "padding"),
        ),
        scale=100,
        from_zero=True,
        noisy=True,
    ),
    Panel(
        "Skipped so far",
        "count",
        (("skipped_files", "files"), ("skipped_steps", "updates"), (r"skipped/(.+)", "files: {}")),
        from_zero=True,
        only_if_nonzero=True,
    ),
)
QUIET = {"step", "audio_seconds", "elapsed_seconds"}  # columns that are no curve of their own


@plain_text()
def draw_curves(path: Path, runs: list[RunRecord], title: str) -> bool:
    """Write a PNG with every curve that has data; columns without a panel get their own.

    With several runs, each has a colour and the curves of a panel differ by line style. Returns False, and writes
    nothing, when nothing was logged yet.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in [*PANELS, *_unknown(runs)] if _has_data(panel, runs)]
    if not panels:
        return False
    rows = -(-len(panels) // COLUMNS)
    top = 0.9 if len(runs) == 1 else 1.2
    width, height = PANEL[0] * COLUMNS, PANEL[1] * rows + top - 0.3
    figure = Figure(figsize=(width, height))
    # Fixed margins in inches: an automatic layout takes as long as the drawing.
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        bottom=0.55 / height,
        top=1 - top / height,
        wspace=0.75 / (PANEL[0] - 0.75),
        hspace=0.85 / (PANEL[1] - 0.85),
    )
    figure.suptitle(chart_label(title), fontsize=15, y=1 - 0.3 / height)
    all_axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis, panel in zip(all_axes, panels):
        _draw_panel(axis, panel, runs)
    for axis in all_axes[len(panels) :]:
        axis.remove()
    if len(runs) > 1:
        _name_runs(figure, runs, height)
    figure.savefig(path, format="png", dpi=95)
    return True


def _name_runs(figure, runs: list[RunRecord], height: float) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_colour(k), linewidth=3, label=chart_label(run.name)) for k, run in enumerate(runs)]
    place = (0.5, 1 - 0.42 / height)
    figure.legend(handles=handles, loc="upper center", bbox_to_anchor=place, ncols=5, frameon=False, fontsize=11)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _matches(panel: Panel, columns: list[str]) -> list[tuple[str, str]]:
    """(column, label) of the panel's curves among ``columns``."""
    found = []
    for pattern, label in panel.curves:
        for name in columns:
            if match := re.fullmatch(pattern, name):
                found.append((name, label.format(*match.groups())))
    return found


def _unknown(runs: list[RunRecord]) -> list[Panel]:
    """One panel for each column without a panel, or for all of them with the same name before a slash."""
    names = dict.fromkeys(name for run in runs for name in run.columns)
    known = {name for panel in PANELS for name, _ in _matches(panel, list(names))} | QUIET
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name not in known:
            group, _, label = name.partition("/")
            groups.setdefault(group, []).append((re.escape(name), label.replace("{", "{{").replace("}", "}}")))
    return [Panel(group, "", tuple(curves)) for group, curves in groups.items()]


def _has_data(panel: Panel, runs: list[RunRecord]) -> bool:
    for run in runs:
        for name, _ in _matches(panel, run.columns):
            values = run.series(name)[1]
            if np.isfinite(values).any() and (values.any() or not panel.only_if_nonzero):
                return True
    return False


def _draw_panel(axis: Axes, panel: Panel, runs: list[RunRecord]) -> None:
    positive, labelled, largest = True, False, 0.0
    names = list(dict.fromkeys(match for run in runs for match in _matches(panel, run.columns)))
    if panel.only_if_nonzero:
        names = [match for match in names if any(run.series(match[0])[1].any() for run in runs)]
    for number, run in enumerate(runs):
        for place, (name, label) in enumerate(names):
            label = chart_label(label)
            steps, values = run.series(name)
            if not steps.size:
                continue
            values = values * panel.scale
            if len(runs) > 1:
                colour, style = _colour(number), STYLES[place % len(STYLES)]
            elif name == BASELINE:
                colour, style = BASELINE_COLOUR, "--"
            else:
                colour, style = _colour(place), "-"
            _draw_curve(axis, steps, values, colour, style, label, panel.noisy)
            labelled = labelled or bool(label)
            finite = values[np.isfinite(values)]
            positive = positive and bool((finite > 0).all())
            largest = max(largest, float(finite.max(initial=0.0)))
    axis.set_title(chart_label(panel.title), fontsize=12)
    axis.set_ylabel(panel.unit, fontsize=10)
    axis.yaxis.set_label_coords(-0.13, 0.5)
    axis.set_xlabel("step", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.ticklabel_format(axis="x", style="plain")
    axis.grid(alpha=0.3)
    if panel.log and positive:
        axis.set_yscale("log")
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter(_log_label)
    elif panel.from_zero:
        axis.set_ylim(0, max(1.08 * largest, 1e-12))
    if panel.title == "Target codes" and len({run.setting("model.targets.codebook_size") for run in runs}) == 1:
        size = runs[0].setting("model.targets.codebook_size")
        if isinstance(size, int):
            axis.axhline(size, color="#888888", linestyle=":", label=f"codebook ({size})")
    if labelled:
        if len(runs) > 1:
            _legend_of_styles(axis, [label for _, label in names])
        else:
            axis.legend(fontsize=9, framealpha=0.7, ncols=2 if len(names) > 6 else 1)


def _legend_of_styles(axis: Axes, labels: list[str]) -> None:
    from matplotlib.lines import Line2D

    if len(labels) > 1:
        styles = [
            Line2D([], [], color="#444444", linestyle=STYLES[k % len(STYLES)], label=label)
            for k, label in enumerate(labels)
        ]
        axis.legend(handles=styles, fontsize=9, framealpha=0.7)


def _log_label(value: float, _: float) -> str:
    """Ticks of a logarithmic axis: 1, 2 and 5 times a power of ten, written plainly."""
    leading = f"{value:.0e}"[0]
    return f"{value:g}" if leading in "125" else ""


def _draw_curve(
    axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, style: str, label: str, noisy: bool
) -> None:
    every = -(-len(steps) // POINTS)
    if len(steps) < 60 or not noisy:
        marker = "o" if len(steps) < 15 else None
        shown = slice(None, None, every)
        axis.plot(steps[shown], values[shown], style, color=colour, label=label, lw=1.6, marker=marker, markersize=3)
        return
    axis.plot(steps[::every], values[::every], style, color=colour, alpha=0.25, linewidth=0.8)
    smooth = running_mean(values, max(5, len(values) // 50))
    axis.plot(steps[::every], smooth[::every], style, color=colour, label=label, linewidth=1.6)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over ``window`` values, over fewer near the ends; what is not finite is left out of it."""
    finite = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(values))
    half = window // 2
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)
