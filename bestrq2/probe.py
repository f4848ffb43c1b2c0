"""Evaluate frozen features with linear, MLP and k-NN probes, next to two baselines.

    bestrq2 probe runs/best_rq2_tiny-001        # speech, music or environment, on the 24 clips of the package
    bestrq2 probe ENCODER clips.csv --label instrument --group recording --head linear,ridge,knn
    bestrq2 probe ENCODER clips.csv --label tags --kind multilabel --separator ';' --split part
    bestrq2 probe ENCODER clips.csv --kind events --events events.tsv --group recording
    bestrq2 probe ENCODER clips.csv --kind retrieval --label phrase --group speaker
    bestrq2 probe ENCODER clips.csv --kind regression --label bpm --group track --layers all

The manifest (CSV, TSV or JSON lines) has a column with the path of each clip, one with its label and, better, one that
says which clips belong together (speaker, recording, package): a group is never split between training and test.
Heads are cross-validated over groups, or trained and tested as the column --split says; regularisation is chosen inside
the training clips. The same is done with the statistics of a log-mel spectrogram (for events, of every frame) and with
the same encoder before any training. Intervals are 95 % bootstrap intervals over groups, differences are paired.
They say how much the choice of test clips matters, not what another training run would give. --controls checks the
probe itself: audio path, a handful of clips learned by heart, log-mel as an encoder.

  classification  one label a clip: balanced accuracy, accuracy, macro F1, mAP, confusion matrix
  multilabel      any number of labels a clip: mAP, F1 at a threshold
  events          labels with onset and offset in seconds: mAP and F1 of frames, F1 of segments
  retrieval       clips with the same label match: R@1, R@5, mAP by cosine, nothing is trained
  regression      a number: R2, Spearman's correlation, mean absolute error

Needs scikit-learn: pip install 'bestrq2[probe]'.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from bestrq2.command import command, leave
from bestrq2.console import progress_bar

# isort: split
import torch

from bestrq2.config import ConfigError
from bestrq2.data import Skip, iterate_clips
from bestrq2.errors import counted
from bestrq2.hardware import choose_device
from bestrq2.interchange import open_encoder, open_source
from bestrq2.models import ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.models.readout import POOLINGS, ROW_JOINS, averaged_rows
from bestrq2.outputs import add_overwrite, alone_in, busy, check_new, check_writable, numbered
from bestrq2.probing import controls, report
from bestrq2.probing.evaluation import Outcome
from bestrq2.probing.experiment import Experiment, assemble
from bestrq2.probing.features import ENCODER, RANDOM, Features, extract, readings, untrained_copy
from bestrq2.probing.heads import require_sklearn
from bestrq2.probing.labels import OUTSIDE, LabelledClips, check_testable, read_clips
from bestrq2.probing.task import COMBINATIONS, SCALINGS, STRENGTHS, Head, ProbeKind, ProbeTask, packaged_task

_READING = ("layers", "combine", "rows", "pooling")
MARKED = ("multilabel", "events")
DEFAULT_HEADS = {"retrieval": "cosine", "events": "linear"}


def open_pair(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The encoder, the same before training, and what the report says about them."""
    hints = {"heads": options.heads, "hop_length": options.hop_length}
    encoder = open_encoder(options.encoder, trust_remote_code=options.trust_remote_code, **hints)
    if not isinstance(encoder, (ViTEncoder, ConformerEncoder)):
        return encoder, untrained_copy(encoder, options.seed), {"encoder": options.encoder, "step": 0}  # type: ignore[arg-type]
    opened = open_source(options.encoder, **hints)
    config = opened.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        fresh = build_encoder(config.model, config.data.crop_seconds, seed=config.train.seed)
    return encoder, fresh.eval().requires_grad_(False), {"encoder": str(opened.origin), "step": opened.step}


