"""Put the results of a GPU run in place: rows to ``benchmarks/results/``, tiles to ``kernels/configs/``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import report
from benchmarks.gpu.summary import tuned
from benchmarks.measure import NO_TIME


def merge(folder: Path) -> int:
    """Merge what a run left in ``folder`` and print the table of the README."""
    from bestrq2.kernels import tuning

    from benchmarks import tune

    if not (folder / "summary.md").exists():
        print(f"{folder} holds no summary.md: expected the --out folder of an earlier run", file=sys.stderr)
        return 2
    found = tuned(folder / "tuned.json")
    for op, configs in found.get("tiles", {}).items():
        if configs:
            path = tune.write(op, found["device"], found["architecture"], configs, tuning.FOLDER)
            print(f"wrote {path}: {', '.join(configs)}")
    rows = report.read_csv(folder / "rows.csv") if (folder / "rows.csv").exists() else []
    rows = [row for row in rows if row["note"] != NO_TIME]
    if rows:
        target = report.default_path(rows)
        known = [_identity(row) for row in report.read_csv(target)] if target.exists() else []
        new = [row for row in rows if _identity(row) not in known]
        report.append_csv(target, new)
        print(f"appended {len(new)} of {len(rows)} rows to {target}")
        print(report.markdown(rows))
    train = folder / "train.csv"
    if train.exists() and rows:
        target = report.RESULTS / f"{report.default_path(rows).stem}_training.csv"
        before = target.read_text().splitlines() if target.exists() else []
        lines = [line for line in train.read_text().splitlines() if line not in before]
        target.write_text("\n".join([*before, *lines]) + "\n")
        print(f"wrote {target}")
    return 0


def _identity(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("op", "shape", "dtype", "provider", "cache", "date", "note"))
