"""A short real training run on the packaged clips: does the loop keep the device busy?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import mean

from benchmarks.gpu.plan import Request, cores, read_request
from benchmarks.gpu.training_step import append

END_SECONDS = 5.0  # kept for reading what the run has written


def main(request: Request) -> int:
    run = request.work / "run"
    recipe, settings = (
        "best_rq2_base",
        ["train.steps=150", "data.join_short=true", f"data.cache={request.work / 'cache'}"],
    )
    settings += [f"data.workers={max(1, min(14, cores() - 2))}", "train.log_every=10", "train.save_every=150"]
    if request.rehearse:
        recipe, settings = "best_rq2_tiny", ["train.steps=2", "train.batch_size=2", "train.save_every=2"]
        settings += ["train.pictures_every=2"]
    command = [sys.executable, "-m", "bestrq2.train", "--config", recipe, "--name", "gpu-run", "--runs", str(run)]
    process = subprocess.Popen([*command, *settings, f"train.device={request.device}"])
    try:
        status = process.wait(max(request.left() - END_SECONDS, 1.0))
    except subprocess.TimeoutExpired:  # the rows so far count
        process.terminate()
        status = 0
    metrics = next(run.rglob("metrics.csv"), None)
    if metrics is None:
        request.note({"line": "the run left no metrics.csv"})
        return status or 1
    import csv

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[len(rows) // 2 :]

    def average(*names: str) -> float | None:
        values = [float(row[name]) for name in names for row in rows if row.get(name)]
        return mean(values) if values else None

    mfu = average("mfu")
    found = {"loss": average("loss"), "mfu": mfu, "data wait": average("data_wait", "data_wait_pct", "data_wait_share")}
    text = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None)
    append(request, {"name": f"python -m bestrq2.train {recipe}", "note": text, "mfu_pct": mfu or ""})
    request.note({"line": text or "metrics.csv has no rows yet"})
    return status


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
