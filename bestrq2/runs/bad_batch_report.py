"""Statistics and a picture of a batch that was not finite."""

from pathlib import Path

import numpy as np

from bestrq2.charts import plain_text
from bestrq2.config import read_text, read_yaml
from bestrq2.errors import TrainingError, system_reason

from .bad_batches import BadBatch, clip_statistics, load_bad_batch

DRAWN = 8  # clips
SUSPECT = "#d1495b"


def describe_bad_batch(path: Path, picture: Path | None = None) -> list[str]:
    """Lines about every clip of the batch; draws ``picture`` (default: beside the file, ending in .png).

    Raises:
        TrainingError: if the file is no kept batch, or the picture cannot be written.
    """
    batch = load_bad_batch(path)
    rate = _sampling_rate(path)
    rows = clip_statistics(batch)
    lines = [
        f"Step {batch.step}, rank {batch.rank}: loss {batch.loss:g}, gradient norm {batch.grad_norm:g}; "
        f"{len(rows)} clips",
        f"{'clip':>4} {'sample':>8} {'seconds' if rate else 'samples':>8} {'min':>9} {'max':>9} {'rms':>9} "
        f"{'NaN':>7} {'inf':>7} {'clipped':>8} {'zeros':>7}",
    ]
    for number, row in enumerate(rows):
        length = f"{row['samples'] / rate:.2f}" if rate else f"{row['samples']:.0f}"
        name = f"  {batch.files[number]}" if number < len(batch.files) else ""
        lines.append(
            f"{number:>4} {row['index']:>8} {length:>8} {row['min']:>9.3g} {row['max']:>9.3g} {row['rms']:>9.3g} "
            f"{row['nan']:>7} {row['inf']:>7} {row['clipped']:>8.1%} {row['zeros']:>7.1%}{name}"
        )
    picture = picture or path.with_suffix(".png")
    try:
        draw_bad_batch(picture, batch, rate)
    except OSError as error:
        raise TrainingError(f"{picture}: cannot be written: {system_reason(error)}") from error
    bad = [number for number, row in enumerate(rows) if row["nan"] or row["inf"]]
    lines.append(
        f"Not finite already in the audio: clips {', '.join(map(str, bad))}"
        if bad
        else "All samples are finite: it was not the audio alone that made loss or gradient not finite"
    )
    return [*lines, f"Picture: {picture}"]


def _sampling_rate(path: Path) -> int | None:
    """Of the run that the file lies in, if it does."""
    config = path.resolve().parent.parent / "config.yaml"
    try:
        return int(read_yaml(read_text(config, "configuration"), str(config))["model"]["front_end"]["sampling_rate"])
    except (KeyError, TypeError, ValueError):
        return None


@plain_text()
def draw_bad_batch(path: Path, batch: BadBatch, rate: int | None) -> None:
    """Waveform and spectrogram of the first clips, those with samples that are not finite first; such samples are
    marked in red."""
    from matplotlib.figure import Figure

    rows = clip_statistics(batch)
    order = sorted(range(len(rows)), key=lambda number: not (rows[number]["nan"] or rows[number]["inf"]))[:DRAWN]
    figure = Figure(figsize=(14, 0.7 + 2.0 * len(order)), layout="constrained")
    figure.suptitle(
        f"step {batch.step}, rank {batch.rank}: loss {batch.loss:g}, gradient norm {batch.grad_norm:g} "
        f"({len(order)} of {len(rows)} clips)"
    )
    unit = "time (s)" if rate else "sample"
    for number, (wave, spectrum) in zip(order, figure.subplots(len(order), 2, squeeze=False)):
        samples = batch.waveform[number, : int(batch.lengths[number])].double().numpy()
        time = np.arange(len(samples)) / (rate or 1)
        bad = ~np.isfinite(samples)
        wave.plot(time, np.where(bad, np.nan, samples), linewidth=0.4, color="#1f6fb4")
        for place in time[bad][:200]:
            wave.axvline(place, color=SUSPECT, linewidth=0.8)
        wave.set_xlim(0, time[-1] if len(time) > 1 else 1)
        wave.set_ylabel("amplitude")
        note = f", {bad.sum()} samples not finite (red)" if bad.any() else ""
        wave.set_title(f"clip {number}, training sample {int(batch.index[number])}{note}", fontsize=10)
        decibels, top = _spectrogram(np.where(bad, 0.0, samples)), (rate or 1) / 2
        extent = (0, len(samples) / (rate or 1), 0, top)
        top_level = max(float(decibels.max()), -40.0)  # silence stays dark
        spectrum.imshow(decibels, origin="lower", aspect="auto", cmap="magma", extent=extent, vmin=-100, vmax=top_level)
        spectrum.set_ylabel("frequency (Hz)" if rate else "cycles per sample")
        spectrum.set_title("spectrogram (what is not finite as zero)", fontsize=10)
    for axis in figure.axes[-2:]:
        axis.set_xlabel(unit)
    figure.savefig(path, format="png", dpi=90)


def _spectrogram(samples: np.ndarray, size: int = 512) -> np.ndarray:
    """Magnitudes in dB, ``(size // 2 + 1, T)``; a Hann window of ``size`` samples every half of it."""
    padded = np.pad(samples, (0, max(0, size - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 2] * np.hanning(size)
    magnitude = np.abs(np.fft.rfft(windows, axis=1)).T / (size / 4)
    return 20 * np.log10(np.maximum(magnitude, 1e-6))
