"""Draw the picture of the README from committed rows: time and extra memory of each operation and its alternatives.

    python benchmarks/overview.py benchmarks/results/Intel_R_Xeon_R_Processor_2threads_2026-11-26.csv

Every point is the newest row of its operation, shape, dtype and provider in the file. Providers that did not run there
are left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # a script: make `benchmarks` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.machine import ROOT
from benchmarks.measure import Row, total_ms
from benchmarks.report import latest, read_csv

CASES = (
    ("quantize", "16384x256->16x8192", "float32"),
    ("chunked_attention", "B2H4T2048d64-c64l256r0", "float32"),
    ("chunked_attention", "B2H4T2048d64-c64l256r0", "bfloat16"),
    ("masked_cross_entropy", "4096x768->8192", "float32"),
    ("masked_cross_entropy", "4096x768->8192", "bfloat16"),
)
OURS = "bestrq2"
EAGER = {
    "quantize": "published eager",
    "chunked_attention": "Transformer-XL, materialised",
    "masked_cross_entropy": "eager",
}
COMPILED = dict.fromkeys(EAGER, "torch.compile")
STYLES = (("plain PyTorch", EAGER, "#555555"), ("torch.compile", COMPILED, "#e08a1e"), ("bestrq2", None, "#1b6ca8"))

OFFSETS = {"plain PyTorch": (0, 8), "torch.compile": (0, -14), "bestrq2": (-8, -3)}
SIDES = {"plain PyTorch": "center", "torch.compile": "center", "bestrq2": "right"}


def point(rows: list[Row], op: str, shape: str, dtype: str, provider: str) -> Row | None:
    wanted = (op, shape, dtype, provider, "ok")
    return next((r for r in rows if (r["op"], r["shape"], r["dtype"], r["provider"], r["status"]) == wanted), None)


def draw(rows: list[Row], path: Path) -> None:
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    shown: list[Row] = []
    for place, case in enumerate(CASES):
        points = []
        for label, names, colour in STYLES:
            row = point(rows, *case, names[case[0]] if names else OURS)
            if row is None:
                continue
            shown.append(row)
            points.append((total_ms(row), row["peak_mb"]))
            for axis, value in zip((times, memory), points[-1]):
                axis.plot(value, place, "o", color=colour, markersize=8, label=label if place == 0 else None, zorder=3)
                text, offset, side = f"{value:,.0f}" if value >= 20 else f"{value:.2g}", OFFSETS[label], SIDES[label]
                axis.annotate(text, (value, place), offset, textcoords="offset points", ha=side, fontsize=8)
        for axis, values in zip((times, memory), zip(*points)):
            axis.plot([min(values), max(values)], [place, place], color="#cccccc", linewidth=2, zorder=1)
    times.set_yticks(range(len(CASES)), [f"{op}\n{shape}, {dtype}" for op, shape, dtype in CASES], fontsize=8)
    times.set_ylim(len(CASES) - 0.4, -0.6)
    for axis, title in ((times, "milliseconds"), (memory, "megabytes beyond inputs and results")):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axis.margins(x=0.16)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*times.get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=9, frameon=False)
    commits = ", ".join(dict.fromkeys(row["commit"] for row in shown))
    note = f"{shown[0]['device']}, {shown[0]['threads']} threads, torch {shown[0]['torch']}; commits {commits}"
    figure.text(0.995, 0.01, note, fontsize=6, ha="right", color="#777777")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="result file of benchmarks/run.py --save")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "operations.png", help="PNG to write")
    options = parser.parse_args(arguments)
    draw(latest(read_csv(options.rows)), options.out)


if __name__ == "__main__":
    main()
