"""Results as text, JSON, tables and pictures.

Rows of results are features (encoder, its layers, random initialisation, log-mel), columns heads; every baseline comes
with the paired difference to the encoder at the same layer.
"""

import csv
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.durability import whole_file

from .evaluation import Outcome
from .experiment import Experiment
from .features import ENCODER, LOG_MEL, RANDOM
from .folds import NEVER
from .metrics import Estimate, confusion
from .picture import save_confusions, save_per_class
from .retrieval import COLUMNS

logger = logging.getLogger(__name__)

FILES = ("results.json", "results.csv", "per_class.csv", "predictions.csv")
PICTURES = ("confusion.png", "per_class.png")
Outcomes = Mapping[str, Mapping[str, Outcome]]  # by features, by head
HEAD_TITLES = {"linear": "linear", "ridge": "ridge", "mlp": "MLP", "knn": "10 nearest neighbours", "cosine": "cosine"}


def differences(outcomes: Outcomes, head: str, metric: str) -> dict[str, Estimate]:
    """Encoder minus baseline, by the baseline's name: random initialisation at the same layer; log-mel with the final
    output of the encoder, or with the last of the layers asked for."""
    encoders = [name for name in outcomes if name.startswith(ENCODER)]
    found = {}
    for name, entry in outcomes.items():
        if name.startswith(ENCODER):
            continue
        final = ENCODER if ENCODER in encoders else encoders[-1]
        own = name.replace(RANDOM, ENCODER) if name.startswith(RANDOM) else final
        found[name] = outcomes[own][head].metrics[metric].minus(entry[head].metrics[metric])
    return found


def _cell(value: Estimate, sign: str = "") -> str:
    return f"{value.value:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def text(outcomes: Outcomes, experiment: Experiment) -> str:
    """The table that is printed: the task's main metric with 95 % intervals."""
    metric = experiment.task.metric
    heads = list(next(iter(outcomes.values())))
    width = max(24, *(len(name) for name in outcomes)) + 1
    lines = [metric.replace("_", " ").ljust(width) + "".join(f" {HEAD_TITLES[head]:>26}" for head in heads)]
    for name, entry in outcomes.items():
        lines.append(name.ljust(width) + "".join(f" {_cell(entry[head].metrics[metric]):>26}" for head in heads))
    level = experiment.chance(next(iter(next(iter(outcomes.values())).values())))
    lines.append("chance".ljust(width) + "".join(f" {level:>26.3f}" for _ in heads))
    gaps = {head: differences(outcomes, head, metric) for head in heads}
    for name in next(iter(gaps.values())):
        title = f"  encoder - {name.removesuffix(' statistics').replace(RANDOM, 'random')}"
        lines.append(title.ljust(width) + "".join(f" {_cell(gaps[head][name], '+'):>26}" for head in heads))
    return "\n".join(lines)


def _numbers(value: Estimate) -> dict[str, float | None]:
    return {key: _finite(getattr(value, key)) for key in ("value", "low", "high")}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def document(outcomes: Outcomes, experiment: Experiment, origin: dict[str, Any]) -> dict[str, Any]:
    """Everything, for JSON; what is undefined is null."""
    clips, folds = experiment.clips, experiment.folds
    first = next(iter(next(iter(outcomes.values())).values()))
    results: dict[str, Any] = {}
    for name, entry in outcomes.items():
        results[name] = {}
        for head, outcome in entry.items():
            found: dict[str, Any] = {metric: _numbers(value) for metric, value in outcome.metrics.items()}
            for metric in outcome.metrics:
                if name in (gaps := differences(outcomes, head, metric)):
                    found[metric]["encoder_minus_this"] = _numbers(gaps[name])
            found["regularisation"] = outcome.strengths
            if outcome.layer_weights:
                found["layer_weights"] = outcome.layer_weights
            found["per_class"] = [{key: _finite(value) for key, value in row.items()} for row in outcome.per_class]
            results[name][head] = found
    return {
        **origin,
        "task": asdict(experiment.task),
        "metric": experiment.task.metric,
        "chance": _finite(experiment.chance(first)),
        "clips": len(clips),
        "rows": len(clips) if experiment.rows is None else len(experiment.rows.targets),
        "groups": int(clips.groups.max()) + 1,
        "folds": len(set(folds[folds != NEVER].tolist())),
        "classes": clips.classes,
        "left_out": dict(clips.left_out),
        "warnings": clips.warnings,
        "results": results,
    }


