"""Live features of a file from a streaming encoder, as if it came from a microphone.

    bestrq2 stream runs/streaming_conformer-001 recording.wav
    bestrq2 stream runs/streaming_conformer-001 recording.wav --chunk-size 8 --left-context 64 --piece 0.1

Audio arrives in pieces of ``--piece`` seconds; every chunk of features is shown when it is complete: its time, how much
the features moved from frame to frame, and the real-time factor so far (compute seconds per second of audio; below 1
keeps up). The delay of a feature is its chunk, plus half an analysis window, plus the compute time.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bestrq2.command import command, leave

# isort: split
import numpy as np
import torch
from torch import Tensor

from bestrq2.config import ConfigError
from bestrq2.data import load_audio
from bestrq2.durability import write_array
from bestrq2.hardware import choose_device
from bestrq2.interchange import load
from bestrq2.models import ConformerEncoder
from bestrq2.ops import ChunkLayout
from bestrq2.outputs import add_overwrite, check_new

LEVELS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Arrival:
    """Features that one piece of audio completed.

    Attributes:
        features: ``(t, D)`` float32.
        first: number of the first of these frames.
        audio_seconds: audio received so far.
        compute_seconds: spent so far.
    """

    features: Tensor
    first: int
    audio_seconds: float
    compute_seconds: float


@torch.inference_mode()
def live_features(
    encoder: ConformerEncoder, waveform: np.ndarray, piece_seconds: float, layout: ChunkLayout | None = None
) -> Iterator[Arrival]:
    """Feed ``waveform (S,)`` in pieces and yield features as they come.

    Raises:
        ValueError: for settings that cannot be streamed, or pieces shorter than a sample.
    """
    device = next(encoder.parameters()).device
    size = round(piece_seconds * encoder.sampling_rate) if math.isfinite(piece_seconds) else 0
    if size < 1:
        raise ValueError(f"expected pieces of at least one sample, got {piece_seconds} s")
    state = encoder.start_stream(1, layout)
    audio = torch.from_numpy(waveform)[None]
    spent, first = 0.0, 0
    for begin in range(0, audio.shape[1], size):
        piece = audio[:, begin : begin + size].to(device)
        final = begin + size >= audio.shape[1]
        started = time.perf_counter()
        features, _ = encoder.stream(piece, state, final=final)
        features = features[0].cpu()
        spent += time.perf_counter() - started
        if len(features) or final:
            yield Arrival(features, first, min(begin + size, audio.shape[1]) / encoder.sampling_rate, spent)
        first += len(features)


def sparkline(features: Tensor, before: Tensor | None) -> str:
    """One character per frame: how far it moved from the frame before, relative to its size."""
    previous = torch.cat((features[:1] if before is None else before[None], features[:-1]))
    moved = (features - previous).norm(dim=1) / features.norm(dim=1).clamp(min=1e-6)
    index = (moved / 1.4 * (len(LEVELS) - 1)).round().clamp(0, len(LEVELS) - 1)
    return "".join(LEVELS[int(i)] for i in index)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 stream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "encoder", metavar="ENCODER", help="run folder or step-* folder of a Conformer trained in chunks"
    )
    parser.add_argument("file", type=Path, help="audio file")
    parser.add_argument("--piece", type=float, default=0.1, help="seconds of audio that arrive together (default: 0.1)")
    parser.add_argument("--chunk-size", type=int, help="feature frames per chunk (default: the encoder's)")
    parser.add_argument("--left-context", type=int, help="feature frames before the chunk (default: the encoder's)")
    parser.add_argument("--out", type=Path, help="also write the features, (frames, width), to this .npy file")
    parser.add_argument("--device", default="auto")
    add_overwrite(parser)
    options = parser.parse_args(arguments)
    out: Path | None = options.out
    if out is not None:  # before anything is computed
        if out.suffix != ".npy":
            out = out.with_name(f"{out.name}.npy")
        if not out.parent.is_dir():
            raise ConfigError(f"--out {options.out}: the folder {out.parent} does not exist")
        check_new("--out", [out], options.overwrite)
    try:
        encoder = load(options.encoder, device=choose_device(options.device, option="--device"))
        if not isinstance(encoder, ConformerEncoder):
            raise ConfigError(
                f"{options.encoder}: only a Conformer can stream, this is a "
                f"{type(encoder).__name__}: train one, bestrq2 train --config streaming_conformer --data FOLDER"
            )
        layout = encoder.layout
        if options.chunk_size is not None or options.left_context is not None:
            chunk = layout.chunk_size if options.chunk_size is None else options.chunk_size
            left = layout.left_context if options.left_context is None else options.left_context
            layout = ChunkLayout(chunk, left)
        waveform = load_audio(options.file, encoder.sampling_rate)
        return show(encoder, waveform, options.piece, layout, out)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def show(
    encoder: ConformerEncoder, waveform: np.ndarray, piece_seconds: float, layout: ChunkLayout, out: Path | None
) -> int:
    hop = encoder.hop_size_in_ms / 1000
    print(f"{encoder.output_dim} features every {1000 * hop:.0f} ms; {layout}")
    parts: list[Tensor] = []
    arrival: Arrival | None = None
    for arrival in live_features(encoder, waveform, piece_seconds, layout):
        if len(arrival.features):
            last = arrival.first + len(arrival.features)
            line = sparkline(arrival.features, parts[-1][-1] if parts else None)
            factor = arrival.compute_seconds / arrival.audio_seconds
            print(f"{arrival.first * hop:8.2f}-{last * hop:.2f} s  {line}  real-time factor {factor:.3f}", flush=True)
            parts.append(arrival.features)
    if arrival is None:
        raise ValueError("the file holds no audio")
    frames = sum(map(len, parts))
    factor = arrival.compute_seconds / arrival.audio_seconds
    print(f"{frames} frames of {arrival.audio_seconds:.2f} s in {arrival.compute_seconds:.2f} s: {factor:.3f}")
    if out is not None:
        write_array(out, torch.cat(parts).numpy())
        print(f"written to {out}")
    return 0


if __name__ == "__main__":
    leave(main())
