"""Summary of a GPU run, in under 100 lines of Markdown."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu.plan import RunOptions, read_notes
from benchmarks.processes import Ended

MOST_LINES = 95
MOST_BYTES = 16 * 2**20
Outcomes = Sequence[tuple[str, Ended | None, str]]


def write_summary(options: RunOptions, work: Path, outcomes: Outcomes) -> str:
    """Compose the summary and write it to ``summary.md``; returns it also where the disk is full."""
    text = "\n".join(_lines(options, work, outcomes)) + "\n"
    with suppress(OSError):
        temporary = options.out / "summary.new"
        try:
            temporary.write_text(text)
            temporary.replace(options.out / "summary.md")
        finally:
            temporary.unlink(missing_ok=True)
    return text


def fits(path: Path) -> None:
    """Cut a file to the most that may leave the machine: its end for text, nothing of an archive."""
    with suppress(OSError):
        if path.stat().st_size <= MOST_BYTES:
            return
        if path.suffix not in (".txt", ".md", ".csv"):
            path.unlink()
            return
        with path.open("rb+") as file:
            file.seek(-MOST_BYTES // 2, os.SEEK_END)
            tail = file.read()
            file.seek(0)
            file.write(b"(the beginning was cut)\n" + tail)
            file.truncate()


def _lines(options: RunOptions, work: Path, outcomes: Outcomes) -> list[str]:
    notes = read_notes(work)
    lines = ["# bestrq2 on a GPU" if not options.rehearse else "# Rehearsal of a GPU run, on a CPU at tiny sizes", ""]
    broken = notes.get("smoke", {}).get("broken", [])
    if broken:
        lines += [f"**WRONG OR FAILING: {', '.join(broken)}** (left out of later stages)", ""]
    lines += [f"- {line}" for line in notes.get("facts", {}).get("lines", [])]
    lines += ["", "| stage | ended | s | found |", "|---|---|---:|---|"]
    for name, ended, reason in outcomes:
        found = str(notes.get(name, {}).get("line", "")).replace("|", "/")
        status = reason or (ended.text if ended else "running")
        if ended and not ended.good and not found:
            found = _last_line(work / f"{name}.log")
        seconds = f"{ended.seconds:.0f}" if ended else ""
        lines.append(f"| {name} | {'ok' if ended and ended.good else status} | {seconds} | {found[:180]} |")
    for found_lines in (_smoke(notes), _training(options.out / "train.csv"), _rows(options.out / "rows.csv")):
        room, section = MOST_LINES - len(lines), list(found_lines)
        if len(section) > room:
            section = [*section[: max(room - 1, 0)], "(more in the files)"]
        lines += section
    return lines[: MOST_LINES + 1]


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].replace("|", "/")
    return ""


def _smoke(notes: dict[str, Any]) -> Iterator[str]:
    failures = [check for check in notes.get("smoke", {}).get("checks", []) if check["status"] not in ("ok", "skipped")]
    if failures:
        yield ""
        yield from (f"- smoke {c['what']}: {c['status']}: {c['note'][:150]}" for c in failures[:10])


def _training(path: Path) -> Iterator[str]:
    with suppress(OSError), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        if rows:
            yield from (
                "",
                "| training step | ms | MFU % | audio s/s | peak MB | note |",
                "|---|---:|---:|---:|---:|---|",
            )
        for row in rows:
            numbers = (row["ms"], row["mfu_pct"], row["audio_s_per_s"], row["peak_mb"])
            yield f"| {row['name']} | {' | '.join(numbers)} | {row['note'][:80]} |"


def _rows(path: Path) -> Iterator[str]:
    """Ours and the best peers of every group: time, share of the limit, and how many times ours a peer takes."""
    try:
        rows = report.latest(report.read_csv(path))
    except (OSError, ValueError):
        return
    if not rows:
        return
    yield from ("", "| op, shape, dtype | provider | fwd ms | bwd ms | x ours | % limit | error | note |")
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for key, members in groupby(sorted(rows, key=report.group_key), report.group_key):
        group = list(members)
        title = " ".join(key)
        for row in sorted(group, key=lambda row: (row["provider"] != report.OURS, str(row["status"]) != "ok")):
            ratio = report.ratio_of_ours(row, group)
            cells = [
                row["provider"],
                *(f"{row[name]:.3f}" if row[name] != "" else "" for name in ("fwd_ms", "bwd_ms")),
                f"{ratio:.2f}" if ratio else "",
                f"{row['pct_of_limit']:.0f}" if row["pct_of_limit"] != "" else "",
                f"{row['max_error']:.0e}" if row["max_error"] != "" else "",
                (row["note"] if row["status"] == "ok" else f"{row['status'].upper()}: {row['note']}")[:60],
            ]
            if row["status"] != "skipped":
                yield f"| {title} | {' | '.join(cells)} |".replace("\n", " ")
                title = ""


def tuned(path: Path) -> dict[str, Any]:
    """The tiles of ``tuned.json``; empty where there are none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
