"""Classify clips by a frozen encoder's features, beside two baselines.

    python -m bestrq2.probe runs/best_rq2_tiny-001 clips.csv --label instrument --group recording --out probe
    python -m bestrq2.probe runs/best_rq2_tiny-001        # speech, music or environment, on the 24 clips of the package

The manifest (CSV, TSV or JSON lines) has a column with the path of each clip, one with its label and, better, one that
says which clips belong together (speaker, recording, package): a group is never split between training and test. A
linear probe and 10 nearest neighbours are cross-validated on the clip's mean feature; the same is done with the
statistics of a log-mel spectrogram and with the same encoder before any training. Intervals are 95 % bootstrap
intervals over groups.
Needs scikit-learn: pip install 'bestrq2[probe]'.
"""

import argparse
import csv
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestrq2.checkpoint import CheckpointError
from bestrq2.config import ConfigError
from bestrq2.data import AudioFile, ManifestError, Skip
from bestrq2.data.manifest import read_rows
from bestrq2.embed import embed
from bestrq2.interchange.opening import Source, open_source
from bestrq2.interchange.tensors import assemble_encoder
from bestrq2.models import ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.probing.evaluation import (
    ProbeKind,
    Task,
    balanced_accuracy,
    bootstrap,
    confusion,
    interval,
    make_task,
    predict,
    require_sklearn,
)
from bestrq2.probing.features import log_mel_statistics, pool
from bestrq2.probing.picture import save_confusions
from bestrq2.training.hardware import choose_device

ENCODER, RANDOM, LOG_MEL = "encoder", "random initialisation", "log-mel statistics"
Predictions = dict[tuple[str, ProbeKind], np.ndarray]
KINDS: tuple[ProbeKind, ...] = ("linear", "knn")


def read_labels(manifest: Path, label: str, group: str | None) -> tuple[list[AudioFile], list[str], list[str], int]:
    """Files, labels and groups of the rows that have a label; how many have none.

    Raises:
        ManifestError: for a missing column, or no labelled row.
    """
    files, labels, groups, unlabelled = [], [], [], 0
    for file, row in read_rows(manifest):
        for column in filter(None, (label, group)):
            if column not in row:
                raise ManifestError(f"{manifest}: no column {column!r}; its columns are {list(row)}")
        if row[label] in (None, ""):
            unlabelled += 1
            continue
        if group and row[group] in (None, ""):
            raise ManifestError(f"{manifest}: {file.path} has no {group!r}, so nothing says which clips belong with it")
        files.append(file)
        labels.append(str(row[label]))
        groups.append(str(row[group]) if group else file.path)
    if not files:
        raise ManifestError(f"{manifest}: no row has a {label!r}")
    return files, labels, groups, unlabelled


def encoder_features(
    encoder: ViTEncoder | ConformerEncoder, files: list[AudioFile], pooling: str, layer: int | None, batch_size: int
) -> list[np.ndarray | Skip]:
    """Pooled features of each file, or why it cannot be read."""
    results = embed(encoder, files, batch_size=batch_size, layer=layer)
    return [result if isinstance(result, Skip) else pool(result[1], pooling) for result in results]