def task_of(options: argparse.Namespace) -> ProbeTask:
    """The task that the options describe."""
    choices: dict[str, Any] = {
        name: value
        for name in (*_READING, "kind", "separator", "events", "group", "split", "folds", "regularisation")
        if (value := getattr(options, name)) is not None
    }
    choices |= {
        name: getattr(options, name) for name in ("threshold", "segment_seconds", "scaling", "drop_rare", "seed")
    }
    if options.layer is not None and options.layers is not None:
        raise ConfigError("--layer and --layers: give one of them")
    if options.layer is not None:
        choices["layers"] = str(options.layer)
    if options.label:
        choices["label"] = options.label[0] if len(options.label) == 1 else tuple(options.label)
    if options.split_values:
        train, test = (tuple(value.strip() for value in part.split(",")) for part in options.split_values)
        if both := [value for value in train if value in test]:
            raise ConfigError(f"--split-values: {', '.join(map(repr, both))} on both sides, training and test")
        choices["train_values"], choices["test_values"] = train, test
    wheres = []
    for text in options.where:
        column, equals, values = text.partition("=")
        if not equals:
            raise ConfigError(f"--where: expected COLUMN=VALUE, got {text!r}")
        wheres.append((column.strip(), tuple(value.strip() for value in values.split(","))))
    choices["where"] = tuple(wheres)
    if options.manifest is None:
        return packaged_task(**choices)
    return ProbeTask(manifest=options.manifest, **choices)


def unused(options: argparse.Namespace, task: ProbeTask, heads: list[str]) -> list[str]:
    """A sentence for every option that was given and changes nothing."""
    kind, several = task.kind, "," in task.layers or task.layers in ("all", "middle")
    needs = (  # option, whether it was given, whether it is used, what would use it
        ("--label", options.label, kind != "events", "another --kind: labels are those of the table --events"),
        (
            "--separator",
            options.separator,
            kind == "multilabel" and isinstance(task.label, str),
            "one multilabel column",
        ),
        ("--events", options.events, kind == "events", "--kind events"),
        ("--split-values", options.split_values, task.split, "--split"),
        ("--folds", options.folds is not None, not task.split and kind != "retrieval", "cross-validation"),
        ("--head", options.head, kind != "retrieval", "another --kind: retrieval trains nothing"),
        ("--regularisation", options.regularisation, {*heads} & {*STRENGTHS}, f"--head {', '.join(STRENGTHS)}"),
        ("--threshold", task.threshold != ProbeTask.threshold, kind in MARKED, "--kind multilabel or events"),
        ("--segment-seconds", task.segment_seconds != ProbeTask.segment_seconds, kind == "events", "--kind events"),
        ("--scaling", task.scaling != ProbeTask.scaling, kind == "retrieval", "--kind retrieval"),
        ("--pooling", options.pooling, kind != "events", "another --kind: events are found in frames"),
        ("--combine", options.combine, several, "several --layers"),
    )
    return [f"{option} is not used: it is for {use}" for option, given, used, use in needs if given and not used]


def heads_of(options: argparse.Namespace, task: ProbeTask) -> list[str]:
    if task.kind == "retrieval":
        return ["cosine"]
    heads = [head.strip() for head in (options.head or DEFAULT_HEADS.get(task.kind, "linear,knn")).split(",")]
    for head in heads:
        if head not in get_args(Head):
            raise ConfigError(f"--head: expected some of {', '.join(get_args(Head))}, got {head!r}")
    return heads


def extract_all(
    labels: LabelledClips,
    pair: dict[str, Any],
    task: ProbeTask,
    batch_size: int,
) -> Features:
    """Features of every clip, with a progress bar."""
    encoder = pair[ENCODER]
    wanted = readings(task.layers, task.combine, encoder.depth)
    with progress_bar(total=len(labels), desc="encoding", unit="clip") as bar:
        return extract(
            iterate_clips(labels.files, encoder.sampling_rate),
            pair,
            sampling_rate=encoder.sampling_rate,
            hop=encoder.hop_size_in_ms / 1000,
            wanted=wanted,
            rows=task.rows,
            pooling=None if task.kind == "events" else task.pooling,
            batch_size=batch_size,
            progress=bar.update,
        )