def write(out: Path, outcomes: Outcomes, experiment: Experiment, origin: dict[str, Any]) -> list[Path]:
    """Write results.json, results.csv, per_class.csv, predictions.csv and pictures; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, *PICTURES):  # of an earlier probe, perhaps of another kind
        (out / name).unlink(missing_ok=True)
    found = document(outcomes, experiment, origin)
    with whole_file(out / "results.json") as file:
        file.write(json.dumps(found, indent=2) + "\n")
    written = [out / "results.json", out / "results.csv"]
    with whole_file(written[-1]) as file:
        writer = csv.writer(file)
        writer.writerow(["features", "head", "metric", "value", "low", "high", "minus", "minus_low", "minus_high"])
        for name, entry in outcomes.items():
            for head, outcome in entry.items():
                for metric, value in outcome.metrics.items():
                    gap = differences(outcomes, head, metric).get(name)
                    minus = [] if gap is None else [gap.value, gap.low, gap.high]
                    writer.writerow([name, head, metric, value.value, value.low, value.high, *minus])
    tables = [(n, head, row) for n, entry in outcomes.items() for head, o in entry.items() for row in o.per_class]
    if tables:
        written.append(out / "per_class.csv")
        with whole_file(written[-1]) as file:
            writer = csv.writer(file)
            writer.writerow(["features", "head", *tables[0][2]])
            writer.writerows([name, head, *row.values()] for name, head, row in tables)
    written.append(_predictions(out, outcomes, experiment))
    try:
        picture = _picture(out, outcomes, experiment)
    except Exception as error:  # a picture that cannot be drawn costs no results
        logger.warning(f"the picture of the results could not be drawn: {type(error).__name__}: {error}")
        picture = None
    return written + ([picture] if picture else [])


def _predictions(out: Path, outcomes: Outcomes, experiment: Experiment) -> Path:
    """One row per clip (retrieval: per query; events: per frame), a column for every features and head.

    Where clips are parts of files, their seconds are the last columns.
    """
    path, clips, rows = out / "predictions.csv", experiment.clips, experiment.rows
    of_parts = ["start", "end"] if any(item.is_part for item in clips.files) else []

    def span(clip: int) -> list[str]:
        item = clips.files[clip]
        known = [repr(item.start), "" if item.end is None else repr(item.end)] if item.is_part else ["", ""]
        return known if of_parts else []

    columns = {f"{name} {head}": outcome.scores for name, entry in outcomes.items() for head, outcome in entry.items()}
    with whole_file(path) as file:
        writer = csv.writer(file)
        if rows is None:
            writer.writerow(["path", "label", *(f"{name} {c}" for name in columns for c in COLUMNS[1:]), *of_parts])
            queries = next(iter(columns.values()))[:, 0].astype(int)
            for i, query in enumerate(queries.tolist()):
                cells = [f"{value:.6g}" for scores in columns.values() for value in scores[i, 1:]]
                label = clips.classes[clips.targets[query]]
                writer.writerow([clips.files[query].path, label, *cells, *span(query)])
        elif rows.targets.ndim == 1:
            writer.writerow(["path", "label", "fold", *columns, *of_parts])
            single = rows.targets.dtype.kind != "f"
            for i in np.flatnonzero(rows.folds != NEVER).tolist():
                guesses = [rows.classes[s[i].argmax()] if single else f"{s[i, 0]:.12g}" for s in columns.values()]
                label = rows.classes[rows.targets[i]] if single else f"{rows.targets[i]:.15g}"
                writer.writerow([clips.files[i].path, label, rows.folds[i], *guesses, *span(i)])
        else:
            time = ["onset"] if rows.hop else []
            writer.writerow(["path", *time, "class", "label", "fold", *columns, *of_parts])
            first = {int(c): i for i, c in reversed(list(enumerate(rows.clip)))}
            for i in np.flatnonzero(rows.folds != NEVER).tolist():
                clip = int(rows.clip[i])
                time = [f"{(i - first[clip]) * rows.hop:.3f}"] if rows.hop else []
                for c, name in enumerate(rows.classes):
                    scores = [f"{s[i, c]:.6g}" for s in columns.values()]
                    target = int(rows.targets[i, c])
                    writer.writerow([clips.files[clip].path, *time, name, target, rows.folds[i], *scores, *span(clip)])
    return path


def _picture(out: Path, outcomes: Outcomes, experiment: Experiment) -> Path | None:
    """Confusion matrices of the encoder for single labels, average precision per class for several."""
    rows = experiment.rows
    if rows is None or rows.targets.dtype.kind == "f":
        return None
    own = ENCODER if ENCODER in outcomes else [name for name in outcomes if name.startswith(ENCODER)][-1]
    if rows.targets.ndim == 1:
        tested = rows.folds != NEVER
        matrices = {
            f"{own}, {HEAD_TITLES[head]}": confusion(
                outcome.scores[tested].argmax(1), rows.targets[tested], len(rows.classes)
            )
            for head, outcome in outcomes[own].items()
        }
        save_confusions(out / "confusion.png", matrices, rows.classes)
        return out / "confusion.png"
    head = next(iter(outcomes[own]))
    bars = {
        name: [row["AP"] for row in outcomes[name][head].per_class]
        for name in (own, own.replace(ENCODER, RANDOM), LOG_MEL)
    }
    level = [row["chance_AP"] for row in outcomes[own][head].per_class]
    save_per_class(out / "per_class.png", bars, level, rows.classes, f"average precision, {HEAD_TITLES[head]}")
    return out / "per_class.png"
