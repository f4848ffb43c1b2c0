"""One training run of a comparison, its scores, and the files that let a killed comparison go on where it was.

``OUT/runs/<candidate>-seed<k>`` is a usual run folder. ``OUT/scores/<name>.npz`` holds the score of one task with its
bootstrap resamples, written at once; what exists is not computed again. ``OUT/identity.json`` says what all of them are
scores of: another plan, corpus or readout in the same folder is refused. ``OUT/runs/identity.json`` says the same of
the runs, which scores of other tasks and heads share.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.transfer.kept_features import FeatureFolder, digest_of
from benchmarks.transfer.plan import Candidate, Plan
from bestrq2 import load, train
from bestrq2.config import ConfigError
from bestrq2.data import Skip, iterate_clips
from bestrq2.interchange import open_source
from bestrq2.models import build_encoder
from bestrq2.probing import ProbeTask
from bestrq2.probing.experiment import assemble
from bestrq2.probing.features import ENCODER, LOG_MEL, RANDOM, Clip, Features, Reading, extract, readings
from bestrq2.probing.labels import LabelledClips, read_clips
from bestrq2.runs.checkpoint import newest_intact

BASELINE = "log-mel statistics"
MEASURED = ("metric", "chance", "value", "low", "high", "samples")


class Interrupted(RuntimeError):
    """Training was stopped and saved; the same command goes on."""


@dataclass(frozen=True)
class Score:
    """Score of one kind of features in one task.

    Attributes:
        candidate, seed: of the run; ``candidate`` is "log-mel statistics" for the baseline without a run.
        features: "encoder", "random initialisation" or "log-mel statistics".
        task, metric: what was measured.
        chance, value, low, high: with a 95 % bootstrap interval over groups of test clips.
        samples: ``(1000,)`` resampled values; all features of a task resample the same groups.
        run: steps, FLOPs, minutes and the like of the run.
    """

    candidate: str
    seed: int
    features: str
    task: str
    metric: str
    chance: float
    value: float
    low: float
    high: float
    samples: np.ndarray
    run: dict[str, Any]


def write_score(path: Path, score: Score) -> None:
    """Write a score that is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    described = {key: value for key, value in asdict(score).items() if key != "samples"}
    with partial.open("wb") as file:
        np.savez(file, samples=score.samples, described=np.array(json.dumps(described)))
    partial.replace(path)