def run(options: argparse.Namespace) -> int:
    """Probe, print and write; 1 if a control fails, else 0."""
    require_sklearn()
    if options.out is None:
        check_writable("without --out, results in", Path())
    else:
        results = (*report.FILES, *report.PICTURES)
        check_new("--out", [options.out / name for name in results], options.overwrite)
    task = task_of(options)
    heads = heads_of(options, task)
    for useless in unused(options, task, heads):
        print(f"note: {useless}", file=sys.stderr)
    labels = read_clips(task)
    check_testable(labels, task)
    encoder, untrained, origin = open_pair(options)
    if note := averaged_rows(encoder, options.rows):
        print(f"note: {note}", file=sys.stderr)
    device = choose_device(options.device, option="--device")
    pair = {ENCODER: encoder.to(device), RANDOM: untrained.to(device)}
    features = extract_all(labels, pair, task, options.batch_size)
    for skip in features.skips:
        print(f"warning: skipped {skip}", file=sys.stderr)
    if not features.usable:
        raise ConfigError(f"{task.path}: no file can be read ({counted(len(labels), 'file')} tried)")
    if options.controls and task.kind != "events":
        add_log_mel_encoder(features, labels, task, encoder.sampling_rate, options.batch_size)
    experiment = assemble(labels, features, task, encoder.hop_size_in_ms / 1000)
    announce(experiment)
    rungs = []
    if options.controls:
        some = list(iterate_clips(experiment.clips.files[:8], encoder.sampling_rate))
        decoded = [item for item in some if not isinstance(item, Skip)]
        own = next(values for name, values in experiment.values.items() if name.startswith(ENCODER))
        rungs = controls.ladder(decoded, own, experiment.clips, task, encoder.sampling_rate)
    outcomes: dict[str, dict[str, Outcome]] = {}
    with progress_bar(total=len(experiment.values) * len(heads), desc="probing", unit="head", leave=False) as bar:
        for name in experiment.values:
            outcomes[name] = {}
            for head in heads:
                outcomes[name][head] = experiment.probe(name, head)
                bar.update()
    print(report.text(outcomes, experiment))
    if rungs:
        print(controls.text(rungs))
        origin["controls"] = controls.document(rungs)
    if sum(name.startswith(ENCODER) for name in experiment.values) > 1:
        print("The best of several layers was chosen on the test clips: its score is optimistically biased.")
    shown = {name: str(value) for name, value in vars(options).items() if value not in (None, [])}
    out = numbered("probe") if options.out is None else options.out
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out, busy("--out", out)):
        if options.out is not None:  # another process may have written them meanwhile
            check_new("--out", [out / name for name in results], options.overwrite)
        written = report.write(out, outcomes, experiment, {**origin, "options": shown})
    print(f"Written: {', '.join(map(str, written))}")
    return 1 if any(rung.holds is False for rung in rungs) else 0


def add_log_mel_encoder(
    features: Features, labels: LabelledClips, task: ProbeTask, sampling_rate: int, batch_size: int
) -> None:
    """Features of the spectrogram that went the way of an encoder's, pooled in the same way."""
    found = extract(
        iterate_clips([labels.files[number] for number in features.usable], sampling_rate),
        {controls.LOG_MEL_ENCODER: controls.LogMelEncoder(sampling_rate)},
        sampling_rate=sampling_rate,
        hop=0.01,
        pooling=task.pooling,
        with_log_mel=False,
        batch_size=batch_size,
    )
    features.of |= found.of


