"""Confusion matrices as a picture."""

from pathlib import Path

import numpy as np

from bestrq2.charts import chart_label, plain_text


@plain_text()
def save_confusions(path: Path, matrices: dict[str, np.ndarray], classes: list[str]) -> None:
    """Draw count matrices (true class by predicted class), coloured by the share of each true class."""
    from matplotlib.figure import Figure  # itself, not pyplot: no global state, no window system

    size = max(3.5, 0.45 * len(classes) + 2)
    names = [chart_label(name) for name in classes]
    figure = Figure(figsize=(size * len(matrices), size), layout="constrained")
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, matrices.items()):
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set(title=chart_label(title), xlabel="predicted", ylabel="true")
        axis.set_xticks(range(len(classes)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(classes)), names)
        if len(classes) <= 20:
            for (row, column), count in np.ndenumerate(matrix):
                colour = "white" if share[row, column] > 0.5 else "black"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=110)


@plain_text()
def save_per_class(path: Path, bars: dict[str, list], chance: list, classes: list[str], title: str) -> None:
    """Draw one value per class for every kind of features, with a tick where chance is."""
    from matplotlib.figure import Figure  # itself, not pyplot: no global state, no window system

    place = np.arange(len(classes))
    thickness = 0.8 / len(bars)
    figure = Figure(figsize=(7, 1.6 + 0.5 * len(classes)), layout="constrained")
    axis = figure.subplots()
    for number, (name, values) in enumerate(bars.items()):
        offset = (number - (len(bars) - 1) / 2) * thickness
        lengths = np.nan_to_num(np.asarray(values, dtype=float))
        axis.barh(place + offset, lengths, thickness * 0.9, label=chart_label(name))
    axis.vlines(chance, place - 0.45, place + 0.45, color="black", linewidth=1.5, label="chance")
    axis.set_yticks(place, [chart_label(name) for name in classes])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), title=chart_label(title))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
