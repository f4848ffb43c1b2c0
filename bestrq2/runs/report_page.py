"""One HTML file about one or several runs: everything inside, nothing loaded from elsewhere."""

import base64
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bestrq2.config import write_yaml
from bestrq2.errors import byte_count

from .record import RunRecord, flatten

PICTURES = 6  # of a run, evenly spaced over training
EXAMPLES = 5  # skipped files of each reason

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1360px; margin: 2em auto;
       padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0.1em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 0.6em 0; } th, td { text-align: left; padding: 0.25em 1.2em 0.25em 0;
       vertical-align: top; border-bottom: 1px solid #e4e4e4; } th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } td.name { white-space: nowrap; }
img { max-width: 100%; height: auto; } figure { margin: 1em 0 2em; } figcaption, .note { color: #555; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 0.85em; } summary { cursor: pointer; }
code { background: #f2f2f2; padding: 0 0.25em; overflow-wrap: anywhere; }
"""


def page(runs: Sequence[RunRecord], title: str, curves: Path | None) -> str:
    """The document. ``curves`` is the PNG of :func:`bestrq2.runs.report_curves.draw_curves`, if there is one."""
    parts = [f"<h1>{escape(title)}</h1>", _paragraph(f"Written {time.strftime('%Y-%m-%d %H:%M:%S')}.", "note")]
    parts.append(_headline(runs))
    if curves is not None:
        parts += ["<h2>Curves</h2>", _figure(curves, "Faint: as logged; strong: running mean over 2 % of the rows.")]
    else:
        parts.append(_paragraph("Nothing has been logged yet."))
    if len(runs) > 1:
        parts += ["<h2>Settings that differ</h2>", _differing_settings(runs)]
    for run in runs:
        heading = f"{escape(run.name)}: " if len(runs) > 1 else ""
        parts += [text for section in _sections(run, heading) for text in section]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(run: RunRecord, heading: str) -> Iterable[list[str]]:
    if run.pictures:
        yield [f"<h2>{heading}Pictures</h2>", _paragraph(PICTURE_NOTE, "note"), *_pictures(run)]
    yield [f"<h2>{heading}Audio that was skipped</h2>", _skips(run)]
    if run.bad_batches:
        yield [f"<h2>{heading}Batches that were not finite</h2>", _bad_batches(run)]
    yield [f"<h2>{heading}Checkpoints</h2>", _checkpoints(run)]
    yield [f"<h2>{heading}Configuration</h2>", _configuration(run)]
    yield [f"<h2>{heading}Versions and hardware</h2>", _versions(run)]


PICTURE_NOTE = (
    "The same clips under the same mask at different steps. Codes with similar colours are similar vectors of the "
    "codebook; a wrong prediction in a similar colour is a near miss."
)


def _headline(runs: Sequence[RunRecord]) -> str:
    rows: list[list[str]] = []

    def add(label: str, values: Iterable[str | None]) -> None:
        values = list(values)
        if any(value is not None for value in values):
            rows.append([label, *(value or "" for value in values)])

    def number(name: str, form: str, tail: bool = False, scale: float = 1.0) -> list[str | None]:
        found = [run.tail_mean(name) if tail else run.last(name) for run in runs]
        return [None if value is None else form.format(value * scale) for value in found]

    add("state", [_state(run) for run in runs])
    add("recipe", [_plain(run.setting("recipe")) for run in runs])
    add("data", [str(run.setting("data.source") or "the clips of the package") for run in runs])
    add("masked accuracy, last tenth", number("accuracy", "{:.2f} %", True, 100))
    add("always the commonest code", number("unigram", "{:.2f} %", True, 100))
    add("loss, last tenth", number("loss", "{:.4f} nats", True))
    add("best validation loss", [_at_step(run.best("validation/loss"), "{:.4f} nats") for run in runs])
    add("best validation accuracy", [_at_step(run.best("validation/accuracy", True), "{:.2%}") for run in runs])
    probes = dict.fromkeys(name for run in runs for name in run.columns if name.startswith("probe/"))
    for name in probes:
        add(f"{name.replace('/', ' ')}, last", number(name, "{:.4g}"))
    add("perplexity of the targets", [_of_codebook(run) for run in runs])
    add("audio heard", number("audio_seconds", "{:.2f} h", scale=1 / 3600))
    add("time", [_duration(run.last("elapsed_seconds")) for run in runs])
    add("throughput, last tenth", number("audio_seconds_per_second", "{:.1f} s of audio per s", True))
    add("utilisation (MFU), last tenth", number("mfu", "{:.1f} %", True, 100))
    add("waiting for data, last tenth", number("data_wait", "{:.1f} %", True, 100))
    add("padding, last tenth", number("padding_share", "{:.1f} %", True, 100))
    add("peak memory", number("memory_gib", "{:.2f} GiB resident"))
    add("peak GPU memory", number("cuda_memory_gib", "{:.2f} GiB"))
    add("skipped files", number("skipped_files", "{:.0f}"))
    add("updates skipped as not finite", number("skipped_steps", "{:.0f}"))
    return _table([["", *(run.name for run in runs)]] if len(runs) > 1 else [], rows)


def _state(run: RunRecord) -> str:
    total = run.setting("train.steps")
    if not isinstance(total, int):
        return f"{run.step} steps"
    if run.step >= total:
        return f"finished, {total} steps"
    return f"step {run.step} of {total} ({run.step / total:.0%}): going on, or stopped"


def _at_step(found: tuple[float, int] | None, form: str) -> str | None:
    return None if found is None else f"{form.format(found[0])} at step {found[1]}"


def _of_codebook(run: RunRecord) -> str | None:
    perplexity, used = run.last("perplexity"), run.last("codes_used")
    if perplexity is None or used is None:
        return None
    size = run.setting("model.targets.codebook_size")
    return f"{perplexity:.1f}; {used:.0f} of {size} codes used"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _pictures(run: RunRecord) -> list[str]:
    count = len(run.pictures)
    places = sorted({round(k * (count - 1) / max(1, PICTURES - 1)) for k in range(PICTURES)}) if count > 1 else [0]
    chosen = [run.pictures[place] for place in places]
    shown = [_figure(path, f"{path.parent.name}/{path.name}") for _, path in chosen]
    if count > len(chosen):
        shown.append(_paragraph(f"{len(chosen)} of {count}; the others are in {run.pictures[0][1].parent}.", "note"))
    return shown


def _skips(run: RunRecord) -> str:
    if not run.skips:
        return _paragraph("None while training.")
    rows = []
    for reason, lines in run.skips.items():
        examples = "<br>".join(escape(line) for line in lines[:EXAMPLES])
        more = f'<br><span class="note">and {len(lines) - EXAMPLES} more</span>' if len(lines) > EXAMPLES else ""
        rows.append((escape(reason), str(len(lines)), examples + more))
    return _table([["reason", "files", "examples"]], rows, escaped=True) + _paragraph(
        f"All of them: {', '.join(path.name for path in run.skip_files)}.", "note"
    )


def _bad_batches(run: RunRecord) -> str:
    lines = "".join(f"<li><code>bestrq2 report --bad-batch {escape(str(path))}</code></li>" for path in run.bad_batches)
    return _paragraph("Kept for inspection; each command prints what is in one:") + f"<ul>{lines}</ul>"


def _checkpoints(run: RunRecord) -> str:
    if not run.checkpoints:
        return _paragraph("None yet.")
    rows = []
    for checkpoint in run.checkpoints:
        score = "" if checkpoint.score is None else f"{checkpoint.score:.4f}{' (best)' if checkpoint.best else ''}"
        rows.append([checkpoint.name, checkpoint.written, byte_count(checkpoint.size), score])
    return _table([["checkpoint", "written", "size", "validation loss, else training loss"]], rows)


def _configuration(run: RunRecord) -> str:
    rows = [[name, _plain(value), _plain(default)] for name, (value, default) in run.changed_settings().items()]
    changed = _table([["setting", "here", "default"]], rows) if rows else _paragraph("All settings are the defaults.")
    whole = escape(write_yaml(run.config)) if run.config else "config.yaml cannot be read"
    return f"{changed}\n<details><summary>The whole configuration</summary><pre>{whole}</pre></details>"


def _differing_settings(runs: Sequence[RunRecord]) -> str:
    flat = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for values in flat for name in values)
    rows = []
    for name in names:
        values = [_plain(run.get(name, "(absent)")) for run in flat]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return _table([["setting", *(run.name for run in runs)]], rows) if rows else _paragraph("None.")


def _versions(run: RunRecord) -> str:
    if not run.versions:
        return _paragraph("Not recorded.")
    names = dict.fromkeys(name for record in run.versions for name in record)
    rows = [[name, *(_plain(record.get(name)) for record in run.versions)] for name in names]
    if len(run.versions) > 1:
        rows = [["", *(f"start {number + 1}" for number in range(len(run.versions)))], *rows]
    return _table([], rows)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _table(head: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], escaped: bool = False) -> str:
    form = str if escaped else escape
    lines = ["<table>"]
    for row in head:
        lines.append("<tr>" + "".join(f"<th>{form(cell)}</th>" for cell in row) + "</tr>")
    for row in rows:
        first, *rest = row
        cells = "".join(f"<td>{form(cell)}</td>" for cell in rest)
        lines.append(f'<tr><td class="name">{form(first)}</td>{cells}</tr>')
    return "\n".join([*lines, "</table>"])


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def _figure(path: Path, caption: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return _paragraph(f"{path.name} cannot be read: {error}")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
