"""One training run of a comparison, its scores, and the files that let a killed comparison go on where it was.

``OUT/runs/<candidate>-seed<k>`` is a usual run folder. ``OUT/scores/<name>.npz`` holds the score of one task with its
bootstrap resamples, written at once; what exists is not computed again. ``OUT/identity.json`` says what all of them are
scores of: another plan, corpus or readout in the same folder is refused.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.transfer.plan import Candidate, Plan
from bestrq2 import load, train
from bestrq2.config import ConfigError
from bestrq2.data import Skip, iterate_clips
from bestrq2.interchange import open_source
from bestrq2.models import build_encoder
from bestrq2.probing import ProbeTask
from bestrq2.probing.experiment import assemble
from bestrq2.probing.features import ENCODER, LOG_MEL, RANDOM, Clip, Features, extract, readings
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
    """

    def __init__(self, tasks: dict[str, ProbeTask], sampling_rate: int = 16000, precision: str = "fp32") -> None:
        self.tasks, self.sampling_rate, self.precision = tasks, sampling_rate, precision
        self.labels: dict[str, LabelledClips] = {name: read_clips(task) for name, task in tasks.items()}
        self._audio: dict[str, list[Clip | Skip]] = {}
        self._asked: tuple[Any, ...] = ()
        self._known: dict[str, dict[str, np.ndarray] | Skip] = {}

    def clips(self, name: str) -> list[Clip | Skip]:
        if name not in self._audio:
            self._audio[name] = list(iterate_clips(self.labels[name].files, self.sampling_rate))
        return self._audio[name]

    def forget(self, name: str) -> None:
        """Free the audio of a task."""
        self._audio.pop(name, None)

    def features(self, name: str, encoders: dict[str, Any], with_log_mel: bool) -> Features:
        """Pooled features of a task's clips. Those of the last call's encoders are kept: tasks share clips. Clips of
        similar length are encoded together; the batch does not change features."""
        task = self.tasks[name]
        depth = min((encoder.depth for encoder in encoders.values()), default=0)
        wanted = readings(task.layers, task.combine, depth) if encoders else []
        asked = (list(encoders.items()), with_log_mel, wanted, task.rows, task.pooling)
        if asked != self._asked:
            self._asked, self._known = asked, {}
        files = self.labels[name].files
        fresh = [item for file, item in zip(files, self.clips(name)) if str(file) not in self._known]
        names = {id(item): str(file) for file, item in zip(files, self.clips(name))}
        fresh.sort(key=lambda item: 0 if isinstance(item, Skip) else len(item[1]))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
            found = extract(
                fresh,
                encoders,
                sampling_rate=self.sampling_rate,
                hop=0.01,  # not used: clips are pooled
                wanted=wanted,
                rows=task.rows,
                pooling=task.pooling,
                with_log_mel=with_log_mel,
            )
        for place, number in enumerate(found.usable):
            self._known[names[id(fresh[number])]] = {kind: vectors[place] for kind, vectors in found.of.items()}
        for item in fresh:
            if isinstance(item, Skip):
                self._known[names[id(item)]] = item
        result = Features({kind: [] for kind in found.of}, parts=found.parts)
        for number, file in enumerate(files):
            known = self._known[str(file)]
            if isinstance(known, Skip):
                result.skips.append(known)
                continue
            result.usable.append(number)
            result.seconds.append(0.0)  # not used: clips are pooled
            for kind, vector in known.items():
                result.of[kind].append(vector)
        return result

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


def digest_of(encoder: torch.nn.Module) -> str:
    """Digest of the weights and buffers, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


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
