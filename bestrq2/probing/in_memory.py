"""One number for a training loop: a probe on an encoder in memory, which is left as it was.

    task = ProbeTask(manifest="clips.csv", label="instrument", group="recording")
    values = run_probe(model.encoder, task, untrained=first_weights)  # every k steps
    log({f"probe/{name}": value for name, value in values.items()})

Decoded audio and the results of both baselines are kept, so that later calls only encode and fit.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bestrq2.config import ConfigError
from bestrq2.data import Skip, iterate_clips
from bestrq2.data.content import file_stamp
from bestrq2.interchange.refusals import FeatureError
from bestrq2.interchange.tensors import module_digest, settings_digest, tensors_digest

from .experiment import assemble
from .features import ENCODER, LOG_MEL, RANDOM, Clip, extract, readings, untrained_copy
from .heads import require_sklearn
from .labels import LabelledClips, check_testable, read_clips
from .task import ProbeTask, packaged_task

MAX_AUDIO_BYTES = 1 << 30  # of decoded audio kept between calls
_PREFIX = {LOG_MEL: "log_mel/", RANDOM: "random/", ENCODER: ""}
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")
_prepared: dict[Any, "PreparedProbe"] = {}


@contextmanager
def undisturbed(encoder: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes of every submodule and the generators of torch as before outside."""
    modes = [(module, module.training) for module in encoder.modules()]
    devices = sorted({p.device.index or 0 for p in encoder.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.autocast("cpu", enabled=False):
            encoder.eval()
            if devices:
                with torch.autocast("cuda", enabled=False):
                    yield
            else:
                yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class PreparedProbe:
    """A task with its clips read, its audio decoded and its baselines computed; see :func:`run_probe`."""

    task: ProbeTask
    labels: LabelledClips
    sampling_rate: int
    stamps: list[str]  # of the audio files, before they are read
    audio: list[Clip | Skip] | None = None
    baselines: dict[Any, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, task: ProbeTask, sampling_rate: int) -> "PreparedProbe":
        """Read the labels.

        Raises:
            ManifestError, ConfigError, OSError: as :func:`~bestrq2.probing.labels.read_clips`.
        """
        require_sklearn()
        labels = read_clips(task)
        check_testable(labels, task)
        return cls(task, labels, sampling_rate, _stamps(labels))

    def source(self) -> Iterator[Clip | Skip]:
        """The decoded clips, from memory after the first time unless they are too many."""
        if self.audio is not None:
            yield from self.audio
            return
        kept: list[Clip | Skip] | None = []
        size = 0
        for item in iterate_clips(self.labels.files, self.sampling_rate):
            size += 0 if isinstance(item, Skip) else item[1].nbytes
            if size > MAX_AUDIO_BYTES:
                kept = None
            if kept is not None:
                kept.append(item)
            yield item
        self.audio = kept

    def measure(self, encoders: dict[str, Any], hop: float, with_log_mel: bool, batch_size: int) -> dict[str, float]:
        """Metrics of the task's head on the features of each encoder, and on log-mel statistics if asked for."""
        depth = min((int(getattr(encoder, "depth", 0)) for encoder in encoders.values()), default=0)
        wanted = readings(self.task.layers, self.task.combine, depth)
        if len(wanted) != 1:
            raise ConfigError(f"probe combine: expected average, concatenate or weighted for layers {self.task.layers}")
        features = extract(
            self.source(),
            encoders,
            sampling_rate=self.sampling_rate,
            hop=hop,
            wanted=wanted,
            rows=self.task.rows,
            pooling=None if self.task.kind == "events" else self.task.pooling,
            with_log_mel=with_log_mel,
            batch_size=batch_size,
        )
        experiment = assemble(self.labels, features, self.task, hop)
        values = {"clips": float(len(experiment.clips))}
        for name in experiment.values:
            outcome = experiment.probe(name, self.task.head)
            values["chance"] = experiment.chance(outcome)
            prefix = _PREFIX[name.split(",")[0]]
            for metric, estimate in outcome.metrics.items():
                values[f"{prefix}{metric}"] = estimate.value
                values[f"{prefix}{metric}_low"], values[f"{prefix}{metric}_high"] = estimate.low, estimate.high
        return values


def run_probe(
    encoder: nn.Module,
    task: ProbeTask | None = None,
    *,
    untrained: nn.Module | Callable[[], nn.Module] | None = None,
    batch_size: int = 8,
    detailed: bool = False,
) -> dict[str, float]:
    """Probe an encoder in memory. The result is a pure function of its weights and of the task.

    The encoder keeps its mode, gradients and buffers, and torch's generators their state; it is encoded in evaluation
    mode, without gradients and without autocast, on the device it is on. Heads are fitted on the CPU. Decoded audio and
    the baselines of a task are computed once per process and kept until its files of labels or audio change.

    Args:
        encoder: with ``encode``, ``sampling_rate`` and ``hop_size_in_ms``, as ours.
        task: None: the 24 clips of the package.
        untrained: the encoder before training, of which another has baselines of its own; or a function that builds it,
            called at the first call alone; None: a copy with weights drawn anew (see
            :func:`~bestrq2.probing.features.untrained_copy`).
        batch_size: clips encoded together.

        detailed: return everything below; else only the main metric, its interval and baselines, and chance.

    Returns:
        the task's main metric by its name (``task.metric``), the ends of its 95 % interval with ``_low`` and ``_high``,
        what the baselines reach under "log_mel/" and "random/", and "chance". ``detailed``: the same for every metric,
        intervals of the baselines, "clips", and "seconds" that the call took. Metrics of an encoder whose features are
        not finite are NaN; of one that was opened by ``bestrq2.load``, an encoder of others, such clips are left out.

    Raises:
        ConfigError, ManifestError, OSError: if the task cannot be read, tested, or scikit-learn is missing.
    """
    began = time.perf_counter()
    task = task or packaged_task()
    prepared = _prepare(task, int(encoder.sampling_rate))  # type: ignore[arg-type]
    hop = float(encoder.hop_size_in_ms) / 1000  # type: ignore[arg-type]
    with undisturbed(encoder):
        kind = (hop, _kind(encoder, untrained))  # another encoder has baselines of its own
        known = prepared.baselines.get(kind)
        if known is None:
            fresh = untrained() if callable(untrained) and not isinstance(untrained, nn.Module) else untrained
            fresh = untrained_copy(encoder, task.seed) if fresh is None else fresh
            with undisturbed(fresh):
                known = prepared.baselines[kind] = prepared.measure({RANDOM: fresh}, hop, True, batch_size)
        try:
            own = prepared.measure({ENCODER: encoder}, hop, False, batch_size)
        except FeatureError:
            own = {name.removeprefix("random/"): float("nan") for name in known if name.startswith("random/")}
    values = {**known, **own, "seconds": time.perf_counter() - began}
    if detailed:
        return values
    main = task.metric
    names = (main, f"{main}_low", f"{main}_high", f"log_mel/{main}", f"random/{main}", "chance")
    return {name: values[name] for name in names}


def _kind(encoder: nn.Module, untrained: nn.Module | Callable[[], nn.Module] | None) -> tuple[Any, ...]:
    """Identify the features of the encoder before training. They depend on everything but its weights, which training
    changes, and running statistics, which begin anew."""
    if isinstance(untrained, nn.Module):
        return module_digest(untrained), settings_digest(untrained)
    kept = [(name, buffer) for name, buffer in encoder.named_buffers() if not name.endswith(_RUNNING)]
    return repr(encoder), settings_digest(encoder), tensors_digest(kept), untrained is None


def _prepare(task: ProbeTask, sampling_rate: int) -> PreparedProbe:
    stamps = tuple(
        (os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in (task.path, task.events) if file is not None
    )
    key = (task, sampling_rate, stamps)
    if key not in _prepared or _prepared[key].stamps != _stamps(_prepared[key].labels):
        _prepared[key] = PreparedProbe.open(task, sampling_rate)
    return _prepared[key]


def _stamps(labels: LabelledClips) -> list[str]:
    return [file_stamp(item) for item in labels.files]
