"""Features of clips: from an encoder, from the same encoder untrained, and from the spectrogram alone.

Letters: L layers, T frames, D width.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from bestrq2.data import AudioFile, Skip
from bestrq2.errors import BestRQError
from bestrq2.interchange.transformers_encoder import TransformersEncoder
from bestrq2.layers.log_mel import LogMel

ENCODER, RANDOM, LOG_MEL = "encoder", "random initialisation", "log-mel statistics"
MEAN = ", mean of layers"  # ends the name of such features
MEL_HOP = 0.01  # seconds
NUM_MELS = 64
Clip = tuple[AudioFile, np.ndarray]


class FeatureError(BestRQError, ValueError):
    """Features that no probe can use: not finite, or no frame at all."""


@dataclass
class Features:
    """
    Attributes:
        of: features of every usable clip by name: ``(D,)`` pooled, or ``(T, D)`` frames, float32.
        usable: numbers of the clips that could be read.
        seconds: of those.
        skips: the others.
    """

    of: dict[str, list[np.ndarray]] = field(default_factory=dict)
    usable: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)


def mean_of_layers(values: np.ndarray) -> np.ndarray:
    """``(L, T, D)`` -> ``(T, D)``: the mean over layers, each frame of each layer brought to mean 0 and deviation 1."""
    centred = values - values.mean(2, keepdims=True)
    return (centred / np.maximum(values.std(2, keepdims=True), 1e-5)).mean(0)


def pool(frames: np.ndarray, pooling: str) -> np.ndarray:
    """``(T, D)`` -> ``(D,)`` for "mean", ``(2 D,)`` for "mean+std"."""
    mean = frames.mean(0)
    return mean if pooling == "mean" else np.concatenate((mean, frames.std(0)))


def encode(encoder: Any, waveforms: Sequence[np.ndarray], layers: Sequence[int | None]) -> list[np.ndarray]:
    """Features ``(L, T, D)`` float32 of every waveform ``(S,)``, encoded together, without gradients."""
    parameter = next(iter(encoder.parameters()), None)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waveforms], batch_first=True)
    padded = padded if parameter is None else padded.to(parameter.device)
    # Not inference mode: an encoder may keep tensors that later training steps use.
    with torch.no_grad():
        if list(layers) == [None]:
            features, frames = encoder.encode(padded, lengths)
            features = features[None]
        else:
            features, frames = encoder.encode_layers(padded, lengths, list(layers))
    return [features[:, clip, : int(n)].float().cpu().numpy() for clip, n in enumerate(frames)]


def log_mel_frames(waveform: np.ndarray, log_mel: LogMel) -> np.ndarray:
    """``(M, 64)`` frames of 10 ms and their absolute changes: ``(M, 128)``; the first changes by 0."""
    with torch.no_grad():
        frames = log_mel(torch.from_numpy(waveform)[None])[0][0].numpy()
    change = np.abs(np.diff(frames, axis=0, prepend=frames[:1]))
    return np.concatenate((frames, change), axis=1)


def clip_statistics(frames: np.ndarray) -> np.ndarray:
    """Mean, deviation and mean absolute change of 64 log-mel bands: ``(M, 128)`` -> ``(192,)`` float32."""
    bands, change = frames[:, :NUM_MELS], frames[1:, NUM_MELS:]
    moved = change.mean(0) if len(change) else np.zeros(NUM_MELS)
    return np.concatenate((bands.mean(0), bands.std(0), moved)).astype(np.float32)


def frame_statistics(frames: np.ndarray, num_frames: int, hop: float) -> np.ndarray:
    """The same for each of ``num_frames`` frames of ``hop`` seconds, from the 10 ms frames whose centres lie in it, or
    the nearest one: ``(M, 128)`` -> ``(T, 192)`` float32."""
    place = np.floor(np.arange(len(frames)) * MEL_HOP / hop + 1e-9).astype(np.int64)
    inside = place < num_frames
    place, kept = place[inside], frames[inside].astype(np.float64)
    count = np.bincount(place, minlength=num_frames)
    sums, squares = np.zeros((num_frames, frames.shape[1])), np.zeros((num_frames, NUM_MELS))
    np.add.at(sums, place, kept)
    np.add.at(squares, place, kept[:, :NUM_MELS] ** 2)
    share = 1 / np.maximum(count, 1)[:, None]
    mean = sums * share
    spread = np.sqrt(np.maximum(squares * share - mean[:, :NUM_MELS] ** 2, 0))
    empty = count == 0
    if empty.any():
        centre = (np.flatnonzero(empty) + 0.5) * hop / MEL_HOP
        mean[empty] = frames[np.rint(centre).astype(np.int64).clip(max=len(frames) - 1)]
    return np.concatenate((mean[:, :NUM_MELS], spread, mean[:, NUM_MELS:]), axis=1).astype(np.float32)


def extract(
    source: Iterable[Clip | Skip],
    encoders: Mapping[str, Any],
    *,
    sampling_rate: int,
    hop: float,
    layers: Sequence[int | None] = (None,),
    average: Sequence[int | None] = (),
    pooling: str | None = "mean",
    with_log_mel: bool = True,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Features:
    """Decode every clip once and put it through all encoders and the log-mel baseline.

    Args:
        source: clips in order, as :func:`bestrq2.data.iterate_clips` gives them.
        encoders: by name.
        sampling_rate, hop: of the encoders; hop in seconds.
        layers: of the encoders; None is the final output.
        average: layers whose mean is a kind of features as well, see :func:`mean_of_layers`.
        pooling: of frames to clips, None to keep frames.
        progress: called with the number of clips done.

    Raises:
        FeatureError: if an encoder gives no frame, or values that are not finite.
    """
    wanted = [*layers, *(layer for layer in average if layer not in layers)]
    ends = [*("" if layer is None else f", layer {layer}" for layer in layers), *([MEAN] if average else [])]
    names = [f"{name}{end}" for name in encoders for end in ends]
    names += [LOG_MEL] if with_log_mel else []
    result = Features({name: [] for name in names})
    log_mel = LogMel(
        sampling_rate, n_fft=1024, win_length=400, hop_length=round(MEL_HOP * sampling_rate), num_mels=NUM_MELS
    )
    stream = enumerate(source)
    while batch := list(islice(stream, batch_size)):
        result.skips += [item for _, item in batch if isinstance(item, Skip)]
        clips = [(number, item) for number, item in batch if not isinstance(item, Skip)]
        waveforms = [waveform for _, (_, waveform) in clips]
        num_frames = [0] * len(clips)
        for name, encoder in encoders.items() if clips else ():
            for place, values in enumerate(encode(encoder, waveforms, wanted)):
                _check(name, clips[place][1][0], values)
                num_frames[place] = values.shape[1]
                kinds = list(values[: len(layers)])
                if average:
                    kinds.append(mean_of_layers(values[[wanted.index(layer) for layer in average]]))
                for end, frames in zip(ends, kinds):
                    result.of[f"{name}{end}"].append(frames if pooling is None else pool(frames, pooling))
        for place, (number, (_, waveform)) in enumerate(clips):
            result.usable.append(number)
            result.seconds.append(len(waveform) / sampling_rate)
            if with_log_mel:
                frames = log_mel_frames(waveform, log_mel)
                statistics = clip_statistics(frames) if pooling else frame_statistics(frames, num_frames[place], hop)
                result.of[LOG_MEL].append(statistics)
        if progress is not None:
            progress(len(batch))
    return result


def _check(name: str, file: AudioFile, values: np.ndarray) -> None:
    if not values.shape[1]:
        raise FeatureError(f"{name}: no frame for {file.path}")
    if not np.isfinite(values).all():
        raise FeatureError(f"{name}: features of {file.path} are not finite")


def untrained_copy(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """The encoder with weights drawn anew, in evaluation mode: transformers models from their configuration, other
    layers by ``reset_parameters`` where they have it, else the values of a parameter in random order. The global
    generators stay as they are.

    For an encoder whose own initialisation is known, build it anew instead.
    """
    generator = torch.Generator().manual_seed(seed)
    devices = sorted({p.device.index or 0 for p in encoder.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        fresh = copy.deepcopy(encoder)
        if isinstance(fresh, TransformersEncoder):
            fresh.model = type(fresh.model)(fresh.model.config).to(next(fresh.parameters()).device)
            return fresh.eval().requires_grad_(False)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return fresh.eval().requires_grad_(False)
