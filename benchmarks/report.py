"""Rows to CSV and back, to an aligned table on the screen, and to the Markdown table of the README."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.common import FIELDS
from benchmarks.measure import Row, total_ms

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "bestrq2"
_NUMBERS = {
    *("fwd_ms", "bwd_ms", "peak_mb", "pct_of_limit", "max_error", "speedup", "limit_ms"),
    *("fwd_p20", "fwd_p80", "bwd_p20", "bwd_p80", "load", "ceiling_tflops", "ceiling_gb_per_s"),
}


def default_path(rows: Sequence[Row]) -> Path:
    """``results/<device>_<threads>threads_<date>.csv``; on a GPU without the thread count."""
    row = rows[0]
    device = re.sub(r"[^A-Za-z0-9.]+", "_", str(row["device"])).strip("_")
    threads = "" if device.startswith("NVIDIA") else f"_{row['threads']}threads"
    return RESULTS / f"{device}{threads}_{str(row['date'])[:10]}.csv"


def append_csv(path: Path, rows: Iterable[Row]) -> None:
    """Append rows, writing the header into a new file.

    Raises:
        ValueError: if the file has other columns: it was written by another version.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = path.exists()
    if exists:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != FIELDS:
            raise ValueError(f"{path} has the columns {', '.join(header)}, expected {', '.join(FIELDS)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows({name: _written(row[name]) for name in FIELDS} for row in rows)


def _written(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: Path) -> list[Row]:
    """Rows of a result file, numbers as float (empty: ``""``).

    Raises:
        ValueError: if the columns are not :data:`FIELDS`, of which older files lack the ceilings.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        older = tuple(name for name in FIELDS if not name.startswith("ceiling_"))
        if tuple(reader.fieldnames or ()) not in (FIELDS, older):
            raise ValueError(f"{path}: expected the columns {', '.join(FIELDS)}, got {reader.fieldnames}")
        return [
            {
                name: float(text)
                if name in _NUMBERS and text
                else int(text)
                if name in ("repeats", "threads") and text
                else text
                for name, text in (dict.fromkeys(FIELDS, "") | row).items()
            }
            for row in reader
        ]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each (op, shape, dtype, cache, provider, device): files are appended to."""
    newest: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "shape", "dtype", "provider", "device", "threads"))
        key = (*key, row["cache"] or "none")
        newest.pop(key, None)
        newest[key] = row
    return list(newest.values())


def group_key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["dtype"]


def ratio_of_ours(row: Row, group: Sequence[Row]) -> float | None:
    """Time of this provider as a multiple of the time of ``bestrq2`` (same cache state)."""
    ours = next(
        (total_ms(other) for other in group if other["provider"] == OURS and other["cache"] == row["cache"]), None
    )
    total = total_ms(row)
    return total / ours if total and ours else None


def _number(value: object, pattern: str) -> str:
    return "" if value is None or value == "" else format(value, pattern)


def _cells(row: Row, group: Sequence[Row]) -> list[str]:
    remark = row["note"] if row["status"] == "ok" else f"{row['status'].upper()}: {row['note']}"
    return [
        row["provider"],
        row["cache"],
        _number(row["fwd_ms"], ".3f"),
        _number(row["bwd_ms"], ".3f"),
        _number(row["speedup"], ".2f"),
        _number(ratio_of_ours(row, group), ".2f"),
        _number(row["peak_mb"], ".1f"),
        _number(row["pct_of_limit"], ".1f"),
        _number(row["max_error"], ".1e"),
        remark,
    ]


_HEADER = ["provider", "cache", "fwd ms", "bwd ms", "speedup", "/ours", "peak MB", "% limit", "max error", "remark"]


def table(rows: Sequence[Row]) -> str:
    """Aligned text, one block per (op, shape, dtype).

    ``speedup``: times faster than the published provider. ``/ours``: times slower than bestrq2.
    """
    blocks = []
    for (op, shape, dtype), members in groupby(rows, group_key):
        group = list(members)
        lines = [_HEADER, *(_cells(row, group) for row in group)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
        text = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, len(widths) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        ]
        blocks.append("\n".join([f"{op}  {shape}  {dtype}  (limit {group[0]['limit_ms']:.3f} ms)", *text]))
    return "\n\n".join(blocks)


def markdown(rows: Sequence[Row]) -> str:
    """The README's table: every provider that ran, and below it what was skipped or failed and why.

    Of several cache states only ``cold`` is shown where both were measured.
    """
    rows = latest(rows)
    cold = {group_key(row) for row in rows if row["cache"] == "cold"}
    rows = [row for row in rows if row["cache"] != "hot" or group_key(row) not in cold]
    lines = [
        "| op, shape, dtype | provider | fwd ms | bwd ms | bestrq2 is faster by | peak MB | % of limit | max error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    absent: dict[str, None] = {}
    order = sorted({group_key(row): None for row in rows}, key=lambda key: key[0])
    for key in order:
        group = [row for row in rows if group_key(row) == key]
        title = f"`{key[0]}` {key[1]} {key[2]}"
        for row in group:
            if total_ms(row) is None:
                absent[f"{row['provider']} ({key[0]}): {row['note']}"] = None
                continue
            cells = _cells(row, group)
            ratio = "" if row["provider"] == OURS else f"{cells[5]}x"
            error = cells[8] + (" (WRONG)" if row["status"] == "wrong" else "")
            shown = (title, cells[0], cells[2], cells[3], ratio, cells[6], cells[7], error)
            lines.append(f"| {' | '.join(shown)} |")
            title = ""
    row = rows[0]
    lines += ["", f"{row['device']}, {row['threads']} threads, torch {row['torch']}, triton {row['triton']},"]
    lines[-1] += f" commit {row['commit']}, {row['date'][:10]}: `{row['command']}`"
    if absent:
        lines += ["", "Not in the table: " + "; ".join(absent) + "."]
    return "\n".join(lines)
