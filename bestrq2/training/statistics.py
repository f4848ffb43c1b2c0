"""Mean and deviation of log-mel values, for standardised inputs and targets."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bestrq2.data import Batch
from bestrq2.layers.log_mel import LogMel
from bestrq2.layers.padding import length_mask
from bestrq2.ops.common.devices import exact_device


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of all log-mel values in dB, over ``frames`` frames of ``clips`` clips."""

    mean: float
    std: float
    frames: int
    clips: int


@torch.no_grad()
def measure_statistics(log_mel: LogMel, batches: Iterable[Batch], device: torch.device) -> Statistics:
    """Accumulate in float64 over the valid frames of batches; ``log_mel`` must not standardise already.

    Raises:
        ValueError: if there is no frame, or no variation at all.
    """
    count, total, squares, frames_seen, clips = 0, 0.0, 0.0, 0, 0
    for batch in batches:
        frames, lengths = log_mel(batch.waveform.to(device), batch.lengths)
        inside = length_mask(lengths, frames.shape[1], frames.device)
        values = frames[inside].to(exact_device(device)).double()
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
        frames_seen += values.shape[0]
        clips += len(lengths)
    if count == 0:
        raise ValueError("no audio frame to measure")
    mean = total / count
    variance = squares / count - mean * mean
    if variance <= 1e-6:
        raise ValueError(
            f"the audio has no variation (mean {mean:.2f} dB, variance {variance:.1e}): is it all silence?"
        )
    return Statistics(mean, variance**0.5, frames_seen, clips)
