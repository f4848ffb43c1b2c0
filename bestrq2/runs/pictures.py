"""Draw the pictures of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bestrq2.charts import plain_text
from bestrq2.layers.log_mel_tables import hertz_to_mel

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MAX_BOOKS = 3  # codebooks drawn
MASKED, ABSENT = "#c8c8c8", "#f5f5f5"  # no code has the second: they are at most as light as LIGHTNESS allows
RIGHT, WRONG = "#1a8f3c", "#d1495b"
TICKS_HZ = (125, 250, 500, 1000, 2000, 4000, 8000, 16000)
FOLDER = "pictures"


@dataclass(frozen=True)
class ClipPicture:
    """Data of the picture of one clip. A token is a cell of the grid (frequency row, time column); G codebooks.

    Attributes:
        index: global index of the clip in the training order.
        decibels: ``(T, F)`` log-mel frames.
        frame_seconds: from frame to frame.
        f_min, f_max: edges of the mel filters, Hz.
        height, width: bands and frames of a token.
        masked: ``(R, C)`` bool: hidden from the encoder.
        true: ``(G, R, C)`` codes of all tokens.
        predicted: ``(G, R, C)`` most likely codes, -1 where not predicted.
        probability: ``(G, R, C)`` of the true code, NaN where not predicted.
        true_colours, predicted_colours: ``(G, R, C, 3)`` in 0..1; similar codes have similar colours.
    """

    index: int
    decibels: np.ndarray
    frame_seconds: float
    f_min: float
    f_max: float
    height: int
    width: int
    masked: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    true_colours: np.ndarray
    predicted_colours: np.ndarray

    @property
    def seconds(self) -> float:
        return (len(self.decibels) - 1) * self.frame_seconds


@plain_text()
def draw_clips(path: Path, clips: list[ClipPicture], title: str, codebook_size: int) -> None:
    """One column per clip: spectrogram, what the encoder saw, and per codebook true codes, predicted ones, probability
    of the true code. Time runs along x everywhere, so that panels can be compared by eye."""
    from matplotlib.figure import Figure

    books = min(MAX_BOOKS, len(clips[0].true))
    strips = clips[0].masked.shape[0] == 1
    heights = [2.0, 2.0] + ([1.0, 1.1] if strips else [1.5, 1.5, 1.5]) * books
    # Figure itself, not pyplot: no global state, no window system.
    figure = Figure(figsize=(7.5 * len(clips), 1.0 + 1.15 * sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), len(clips), squeeze=False, sharex="col", height_ratios=heights)
    figure.suptitle(f"{title}: {_accuracy(clips)}", fontsize=14)
    for column, clip in zip(all_axes.T, clips):
        _draw_spectrogram(column[0], clip)
        column[0].set_title(f"training sample {clip.index}, {clip.seconds:.2f} s: log-mel spectrogram")
        _draw_seen(column[1], clip)
        column[1].set_title(f"what the encoder saw: {clip.masked.mean():.0%} of the patches are masked (grey)")
        for book in range(books):
            name = f"codebook {book}, " if len(clip.true) > 1 else ""
            if strips:
                codes, chance = column[2 + 2 * book : 4 + 2 * book]
                _draw_code_bands(codes, clip, book)
                codes.set_title(f"{name}codes (similar colour: similar code; seen patches pale)")
                _draw_chance_bars(chance, clip, book, codebook_size)
            else:
                true, predicted, chance = column[2 + 3 * book : 5 + 3 * book]
                _draw_code_grids(true, predicted, clip, book)
                true.set_title(f"{name}true codes (similar colour: similar code; seen patches pale)")
                predicted.set_title(f"{name}predicted codes (dot: correct; white: not predicted)")
                _draw_chance_grid(chance, clip, book)
        column[-1].set_xlabel("time (s)")
    figure.savefig(path, format="png", dpi=90)


def _accuracy(clips: list[ClipPicture]) -> str:
    places = sum(int((clip.predicted >= 0).sum()) for clip in clips)
    correct = sum(int((clip.predicted == clip.true).sum()) for clip in clips)
    return f"{correct} of {places} masked codes correct ({correct / max(1, places):.0%})"


def _extent(clip: ClipPicture, frames: int, bands: int) -> tuple[float, float, float, float]:
    half = clip.frame_seconds / 2  # frame t is centred on t * hop
    return (-half, frames * clip.frame_seconds - half, -0.5, bands - 0.5)


def _grid_extent(clip: ClipPicture) -> tuple[float, float, float, float]:
    rows, columns = clip.masked.shape
    return _extent(clip, columns * clip.width, rows * clip.height)


def _frequency_axis(axis: Axes, clip: ClipPicture) -> None:
    bands = clip.decibels.shape[1]
    low, high = hertz_to_mel(clip.f_min), hertz_to_mel(clip.f_max)
    shown = [hertz for hertz in TICKS_HZ if clip.f_min < hertz <= clip.f_max]
    # Band m is centred on the (m + 1)-th of bands + 2 points that are equally spaced in mel.
    places = [(hertz_to_mel(hertz) - low) / (high - low) * (bands + 1) - 1 for hertz in shown]
    kept: list[tuple[float, int]] = []
    for place, hertz in zip(places, shown):
        if not kept or place - kept[-1][0] > bands / 12:  # low ones lie close together
            kept.append((place, hertz))
    labels = [f"{hertz // 1000} kHz" if hertz >= 1000 else f"{hertz} Hz" for _, hertz in kept]
    axis.set_yticks([place for place, _ in kept], labels)
    axis.set_ylim(-0.5, bands - 0.5)
    axis.set_ylabel("frequency (mel)")


def _draw_spectrogram(axis: Axes, clip: ClipPicture) -> None:
    low, high = np.percentile(clip.decibels, (2, 99.8))
    extent = _extent(clip, *clip.decibels.shape)
    image = axis.imshow(
        clip.decibels.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=max(high, low + 1)
    )
    axis.set_xlim(extent[:2])
    _frequency_axis(axis, clip)
    if axis.figure is not None:
        axis.figure.colorbar(image, ax=axis, label="dB", pad=0.01, fraction=0.03)


def _draw_seen(axis: Axes, clip: ClipPicture) -> None:
    from matplotlib.colors import to_rgba

    _draw_spectrogram(axis, clip)
    layer = np.zeros((*clip.masked.shape, 4))
    layer[clip.masked] = to_rgba(MASKED)
    axis.imshow(layer, origin="lower", aspect="auto", extent=_grid_extent(clip), interpolation="nearest")
    axis.set_xlim(_extent(clip, *clip.decibels.shape)[:2])
    axis.set_ylim(-0.5, clip.decibels.shape[1] - 0.5)


def _pale(clip: ClipPicture, book: int) -> np.ndarray:
    """True colours, those of seen patches faded."""
    colours = clip.true_colours[book].copy()
    colours[~clip.masked] = 0.25 * colours[~clip.masked] + 0.75
    return colours


def _predicted(clip: ClipPicture, book: int) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.where(clip.predicted[book][..., None] >= 0, clip.predicted_colours[book], to_rgb(ABSENT))


def _draw_code_bands(axis: Axes, clip: ClipPicture, book: int) -> None:
    bands = np.concatenate((_predicted(clip, book), _pale(clip, book)))
    left, right, _, _ = _grid_extent(clip)
    axis.imshow(bands, origin="lower", aspect="auto", extent=(left, right, 0, 2), interpolation="nearest")
    axis.axhline(1, color="white", linewidth=2)
    axis.set_yticks([0.5, 1.5], ["predicted", "true"])
    axis.set_xlim(_extent(clip, *clip.decibels.shape)[:2])


def _draw_chance_bars(axis: Axes, clip: ClipPicture, book: int, codebook_size: int) -> None:
    from matplotlib.patches import Patch

    step = clip.width * clip.frame_seconds
    left = _grid_extent(clip)[0]
    places = np.flatnonzero(clip.predicted[book, 0] >= 0)
    right = clip.predicted[book, 0, places] == clip.true[book, 0, places]
    chance = clip.probability[book, 0, places]
    kinds = ((right, RIGHT, "correct"), (~right, WRONG, "another code predicted"))
    for kind, colour, _ in kinds:
        axis.bar(left + (places[kind] + 0.5) * step, chance[kind], width=0.9 * step, color=colour)
    axis.axhline(1 / codebook_size, color="black", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 1)
    axis.set_ylabel("probability")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.set_title("probability of the true code", loc="left")
    # Made by hand: an empty set of bars has no colour.
    handles = [Patch(color=colour, label=f"{label} ({kind.sum()})") for kind, colour, label in kinds]
    axis.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1, 0.98),
        fontsize=9,
        ncols=2,
        frameon=False,
        borderpad=0.1,
    )


def _draw_code_grids(true: Axes, predicted: Axes, clip: ClipPicture, book: int) -> None:
    extent = _grid_extent(clip)
    for axis, colours in ((true, _pale(clip, book)), (predicted, _predicted(clip, book))):
        axis.imshow(colours, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
        axis.set_xlim(_extent(clip, *clip.decibels.shape)[:2])
        _frequency_axis(axis, clip)
    rows, columns = np.nonzero(clip.predicted[book] == clip.true[book])
    _dots(predicted, clip, rows, columns)


def _dots(axis: Axes, clip: ClipPicture, rows: np.ndarray, columns: np.ndarray) -> None:
    x = _grid_extent(clip)[0] + (columns + 0.5) * clip.width * clip.frame_seconds
    axis.scatter(x, (rows + 0.5) * clip.height - 0.5, s=16, c="black", edgecolors="white", linewidths=0.8)


def _draw_chance_grid(axis: Axes, clip: ClipPicture, book: int) -> None:
    image = axis.imshow(
        np.ma.masked_invalid(clip.probability[book]),
        origin="lower",
        aspect="auto",
        extent=_grid_extent(clip),
        interpolation="nearest",
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    axis.set_facecolor(ABSENT)
    axis.set_xlim(_extent(clip, *clip.decibels.shape)[:2])
    _frequency_axis(axis, clip)
    axis.set_title("probability of the true code")
    if axis.figure is not None:
        axis.figure.colorbar(image, ax=axis, label="probability", pad=0.01, fraction=0.03)
