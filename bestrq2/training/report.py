"""The picture of a run: loss, masked accuracy beside its baseline, code usage, speed."""

from pathlib import Path

from .run_folder import read_metrics


def save_report(folder: Path, codebook_size: int, title: str) -> Path | None:
    """Draw ``report.png`` from ``metrics.csv``. Returns its path, or None when nothing was logged yet."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in read_metrics(folder) if row["loss"]]
    if not rows:
        return None
    steps = [int(row["step"]) for row in rows]

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows]

    figure, ((loss, accuracy), (usage, speed)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    loss.plot(steps, column("loss"), color="tab:blue", linewidth=1)
    loss.set(title="Loss", ylabel="cross-entropy of masked codes (nats)")
    accuracy.plot(steps, column("accuracy"), color="tab:green", linewidth=1, label="masked accuracy")
    accuracy.plot(steps, column("unigram"), color="tab:gray", linestyle="--", label="always the commonest code")
    accuracy.set(title="Masked accuracy", ylabel="share of masked patches", ylim=(0, None))
    accuracy.legend()
    usage.plot(steps, column("perplexity"), color="tab:purple", label="perplexity")
    usage.plot(steps, column("codes_used"), color="tab:orange", label="codes used")
    usage.axhline(codebook_size, color="tab:gray", linestyle=":", label=f"codebook ({codebook_size})")
    usage.set(title="Target codes", ylabel="codes", yscale="log", xlabel="step")
    usage.legend()
    speed.plot(steps, column("audio_seconds_per_second"), color="tab:red", linewidth=1)
    speed.set(title="Throughput", ylabel="seconds of audio per second", xlabel="step", ylim=(0, None))
    for axis in (loss, accuracy, usage, speed):
        axis.grid(alpha=0.3)
    path = folder / "report.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
