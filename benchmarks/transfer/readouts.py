#!/usr/bin/env python
"""Compare readouts of encoders, without any training: which layers, joined how, pooled how.

    python benchmarks/transfer/readouts.py --corpora corpora --out readouts runs/a runs/b
    python benchmarks/transfer/readouts.py --corpora corpora --out readouts --untrained best_rq2_small

ENCODER is whatever ``probe`` takes; of our own runs the encoder before training is read as well. ``--untrained CONFIG``
takes recipes or configuration files whose random initialisation is read alone. Every clip is encoded once for all
readouts. One row a readout and task goes to ``readouts.csv`` at once; rows that exist are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.transfer.scores import Suite
from benchmarks.transfer.tasks import corpus_tasks, packaged_tasks
from bestrq2.config import load_config
from bestrq2.interchange import open_encoder, open_source
from bestrq2.models import ConformerEncoder, ViTEncoder, build_encoder
from bestrq2.probing.experiment import assemble
from bestrq2.probing.features import ENCODER, LOG_MEL, Features, Reading, extract

POOLINGS = ("mean", "mean+std")
COLUMNS = ("encoder", "trained", "layers", "combine", "pooling", "task", "metric", "value", "low", "high", "width")


def readings_of(depth: int) -> dict[tuple[str, str], Reading]:
    """The readouts by (layers, combine): every block, the final output, the middle and all, averaged and joined."""
    middle, every = (depth // 2 - 1, depth // 2), (*range(depth), None)
    found = {(str(n), "each"): Reading(f", layer {n}", (n,)) for n in range(depth)}
    found["final", "each"] = Reading("", (None,))
    for layers, chosen in (("middle", middle), ("all", every)):
        if depth > 1:
            found[layers, "average"] = Reading(f", {layers} averaged", chosen)
            found[layers, "concatenate"] = Reading(f", {layers} joined", chosen, "concatenate")
    return found


def untrained(config: str, seed: int) -> ViTEncoder | ConformerEncoder:
    """The encoder of a configuration with weights drawn from ``seed``, and the level of speech at usual loudness."""
    loaded = load_config(config)
    front = loaded.model.front_end
    if front.normalize == "global" and front.mean is None:
        front.mean, front.std = -40.0, 20.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(loaded.model, loaded.data.crop_seconds).eval().requires_grad_(False)


def pairs(options: argparse.Namespace) -> Iterator[tuple[str, bool, Any]]:
    """(name, whether trained, encoder)."""
    for config in options.untrained:
        yield Path(config).stem, False, untrained(config, options.seed)
    for source in options.encoders:
        encoder = open_encoder(source)
        yield Path(source).name, True, encoder
        if isinstance(encoder, (ViTEncoder, ConformerEncoder)):
            config = open_source(source).config
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                fresh = build_encoder(config.model, config.data.crop_seconds)
            yield Path(source).name, False, fresh.eval().requires_grad_(False)


def measure(suite: Suite, task: str, encoder: Any, name: str, trained: bool) -> Iterator[dict[str, Any]]:
    """Rows of all readouts of an encoder in one task; without an encoder, of log-mel statistics."""
    wanted = readings_of(encoder.depth) if encoder is not None else {}
    features = extract(
        suite.clips(task),
        {ENCODER: encoder} if encoder is not None else {},
        sampling_rate=suite.sampling_rate,
        hop=0.01,  # not used: clips are pooled
        wanted=list(wanted.values()),
        pooling="mean+std",
        with_log_mel=encoder is None,
    )
    choices = {reading.end: key for key, reading in wanted.items()}
    for end, vectors in features.of.items():
        for pooling in POOLINGS if end != LOG_MEL else ("mean+std+change",):
            half = [v[: len(v) // 2] for v in vectors] if pooling == "mean" else vectors
            one = Features({end: half}, features.usable, features.seconds, features.skips)
            experiment = assemble(suite.labels[task], one, suite.tasks[task], 0.01)
            found = experiment.probe(end, "linear").metrics[suite.tasks[task].metric]
            layers, combine = choices.get(end.removeprefix(ENCODER), ("", ""))
            yield {
                **{"encoder": name, "trained": int(trained), "layers": layers, "combine": combine, "pooling": pooling},
                **{"task": task, "metric": suite.tasks[task].metric, "width": len(half[0])},
                **{key: f"{getattr(found, key):.5f}" for key in ("value", "low", "high")},
            }


def summary(rows: list[dict[str, Any]], tasks: list[str]) -> str:
    """Means over the tasks in percent, one line a readout, the best last."""
    means: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = (row["encoder"], row["trained"], row["layers"], row["combine"], row["pooling"])
        means.setdefault(tuple(map(str, key)), []).append(100 * float(row["value"]))
    whole = {key: values for key, values in means.items() if len(values) == len(tasks)}
    lines = [f"{'mean':>6s}  encoder, trained, layers, combine, pooling"]
    ranked = sorted(whole.items(), key=lambda entry: float(np.mean(entry[1])))
    return "\n".join([*lines, *(f"{np.mean(values):6.2f}  {', '.join(key)}" for key, values in ranked)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", metavar="ENCODER", help="runs and other encoders")
    parser.add_argument("--untrained", nargs="+", default=[], metavar="CONFIG", help="recipes to read before training")
    parser.add_argument("--corpora", type=Path, help="folder written by corpora.py (default: the clips of the package)")
    parser.add_argument("--tasks", help="some of the tasks, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained encoders")
    parser.add_argument("--out", type=Path, default=Path("readouts"), help="output folder (default: readouts)")
    options = parser.parse_args(arguments)
    tasks = corpus_tasks(options.corpora / "clips.csv") if options.corpora else packaged_tasks()
    chosen = options.tasks.split(",") if options.tasks else list(tasks)
    suite = Suite({name: tasks[name] for name in chosen})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "readouts.csv"
    facts = environment("python benchmarks/transfer/readouts.py " + " ".join(sys.argv[1:]))
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["encoder"], str(row["trained"]), row["task"]) for row in rows}
    encoders = [("log-mel statistics", False, None), *pairs(options)]
    for task in chosen:
        for name, trained, encoder in encoders:
            if (name, str(int(trained)), task) in done:
                continue
            found = [{**row, **facts} for row in measure(suite, task, encoder, name, trained)]
            rows += found
            partial = path.with_name(f".{path.name}.partial")
            with partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, [*COLUMNS, *facts])
                writer.writeheader()
                writer.writerows(rows)
            partial.replace(path)
            print(f"{task}: {name}, {'trained' if trained else 'untrained'}", flush=True)
        suite.forget(task)
    print(summary(rows, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