def announce(experiment: Experiment) -> None:
    """Describe the test clips and the rows that were left out."""
    clips, task = experiment.clips, experiment.task
    parts = [counted(len(clips), "clip"), counted(int(clips.groups.max()) + 1, "group")]
    if clips.parts is not None:
        sides = Counter(clips.parts.tolist())
        names = ("in the gallery", "queries") if task.kind == "retrieval" else ("to train on", "to test on")
        parts += [f"{sides[side]} {name}" for side, name in enumerate(names)]
    elif experiment.rows is not None:
        parts.append(f"{experiment.folds.max() + 1} folds")
    if experiment.rows is not None and experiment.rows.hop:
        parts.append(f"{len(experiment.rows.targets)} frames of {1000 * experiment.rows.hop:g} ms")
    line = ", ".join(parts)
    if task.kind not in ("regression", "retrieval"):
        single = clips.targets.ndim == 1
        counts = [
            int((clips.targets == c).sum() if single else clips.targets[:, c].sum()) for c in range(len(clips.classes))
        ]
        line += f"; classes: {', '.join(f'{name} {count}' for name, count in zip(clips.classes, counts))}"
    print(line)
    for reason, count in clips.left_out.items():
        kind = "note" if reason == OUTSIDE else "warning"  # what was asked for is none
        print(f"{kind}: {counted(count, 'row')} {reason} left out", file=sys.stderr)
    for warning in clips.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bestrq2 probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "encoder",
        metavar="ENCODER",
        help="run, exported or published encoder, transformers folder, X-ARES .py, module:name",
    )
    add("manifest", nargs="?", help="labelled clips (default: the 24 clips of the package)")
    add("--kind", choices=get_args(ProbeKind), help="default: classification")
    add("--label", action="append", help="column with the label; several for multilabel columns of 0 and 1")
    add("--separator", help="separator of the labels in one multilabel cell (default: ';'); alone: no label")
    add("--events", help="table of events: path, onset, offset, label (seconds)")
    add("--group", help="column whose clips are never split between training and test (default: each clip is a group)")
    add("--split", help="column that says which clips train and which test, instead of cross-validation")
    add(
        "--split-values",
        nargs=2,
        metavar=("TRAIN", "TEST"),
        help="values of --split (default: train test; for retrieval: gallery query); several separated by commas",
    )
    add(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only these rows; several values separated by commas",
    )
    add("--drop-rare", action="store_true", help="leave out classes with too few groups, instead of an error")
    add("--head", help="some of linear,ridge,mlp,knn (default: linear,knn; linear for events)")
    add("--regularisation", type=float, help="inverse L2 strength (default: chosen inside the training clips)")
    add(
        "--folds",
        type=int,
        help="number of folds (default: 5, or as many as the rarest class has groups); 0: one per group",
    )
    add("--pooling", choices=POOLINGS, help="of the frames of a clip (default: mean+std)")
    add("--pool", dest="pooling", choices=POOLINGS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add(
        "--scaling",
        choices=SCALINGS,
        default="all",
        help="of features for retrieval: gallery and queries together, each side by itself, or none",
    )
    add(
        "--layers",
        help="all, middle, or numbers of blocks (0 is the first) and final (default: final)",
    )
    add(
        "--combine",
        choices=COMBINATIONS,
        help="of several layers: each by itself (default), average, concatenate, or weights that the head learns",
    )
    add("--rows", choices=ROW_JOINS, help="of 2-D patches: average or concatenate (default: as the encoder does)")
    add("--controls", action="store_true", help="check the probe itself first; exit code 1 if a control fails")
    add("--layer", type=int, help="the same as --layers with one number")
    add("--threshold", type=float, default=0.5, help="score above which a label counts as predicted (default: 0.5)")
    add("--segment-seconds", type=float, default=1.0, help="segment length for the F1 of events (default: 1)")
    add("--out", type=Path, help="output folder (default: probe-001, or the next number that is free)")
    add_overwrite(parser)
    add("--batch-size", type=int, default=8, help="files encoded together (default: 8)")
    add("--seed", type=int, default=0, help="seed of folds, random initialisation, MLP and bootstrap")
    add("--device", default="auto")
    add("--trust-remote-code", action="store_true", help="run the Python code of a transformers folder")
    add("--heads", type=int, help="attention heads, if a published ENCODER does not state them")
    add("--hop-length", type=int, help="samples between frames, if a published ENCODER does not state them")
    return parser.parse_args(arguments)


@command
def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {options.batch_size}")
    return run(options)


if __name__ == "__main__":
    leave(main())
