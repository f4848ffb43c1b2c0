"""Features of clips: from an encoder, from the same encoder untrained, and from the spectrogram alone.

Letters: L layers, T frames, D width.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.config import ConfigError
from bestrq2.data import Skip
from bestrq2.hardware import device_of
from bestrq2.interchange.refusals import Clip, check_some_taken, check_usable, encode_or_skip
from bestrq2.interchange.transformers_encoder import TransformersEncoder
from bestrq2.layers.log_mel import LogMel
from bestrq2.models.readout import combine_layers, parse_layers, pool_frames

ENCODER, RANDOM, LOG_MEL = "encoder", "random initialisation", "log-mel statistics"
MEAN = ", mean of layers"  # ends the name of such features
MEL_HOP = 0.01  # seconds
NUM_MELS = 64
SECONDS_AT_ONCE = 120.0  # of audio with its padding that are encoded together


@dataclass
class Features:
    """
    Attributes:
        of: features of every usable clip by name: ``(D,)`` pooled, or ``(T, D)`` frames, float32.
        usable: numbers of the clips that could be read, and that no encoder of others refused.
        seconds: of those.
        skips: the others.
        parts: by name, how many layers a head weights, see :class:`Reading`.
    """

    of: dict[str, list[np.ndarray]] = field(default_factory=dict)
    usable: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """Features to make of an encoder's layers.

    Attributes:
        end: ends their name.
        layers: numbers of blocks, None for the final output.
        combine: "average" or "concatenate", see :func:`~bestrq2.models.readout.combine_layers`.
        parts: how many layers a head weights; 1: the features are taken as they are.
    """

    end: str
    layers: tuple[int | None, ...]
    combine: str = "average"
    parts: int = 1


def readings(layers: str, combine: str, depth: int) -> list[Reading]:
    """The readings that ``--layers`` and ``--combine`` ask for.

    "each" gives one for every layer, and for "all" the average of all as well; the others give a single one. The layer
    choice "average" is short for all layers averaged.

    Raises:
        ConfigError: for a layer that the encoder does not have.
    """
    if layers == "average":
        layers, combine = "all", "average"
    chosen = tuple(parse_layers(layers, depth))
    if combine != "each" and len(chosen) > 1:
        which = "layers" if layers == "all" else "layers " + ", ".join("final" if n is None else str(n) for n in chosen)
        ends = {"average": f", mean of {which}", "concatenate": f", {which} joined", "weighted": f", {which} weighted"}
        how = "average" if combine == "average" else "concatenate"
        return [Reading(ends[combine], chosen, how, len(chosen) if combine == "weighted" else 1)]
    each = [Reading("" if layer is None else f", layer {layer}", (layer,)) for layer in chosen]
    if layers == "all" and len(chosen) > 1:
        each.append(Reading(MEAN, chosen))
    return each


def encode(
    encoder: Any, waveforms: Sequence[np.ndarray], layers: Sequence[int | None], rows: str | None = None
) -> tuple[Tensor, Tensor]:
    """Features ``(L, B, T, D)`` float32 and frames ``(B,)``, on the CPU, of waveforms ``(S,)`` encoded together."""
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waveforms], batch_first=True)
    padded = padded.to(device_of(encoder))
    # Not inference mode: an encoder may keep tensors that later training steps use.
    with torch.no_grad():
        if hasattr(encoder, "encode_layers"):
            options = {} if rows is None else {"rows": rows}
            features, frames = encoder.encode_layers(padded, lengths, list(layers), **options)
        elif list(layers) == [None] and rows in (None, "average"):
            features, frames = encoder.encode(padded, lengths)
            features = features[None]
        else:
            raise ConfigError(f"{type(encoder).__name__} shows its final output alone: it has no encode_layers")
    return features.float().cpu(), frames.cpu()


def baseline_log_mel(sampling_rate: int) -> LogMel:
    """64 bands from frames of 25 ms, 10 ms apart, to the nearest sample."""
    window, hop = round(0.025 * sampling_rate), round(MEL_HOP * sampling_rate)
    n_fft = max(1024, 1 << (window - 1).bit_length())
    return LogMel(sampling_rate, n_fft=n_fft, win_length=window, hop_length=hop, num_mels=NUM_MELS)


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


def frame_statistics(frames: np.ndarray, num_frames: int, hop: float, mel_hop: float = MEL_HOP) -> np.ndarray:
    """The same for each of ``num_frames`` frames of ``hop`` seconds, from those ``mel_hop`` apart whose centres lie in
    it, or the nearest one: ``(M, 128)`` -> ``(T, 192)`` float32."""
    place = np.floor(np.arange(len(frames)) * mel_hop / hop + 1e-9).astype(np.int64)
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
        centre = (np.flatnonzero(empty) + 0.5) * hop / mel_hop
        mean[empty] = frames[np.rint(centre).astype(np.int64).clip(max=len(frames) - 1)]
    return np.concatenate((mean[:, :NUM_MELS], spread, mean[:, NUM_MELS:]), axis=1).astype(np.float32)


def extract(
    source: Iterable[Clip | Skip],
    encoders: Mapping[str, Any],
    *,
    sampling_rate: int,
    hop: float,
    wanted: Sequence[Reading] = (Reading("", (None,)),),
    rows: str | None = None,
    pooling: str | None = "mean+std",
    with_log_mel: bool = True,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> Features:
    """Decode every clip once and put it through all encoders and the log-mel baseline.

    Args:
        source: clips in order, as :func:`bestrq2.data.iterate_clips` gives them.
        encoders: by name.
        sampling_rate, hop: of the encoders; hop in seconds.
        wanted: what is made of their layers.
        rows: "average" or "concatenate" the frequency rows of 2-D patches; None: as the encoder does by itself.
        pooling: of frames to clips, see :func:`~bestrq2.models.readout.pool_frames`; None to keep frames.
        progress: called with the number of clips done.

    Raises:
        FeatureError: if an encoder that is not an adapted one gives no frame, or values that are not finite.
        ConfigError: if an encoder of others refuses every clip.
    """
    layers = list(dict.fromkeys(layer for reading in wanted for layer in reading.layers))
    names = [f"{name}{reading.end}" for name in encoders for reading in wanted]
    names += [LOG_MEL] if with_log_mel else []
    result = Features({name: [] for name in names})
    result.parts = {f"{name}{reading.end}": reading.parts for name in encoders for reading in wanted}
    log_mel = baseline_log_mel(sampling_rate)
    mel_hop = log_mel.hop_length / sampling_rate  # 9.98 ms at 22050 Hz: by 10 ms, a minute would be 0.14 s off
    stream = enumerate(source)
    while batch := list(islice(stream, batch_size)):
        result.skips += [item for _, item in batch if isinstance(item, Skip)]
        clips = [(number, item) for number, item in batch if not isinstance(item, Skip)]
        waveforms = [waveform for _, (_, waveform) in clips]
        made: list[dict[str, np.ndarray]] = [{} for _ in clips]
        counts = [0] * len(clips)
        refused: dict[int, Skip] = {}
        for name, encoder in encoders.items() if clips else ():

            def vectors(some: Sequence[Clip], name: str = name, encoder: Any = encoder) -> list[tuple[int, Any]]:
                features, found = encode(encoder, [waveform for _, waveform in some], layers, rows)
                check_usable(some, features, found)
                columns = []
                for reading in wanted:
                    chosen = [features[layers.index(layer)] for layer in reading.layers]
                    columns.append(_vectors(chosen, found, pooling, reading))
                ends = [f"{name}{reading.end}" for reading in wanted]
                return [(count, dict(zip(ends, row))) for count, *row in zip(found.tolist(), *columns)]

            for group in _together(waveforms, round(SECONDS_AT_ONCE * sampling_rate)):
                encoded = encode_or_skip(encoder, [clip for _, clip in clips[group]], vectors)
                for place, found in enumerate(encoded, group.start):
                    if isinstance(found, Skip):
                        refused.setdefault(place, found)
                    else:
                        counts[place] = found[0]
                        made[place] |= found[1]
        result.skips += refused.values()
        for place, (number, (_, waveform)) in enumerate(clips):
            if place in refused:
                continue
            for name, vector in made[place].items():
                result.of[name].append(vector)
            result.usable.append(number)
            result.seconds.append(len(waveform) / sampling_rate)
            if with_log_mel:
                frames = log_mel_frames(waveform, log_mel)
                if pooling is not None:
                    statistics = clip_statistics(frames)
                else:
                    statistics = frame_statistics(frames, counts[place], hop, mel_hop)
                result.of[LOG_MEL].append(statistics)
        if progress is not None:
            progress(len(batch))
    check_some_taken(result.skips, len(result.usable))
    return result


def _together(waveforms: Sequence[np.ndarray], most: int) -> Iterator[slice]:
    """Runs of waveforms that hold at most ``most`` samples with their padding, or one that is longer: the features of
    minutes of audio, several layers of joined rows, would fill the memory."""
    start, longest = 0, 0
    for number, waveform in enumerate(waveforms):
        longest = max(longest, len(waveform))
        if number > start and longest * (number + 1 - start) > most:
            yield slice(start, number)
            start, longest = number, len(waveform)
    yield slice(start, len(waveforms))


def _vectors(chosen: Sequence[Tensor], counts: Tensor, pooling: str | None, reading: Reading) -> list[np.ndarray]:
    """Layers ``(B, T, D)`` -> of every clip ``(D,)``, or ``(T, D)`` without ``pooling``.

    Layers that are joined are pooled one by one and joined afterwards, which gives the same and takes less memory: all
    means, then all deviations. What layers are weighted stays in blocks, each with all its statistics.
    """
    if pooling is None or reading.combine == "average":
        joined = chosen[0] if len(chosen) == 1 else combine_layers(torch.stack(tuple(chosen)), reading.combine)
        if pooling is None:
            return [frames[: int(count)].numpy() for frames, count in zip(joined, counts)]
        return list(pool_frames(joined, counts, pooling).numpy())
    pooled = [pool_frames(layer, counts, pooling) for layer in chosen]
    if reading.parts == 1 and pooling == "mean+std":
        halves = [layer.chunk(2, -1) for layer in pooled]
        pooled = [half[number] for number in range(2) for half in halves]
    return list(torch.cat(pooled, -1).numpy())


def untrained_copy(encoder: nn.Module, seed: int = 0) -> nn.Module:
    """The encoder with weights drawn anew, in evaluation mode: transformers models from their configuration, other
    layers by ``reset_parameters`` where they have it. The values of a parameter that this leaves as it was (under
    ``weight_norm``, a layer is made of others than it resets) are put in random order. The global generators stay as
    they are.

    For an encoder whose own initialisation is known, build it anew instead.
    """
    generator = torch.Generator().manual_seed(seed)
    devices = sorted({p.device.index or 0 for p in encoder.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        # What the last pass computed and kept, as weight_norm does, cannot be copied otherwise while it has a gradient.
        kept = (value for module in encoder.modules() for value in vars(module).values() if isinstance(value, Tensor))
        fresh = copy.deepcopy(encoder, {id(value): value.detach().clone() for value in kept if not value.is_leaf})
        if isinstance(fresh, TransformersEncoder):
            fresh.model = type(fresh.model)(fresh.model.config).to(next(fresh.parameters()).device)
            return fresh.eval().requires_grad_(False)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            before: dict[str, Tensor] = {}
            if callable(reset):
                before = {name: parameter.clone() for name, parameter in module.named_parameters(recurse=False)}
                reset()
            for name, parameter in module.named_parameters(recurse=False):
                if name in before and not torch.equal(parameter, before[name]):
                    continue
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return fresh.eval().requires_grad_(False)
