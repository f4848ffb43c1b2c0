"""Plan of a comparison: recipes with overrides, at equal compute, over seeds."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bestrq2.config import Config, ConfigError, load_config
from bestrq2.interchange.opening import open_teacher
from bestrq2.models import build_model

READOUT = ("layers", "combine", "rows", "pooling")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Candidate:
    """One recipe of a comparison: a configuration file or recipe name with ``key=value`` overrides."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        name: of the comparison.
        candidates: the first is what the others are compared with.
        seeds: of training.
        flops: of the training of each run; None: every run does ``steps`` steps.
        steps: of every run, if ``flops`` is None.
        readout: ``layers``, ``combine``, ``rows``, ``pooling``, the same for all.
        precision: in which trained encoders compute the features: "fp32", or "bf16" by autocast.
    """

    name: str
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...] = (0,)
    flops: float | None = None
    steps: int | None = None
    readout: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


def read_plan(path: Path) -> Plan:
    """Read a plan file::

        flops: 2.0e+15                 # of each run: equal compute; or  steps: 1000
        seeds: [0, 1, 2]
        common: [train.batch_size=32, data.crop_seconds=4.0]
        readout: {layers: middle, combine: average, pooling: mean+std}
        precision: bf16                # of the encoders that are probed; default fp32
        candidates:
          two-step: {config: best_rq2_small}
          one-stage: {config: best_rq_vit_small, set: [optimizer.learning_rate=5e-4]}

    Raises:
        ConfigError: for a file that is not such a plan.
    """
    try:
        document = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("candidates"), dict):
        raise ConfigError(f"{path}: expected a mapping with 'candidates'")
    unknown = set(document) - {"flops", "steps", "seeds", "common", "readout", "precision", "candidates"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {sorted(map(str, unknown))[0]!r}")
    if (document.get("flops") is None) == (document.get("steps") is None):
        raise ConfigError(f"{path}: give either 'flops' or 'steps'")
    readout = document.get("readout") or {}
    if set(readout) - set(READOUT):
        raise ConfigError(f"{path}: readout: expected some of {', '.join(READOUT)}, got {sorted(readout)}")
    precision = document.get("precision", "fp32")
    if precision not in PRECISIONS:
        raise ConfigError(f"{path}: precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    common = tuple(map(str, document.get("common") or ()))
    candidates = []
    for name, entry in document["candidates"].items():
        if not isinstance(entry, dict) or "config" not in entry or set(entry) - {"config", "set"}:
            raise ConfigError(f"{path}: candidates.{name}: expected config and, if you like, set, got {entry!r}")
        config = str(entry["config"])
        if os.sep in config or config.endswith(".yaml"):
            config = str((path.parent / config).resolve())
        candidates.append(Candidate(str(name), config, (*common, *map(str, entry.get("set") or ()))))
    flops, steps = document.get("flops"), document.get("steps")
    return Plan(
        path.stem,
        tuple(candidates),
        tuple(int(seed) for seed in document.get("seeds") or (0,)),
        None if flops is None else float(flops),
        None if steps is None else int(steps),
        dict(readout),
        precision,
    )


def quick_plan() -> Plan:
    """Two very small recipes on the clips of the package, some steps each: whether everything works, nothing else."""
    tiny = ("model.encoder.width=32", "model.encoder.depth=2", "model.encoder.heads=2", "model.encoder.hidden=64")
    small = (*tiny, "model.targets.codebook_size=64", "train.batch_size=8", "data.crop_seconds=1.0")
    quiet = ("train.pictures_every=0", "train.save_every=5", "train.log_every=5", "train.precision=fp32")
    two_step = ("model.predictor.width=32", "model.predictor.depth=1", "model.predictor.heads=2")
    return Plan(
        "quick",
        (
            Candidate("two-step", "best_rq2_tiny", (*small, *quiet, *two_step, "model.predictor.hidden=64")),
            Candidate("one-stage", "best_rq_vit_tiny", (*small, *quiet)),
        ),
        (0, 1),
        flops=6e8,
        readout={"layers": "middle", "combine": "average", "pooling": "mean+std"},
    )


def configuration(candidate: Candidate, seed: int) -> Config:
    return load_config(candidate.config, [*candidate.overrides, f"train.seed={seed}"])


def flops_per_step(config: Config) -> float:
    """Matrix-product operations of one update (forward and backward, as the training log counts them), the mean over
    four steps of two full crops, times ``batch_size / 2``."""
    changed = load_statistics(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(changed, open_teacher(changed))
    samples = round(config.data.crop_seconds * config.model.front_end.sampling_rate)
    noise = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([samples, samples])
    total = 0.0
    with torch.no_grad():
        for step in range(4):
            output = model(noise, lengths, step=step, index=torch.tensor([2 * step, 2 * step + 1]))
            total += model.flops(output.plan)
    return total / 4 * config.train.batch_size / 2


def load_statistics(config: Config) -> Config:
    """The configuration with some statistics where training would measure them: they do not change the work."""
    for section in (config.model.front_end, config.model.targets):
        if section.normalize == "global" and (section.mean is None or section.std is None):
            section.mean, section.std = -40.0, 20.0
    return config


def steps_of(plan: Plan, candidate: Candidate) -> tuple[int, float]:
    """Training steps of a candidate and the FLOPs they take.

    Raises:
        ConfigError: if the budget is below one step.
    """
    each = flops_per_step(configuration(candidate, 0))
    steps = plan.steps if plan.flops is None else round(plan.flops / each)
    if not steps:
        raise ConfigError(
            f"{candidate.name}: one step takes {each:.3g} FLOPs, more than the budget of {plan.flops:.3g}"
        )
    return steps, steps * each
