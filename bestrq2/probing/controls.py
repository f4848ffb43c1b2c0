"""Controls of a probe, from the bottom up: each rung that holds rules out one reason for a low score.

1. The path of the audio: log-mel spectrograms that pass through batching, padding, lengths and pooling as an encoder's
   features do equal those computed from each clip alone.
2. The labels and the head: a linear head learns a handful of clips by heart.
3. A known level: log-mel as an "encoder", in the same table as the encoder.
4. The encoder before training (which every probe reports).

If 1 and 2 hold and the encoder is below 3, the encoder is weak and the probe is not at fault.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.layers.log_mel import check_lengths
from bestrq2.layers.padding import length_mask
from bestrq2.models.layer_choice import check_layers
from bestrq2.models.readout import ROW_JOINS, ReadoutMixin, check_choice

from .evaluation import probe_retrieval
from .features import MEL_HOP, NUM_MELS, Clip, baseline_log_mel, clip_statistics, extract, log_mel_frames
from .heads import scores_of, standardise
from .labels import TEST, TRAIN, LabelledClips
from .task import ProbeTask

LOG_MEL_ENCODER = "log-mel as an encoder"
HANDFUL = 16
LARGEST_DIFFERENCE = 0.01  # dB, of sums of some hundred float32 values in another order
LEARNED = 0.99


class LogMelEncoder(ReadoutMixin, nn.Module):
    """64 log-mel bands (dB) every 10 ms behind the interface of an encoder, without parameters.

    ``embed`` and ``probe`` take it as ``bestrq2.probing.controls:LogMelEncoder``.
    """

    depth = 0

    def __init__(self, sampling_rate: int = 16000) -> None:
        super().__init__()
        self.log_mel = baseline_log_mel(sampling_rate)
        self.sampling_rate, self.output_dim = sampling_rate, NUM_MELS
        self.hop_size_in_ms = 1000 * self.log_mel.hop_length / sampling_rate

    def encode_layers(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layers: Sequence[int | None] | None = None,
        *,
        rows: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(B, S)``, ``(B,)`` -> ``(1, B, T, 64)`` float32 and ``(B,)`` frames; see :class:`~bestrq2.ViTEncoder`."""
        check_choice("rows", rows or self.join_rows, ROW_JOINS)
        wanted = check_layers(layers, self.depth)
        with torch.no_grad():
            frames, counts = self.log_mel(waveform, check_lengths(waveform, lengths))
        inside = length_mask(counts, frames.shape[1], frames.device)
        frames = torch.where(inside[..., None], frames, 0).float()
        return frames.expand(len(wanted), *frames.shape), counts.cpu()


@dataclass(frozen=True)
class Rung:
    """One control: ``value`` measured, ``expected`` in words, ``holds`` or, for a level to compare with, None."""

    name: str
    value: float
    expected: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "holds", False: "FAILS", None: ""}[self.holds]
        return f"  {self.name:44s} {self.value:10.4f}  {self.expected}  {verdict}".rstrip()


def path_difference(clips: Sequence[Clip], sampling_rate: int) -> float:
    """Largest difference in dB between pooled log-mel features of clips encoded together and of each clip alone.

    The n-th of N clips loses n / 2N of its end, because faults of lengths and padding hide in clips of equal length.
    """
    clips = [(file, wave[: len(wave) - n * len(wave) // (2 * len(clips))]) for n, (file, wave) in enumerate(clips)]
    encoder = LogMelEncoder(sampling_rate)
    found = extract(
        clips,
        {"": encoder},
        sampling_rate=sampling_rate,
        hop=MEL_HOP,
        pooling="mean+std",
        with_log_mel=False,
        batch_size=max(1, len(clips)),
    )
    alone = [clip_statistics(log_mel_frames(waveform, encoder.log_mel))[: 2 * NUM_MELS] for _, waveform in clips]
    return float(np.max(np.abs(np.stack(found.of[""]) - np.stack(alone))))


def handful(clips: LabelledClips) -> np.ndarray:
    """Numbers of up to 16 clips, taken from one class after the other (regression: evenly)."""
    number = np.arange(len(clips))
    if clips.targets.ndim == 2 or clips.targets.dtype.kind == "f":
        return np.unique(np.linspace(0, len(clips) - 1, HANDFUL).astype(np.int64))
    nth = np.zeros(len(clips), dtype=np.int64)  # how many earlier clips have the same label
    for label in np.unique(clips.targets):
        own = clips.targets == label
        nth[own] = np.arange(own.sum())
    return np.sort(number[np.lexsort((number, nth))][:HANDFUL])


def overfit(features: np.ndarray, clips: LabelledClips, task: ProbeTask) -> Rung:
    """Train a linear head on a handful of clips and test it on the same ones; retrieval: find each clip by itself.

    Args:
        features: ``(N, D)`` of the clips.
    """
    chosen = handful(clips)
    own, targets = features[chosen], clips.targets[chosen]
    name = f"{len(chosen)} clips learned by heart"
    if task.kind == "retrieval":
        doubled = clips.take(np.concatenate((chosen, chosen)))
        doubled.targets = np.tile(np.arange(len(chosen)), 2)
        doubled.parts = np.repeat([TRAIN, TEST], len(chosen))
        value = probe_retrieval(np.concatenate((own, own)), doubled, task).metrics["R@1"].value
        return Rung(f"{len(chosen)} clips found by themselves", value, "R@1 of 1", value >= LEARNED)
    train, test = standardise(own, own)
    scores = scores_of("linear", train, targets, test, len(clips.classes), 1e6)
    if targets.dtype.kind == "f":
        spread = float(((targets - targets.mean()) ** 2).sum())
        value = 1 - float(((scores[:, 0] - targets) ** 2).sum()) / spread if spread else 1.0
        return Rung(name, value, "R2 of 1", value >= LEARNED)
    correct = scores.argmax(1) == targets if targets.ndim == 1 else ((scores >= 0.5) == targets).all(1)
    value = float(correct.mean())
    return Rung(name, value, "accuracy of 1", value >= LEARNED)


def ladder(
    clips: Sequence[Clip], features: np.ndarray, labels: LabelledClips, task: ProbeTask, sampling_rate: int
) -> list[Rung]:
    """The rungs that are right or wrong.

    Args:
        clips: some decoded clips.
        features: ``(N, D)`` of the encoder for the clips of ``labels``; for events a handful is not learned by heart,
            because rows are frames.
    """
    gap = path_difference(clips, sampling_rate)
    rungs = [Rung("log-mel together - alone, dB", gap, "0", gap <= LARGEST_DIFFERENCE)]
    if task.kind != "events":
        rungs.append(overfit(features, labels, task))
    return rungs


def text(rungs: Sequence[Rung]) -> str:
    lines = ["controls:", *map(str, rungs)]
    if any(rung.holds is False for rung in rungs):
        lines.append("  A control fails: the fault is in the probe, its audio or its labels; do not read the scores.")
    return "\n".join(lines)


def document(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    return [asdict(rung) for rung in rungs]