def untrained(source: Source, seed: int) -> ViTEncoder | ConformerEncoder:
    """The same encoder with the weights that training would start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(source.config.model, source.config.data.crop_seconds, seed=source.config.train.seed)
    return encoder.eval().requires_grad_(False)


def evaluate(
    features: dict[str, np.ndarray], task: Task, regularisation: float | None
) -> tuple[dict[str, Any], Predictions]:
    """Every probe on every kind of features.

    Returns:
        results for JSON, and predictions by (features, probe).
    """
    results: dict[str, Any] = {}
    predictions: Predictions = {}
    for kind in KINDS:
        samples = {}
        for name, values in features.items():
            predicted = predictions[name, kind] = predict(values, task, kind, regularisation)
            samples[name] = bootstrap(predicted, task)
            low, high = interval(samples[name])
            entry = {"balanced_accuracy": balanced_accuracy(predicted, task), "low": low, "high": high}
            results.setdefault(name, {})[kind] = entry
        for name in features:
            if name != ENCODER:
                low, high = interval(samples[ENCODER] - samples[name])
                own, other = (results[which][kind]["balanced_accuracy"] for which in (ENCODER, name))
                results[name][kind]["encoder_minus_this"] = {
                    "difference": own - other,
                    "low": low,
                    "high": high,
                }
    return results, predictions


def report(results: dict[str, Any], task: Task) -> str:
    lines = [f"{'balanced accuracy':24} {'linear probe':>26} {'10 nearest neighbours':>26}"]
    for name, entry in results.items():
        cells = [f"{e['balanced_accuracy']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in map(entry.get, KINDS)]
        lines.append(f"{name:24} {cells[0]:>26} {cells[1]:>26}")
    lines.append(f"{'chance':24} {1 / len(task.classes):>26.3f} {1 / len(task.classes):>26.3f}")
    for name in (LOG_MEL, RANDOM):
        cells = []
        for kind in KINDS:
            gap = results[name][kind]["encoder_minus_this"]
            cells.append(f"{gap['difference']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        lines.append(f"{'  encoder - ' + name[:12]:24} {cells[0]:>26} {cells[1]:>26}")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    require_sklearn()
    manifest, label, group = options.manifest, options.label, options.group
    if manifest is None:
        manifest = Path(str(resources.files("bestrq2.data").joinpath("tiny", "labels.csv")))
        label, group = label or "domain", group or "item"
    files, labels, groups, unlabelled = read_labels(manifest, label or "label", group)
    source = open_source(options.run, heads=options.heads, hop_length=options.hop_length)
    trained = assemble_encoder(source.config, source.weights, source.origin)
    if options.layer is not None and not 0 <= options.layer < trained.depth:
        raise ConfigError(f"--layer: expected 0..{trained.depth - 1}, got {options.layer}")
    device = choose_device(options.device)
    rows: dict[str, list[np.ndarray | Skip]] = {}
    for name, encoder in ((ENCODER, trained), (RANDOM, untrained(source, options.seed))):
        rows[name] = encoder_features(encoder.to(device), files, options.pooling, options.layer, options.batch_size)
    rows[LOG_MEL] = log_mel_statistics(files, trained.sampling_rate)
    usable = [i for i in range(len(files)) if not any(isinstance(values[i], Skip) for values in rows.values())]
    for skip in (row for row in rows[ENCODER] if isinstance(row, Skip)):
        print(f"warning: skipped {skip}", file=sys.stderr)
    if not usable:
        raise ConfigError(f"{manifest}: none of its {len(files)} files can be read")
    task = make_task([labels[i] for i in usable], [groups[i] for i in usable], options.folds, options.seed)
    features = {name: np.stack([np.asarray(values[i], np.float64) for i in usable]) for name, values in rows.items()}
    counts = np.bincount(task.labels)
    print(
        f"{len(usable)} clips, {task.groups.max() + 1} groups, {task.folds.max() + 1} folds; "
        f"classes: {', '.join(f'{name} {count}' for name, count in zip(task.classes, counts))}"
    )
    if unlabelled:
        print(f"warning: {unlabelled} rows without a label left out", file=sys.stderr)
    if group is None:
        print(
            "warning: no --group: clips of one recording may lie in training and test, and scores too high",
            file=sys.stderr,
        )
    results, predictions = evaluate(features, task, options.regularisation)
    print(report(results, task))
    write(options, task, [files[i] for i in usable], results, predictions, source)


def write(
    options: argparse.Namespace,
    task: Task,
    files: list[AudioFile],
    results: dict[str, Any],
    predictions: Predictions,
    source: Source,
) -> None:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    document = {
        "encoder": str(source.origin),
        "step": source.step,
        "options": {name: str(value) for name, value in vars(options).items() if value is not None},
        "clips": len(files),
        "groups": int(task.groups.max()) + 1,
        "folds": int(task.folds.max()) + 1,
        "classes": task.classes,
        "chance": 1 / len(task.classes),
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", *(f"{name} {kind}" for name, kind in predictions)])
        for i, item in enumerate(files):
            guesses = [task.classes[values[i]] for values in predictions.values()]
            writer.writerow([item.path, task.classes[task.labels[i]], task.folds[i], *guesses])
    titles = {"linear": "encoder, linear probe", "knn": "encoder, nearest neighbours"}
    matrices = {titles[kind]: confusion(predictions[ENCODER, kind], task) for kind in KINDS}
    save_confusions(out / "confusion.png", matrices, task.classes)
    print(f"Written: {out / 'results.json'}, {out / 'predictions.csv'}, {out / 'confusion.png'}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bestrq2.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="anything bestrq2.load opens")
    parser.add_argument("manifest", type=Path, nargs="?", help="labelled clips (default: the 24 clips of the package)")
    parser.add_argument("--label", help="column with the class (default: label)")
    parser.add_argument("--group", help="column whose clips are never split (default: every clip stands alone)")
    parser.add_argument("--out", type=Path, default=Path("probe"), help="output folder (default: probe)")
    parser.add_argument("--folds", type=int, default=5, help="at most; no more than the groups of the rarest class")
    parser.add_argument("--pooling", choices=("mean", "mean+std"), default="mean", help="over the frames of a clip")
    parser.add_argument("--layer", type=int, help="output of this block (0 is the first) instead of the final one")
    parser.add_argument(
        "--regularisation", type=float, help="C of the logistic regression (default: chosen inside the training folds)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="files encoded together (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds and of the random initialisation")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--heads", type=int, help="attention heads of a published RUN that does not say them")
    parser.add_argument(
        "--hop-length", type=int, help="samples between frames of a published RUN that does not say them"
    )
    options = parser.parse_args(arguments)
    try:
        if options.batch_size < 1 or (options.regularisation or 1) <= 0:
            raise ConfigError("--batch-size and --regularisation: expected positive numbers")
        run(options)
    except (CheckpointError, ConfigError, ManifestError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