def read_score(path: Path) -> Score:
    with np.load(path) as file:
        return Score(samples=file["samples"], **json.loads(str(file["described"])))


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: if ``out`` holds scores of something else.
    """
    path = out / "identity.json"
    text = json.dumps(identity, indent=2, sort_keys=True)
    if path.exists() and path.read_text() != text:
        raise ConfigError(f"{out} holds another comparison (see {path.name}): choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".identity.json.partial"
    partial.write_text(text)
    partial.replace(path)


def check_runs(out: Path, identity: dict[str, Any]) -> None:
    """
    Args:
        identity: of scores; what training depends on is compared.

    Raises:
        ConfigError: if the runs in ``out`` are of another plan or other audio.
    """

    def of_training(identity: dict[str, Any]) -> dict[str, Any]:
        return {
            "source": identity["source"],
            **{key: identity["plan"][key] for key in ("candidates", "flops", "steps")},
        }

    kept, scores = out / "runs" / "identity.json", out / "identity.json"
    if not kept.exists() and scores.exists():  # runs from before they had an identity of their own
        check_identity(out / "runs", of_training(json.loads(scores.read_text())))
    check_identity(out / "runs", of_training(identity))


def train_run(plan: Plan, candidate: Candidate, seed: int, steps: int, source: str | None, out: Path) -> Path:
    """Train one run, or go on with it; its folder.

    Raises:
        Interrupted: if it was stopped.
        ConfigError: if it failed.
    """
    name = f"{candidate.name}-seed{seed}"
    folder = out / "runs" / name
    checkpoint, _ = newest_intact(folder / "checkpoints")
    if checkpoint is not None and checkpoint.step >= steps:
        return folder
    overrides = [*candidate.overrides, f"train.seed={seed}", f"train.steps={steps}", "train.keep_last=1"]
    data = [] if source is None else ["--data", source]
    begin = ["--config", candidate.config, "--runs", str(out / "runs"), "--name", name, "--resume"]
    code = train.main([*begin, *data, *overrides])
    if code in (130, 143):
        raise Interrupted(f"{name} was stopped and saved: the same command goes on")
    if code:
        raise ConfigError(f"training of {name} failed (exit code {code})")
    return folder


class Suite:
    """The tasks with their clips, decoded once.

    Args:
        tasks: by name.
        sampling_rate: Hz.
        precision: "fp32", or "bf16": encoders compute under autocast.
        kept: folder in which pooled features are kept for other tasks, heads and starts; None: in memory.
    """

    def __init__(
        self,
        tasks: dict[str, ProbeTask],
        sampling_rate: int = 16000,
        precision: str = "fp32",
        kept: Path | None = None,
    ) -> None:
        self.tasks, self.sampling_rate, self.precision = tasks, sampling_rate, precision
        self.labels: dict[str, LabelledClips] = {name: read_clips(task) for name, task in tasks.items()}
        self.kept = FeatureFolder(kept, precision)
        self._audio: dict[str, list[Clip | Skip]] = {}
        self._skips: dict[str, Skip] = {}

    def clips(self, name: str) -> list[Clip | Skip]:
        if name not in self._audio:
            self._audio[name] = list(iterate_clips(self.labels[name].files, self.sampling_rate))
        return self._audio[name]

    def forget(self, name: str) -> None:
        """Free the audio of a task."""
        self._audio.pop(name, None)

    def features(self, name: str, encoders: dict[str, Any], with_log_mel: bool) -> Features:
        """Pooled features of a task's clips. What is kept of an encoder is not computed again: tasks share clips. Clips
        of similar length are encoded together; the batch does not change features."""
        task, files = self.tasks[name], self.labels[name].files
        result = Features()
        sources: dict[str, Any] = {**encoders, **({LOG_MEL: None} if with_log_mel else {})}
        found: list[tuple[str, dict[str, dict[str, np.ndarray]]]] = []
        for kind, encoder in sources.items():
            wanted = [] if encoder is None else readings(task.layers, task.combine, encoder.depth)
            kept = self.kept.of(encoder, task, wanted)
            missing = [str(file) not in kept.of and str(file) not in self._skips for file in files]
            if any(missing):
                kept.add(self._extract(name, missing, kind, encoder, wanted))
            found.append((kind, kept.of))
            for reading in wanted or [Reading("", ())]:
                result.of[f"{kind}{reading.end}"] = []
                result.parts |= {} if encoder is None else {f"{kind}{reading.end}": reading.parts}
        for number, file in enumerate(files):
            if str(file) in self._skips:
                result.skips.append(self._skips[str(file)])
                continue
            result.usable.append(number)
            result.seconds.append(0.0)  # not used: clips are pooled
            for kind, of in found:
                for end, vector in of[str(file)].items():
                    result.of[f"{kind}{end}"].append(vector)
        return result

    def _extract(
        self, name: str, missing: list[bool], kind: str, encoder: Any, wanted: list[Reading]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Vectors of a task's missing clips, by file and by the end of the reading's name."""
        task = self.tasks[name]
        fresh = [
            (str(file), item)
            for file, item, is_missing in zip(self.labels[name].files, self.clips(name), missing)
            if is_missing
        ]
        self._skips |= {file: item for file, item in fresh if isinstance(item, Skip)}
        clips = [(file, item) for file, item in fresh if not isinstance(item, Skip)]
        clips.sort(key=lambda entry: len(entry[1][1]))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            features = extract(
                [item for _, item in clips],
                {} if encoder is None else {kind: encoder},
                sampling_rate=self.sampling_rate,
                hop=0.01,  # not used: clips are pooled
                wanted=wanted,
                rows=task.rows,
                pooling=task.pooling,
                with_log_mel=encoder is None,
            )
        vectors: dict[str, dict[str, np.ndarray]] = {file: {} for file, _ in clips}
        for full, values in features.of.items():
            for (file, _), vector in zip(clips, values):
                vectors[file][full.removeprefix(kind)] = vector
        return vectors

    def measure(self, name: str, encoders: dict[str, Any], with_log_mel: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """Metric, interval and resamples of each encoder, and of log-mel statistics, in one task."""
        task = self.tasks[name]
        features = self.features(name, encoders, with_log_mel)
        experiment = assemble(self.labels[name], features, task, 0.01)
        for kind in experiment.values:
            outcome = experiment.probe(kind, task.head)
            found = outcome.metrics[task.metric]
            yield (
                kind.split(",")[0],
                {
                    "metric": task.metric,
                    "chance": experiment.chance(outcome),
                    "value": found.value,
                    "low": found.low,
                    "high": found.high,
                    "samples": found.samples,
                },
            )


def probe_baseline(suite: Suite, out: Path, facts: dict[str, Any]) -> None:
    """Scores of log-mel statistics."""
    for task in suite.tasks:
        path = out / "scores" / f"log-mel--{task}.npz"
        if not path.exists():
            for features, found in suite.measure(task, {}, True):
                assert features == LOG_MEL
                write_score(path, Score(BASELINE, 0, features, task, run=facts, **found))


def probe_run(suite: Suite, candidate: Candidate, seed: int, run: Path, out: Path, facts: dict[str, Any]) -> None:
    """Scores of a trained encoder and of itself before training."""
    missing = [
        task for task in suite.tasks if not (out / "scores" / f"{candidate.name}-seed{seed}--{task}.npz").exists()
    ]
    if not missing:
        return
    config = open_source(run).config  # with the statistics that the run measured
    encoder = load(run)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_encoder(config.model, config.data.crop_seconds, seed=seed).eval().requires_grad_(False)
    facts = {**facts, "initial": digest_of(fresh)}
    stem = f"{candidate.name}-seed{seed}"
    # Candidates that differ in targets or masks alone begin with the same encoder: it is scored once.
    same = [
        score for score in all_scores(out) if score.features == RANDOM and score.run.get("initial") == facts["initial"]
    ]
    before = {score.task: score for score in same}
    for task in missing:
        began = time.perf_counter()
        encoders = {ENCODER: encoder} if set(missing) <= set(before) else {ENCODER: encoder, RANDOM: fresh}
        found = dict(suite.measure(task, encoders, False))
        if RANDOM not in found:
            known = before[task]
            found[RANDOM] = {name: getattr(known, name) for name in MEASURED}
        for features, file in ((RANDOM, f"{stem}--{task}--random.npz"), (ENCODER, f"{stem}--{task}.npz")):
            score = Score(candidate.name, seed, features, task, run=facts, **found[features])
            write_score(out / "scores" / file, score)
        shown = ", ".join(f"{name} {100 * entry['value']:.1f}" for name, entry in found.items())
        print(f"{stem} {task}: {shown} ({time.perf_counter() - began:.0f} s)", flush=True)


def all_scores(out: Path) -> list[Score]:
    return [read_score(path) for path in sorted((out / "scores").glob("*.npz"))]
