"""One PNG per operation, drawn from a result file: milliseconds and peak memory of every provider at every shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.measure import Row, total_ms
from benchmarks.report import OURS, group_key

_OURS, _PEER, _WRONG = "#1b6ca8", "#9a9a9a", "#c0392b"


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Write ``<stem>_<op>.png`` for every operation among ``rows`` that has timings; return the paths."""
    images = []
    for op in dict.fromkeys(row["op"] for row in rows):
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row["op"] == op and total_ms(row) is not None:
                groups.setdefault((*group_key(row), row["cache"]), []).append(row)
        if groups:
            path = stem.with_name(f"{stem.name}_{op}.png")
            _figure(op, groups, path)
            images.append(path)
    return images


def _figure(op: str, groups: dict[tuple[str, ...], list[Row]], path: Path) -> None:
    heights = [len(group) + 1.6 for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        2,
        figsize=(13, 0.36 * sum(heights) + 0.9),
        squeeze=False,
        height_ratios=heights,
        width_ratios=(2, 1),
    )
    for (_, shape, dtype, cache), group, (time_axis, memory_axis) in zip(groups, groups.values(), axes):
        _times(time_axis, group)
        time_axis.set_title(f"{shape}  {dtype}  {cache}", fontsize=9, loc="left")
        _memory(memory_axis, group)
    axes[-1, 0].set_xlabel("ms: forward solid, backward pale; dashed: the machine's limit")
    axes[-1, 1].set_xlabel("MB needed beyond inputs and results, log scale")
    row = next(iter(groups.values()))[0]
    commits = dict.fromkeys(group[0]["commit"] for group in groups.values())  # a shape may have been measured later
    figure.suptitle(
        f"{op} on {row['device']}, {row['threads']} threads, "
        f"torch {row['torch']}, commit {', '.join(commits)}, {row['date'][:10]}",
        fontsize=10,
        y=1 - 0.05 / figure.get_figheight(),
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _colour(row: Row) -> str:
    if row["status"] == "wrong":
        return _WRONG
    return _OURS if row["provider"].startswith(OURS) else _PEER


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(axis: plt.Axes, group: Sequence[Row]) -> None:
    names = [row["provider"] for row in group]
    totals = [total_ms(row) or 0.0 for row in group]
    limit = group[0]["limit_ms"]
    # Bars from 0 show forward and backward in proportion; a logarithm only where the providers are too far apart.
    spread = max(totals) > 20 * min(totals)
    left = 0.5 * min([limit, *(row["fwd_ms"] for row in group)]) if spread else 0.0
    for place, (row, total) in enumerate(zip(group, totals)):
        forward = row["fwd_ms"]
        axis.barh(place, forward - left, left=left, color=_colour(row))
        if row["bwd_ms"] != "":
            axis.barh(place, row["bwd_ms"], left=forward, color=_colour(row), alpha=0.45)
        wrong = f"  WRONG, error {row['max_error']:.1e}" if row["status"] == "wrong" else ""
        axis.text(
            total * 1.05 if spread else total + 0.01 * max(totals),
            place,
            f"{_short(total)}{wrong}",
            va="center",
            fontsize=7,
        )
    axis.axvline(limit, color="black", linestyle="--", linewidth=0.8)
    axis.set_xscale("log" if spread else "linear")
    axis.set_xlim(left, (6 if spread else 1.25) * max(totals))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)


def _memory(axis: plt.Axes, group: Sequence[Row]) -> None:
    smallest = 0.5  # MB, the resolution of the measurement
    measured = [(place, row) for place, row in enumerate(group) if row["peak_mb"] != ""]
    for place, row in measured:
        value = max(smallest, row["peak_mb"])
        axis.barh(place, value - 0.5 * smallest, left=0.5 * smallest, color=_colour(row))
        axis.text(value * 1.1, place, _short(row["peak_mb"]), va="center", fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(0.5 * smallest, 8 * max([1.0, *(row["peak_mb"] for _, row in measured)]))
    axis.set_ylim(len(group) - 0.5, -0.5)
    axis.set_yticks([])
    axis.tick_params(axis="x", labelsize=7)
