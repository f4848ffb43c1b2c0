"""One vector per clip, from an encoder or from the spectrogram alone."""

from collections.abc import Iterable

import numpy as np
import torch

from bestrq2.data import AudioFile, Skip, iterate_clips
from bestrq2.layers.log_mel import LogMel


def pool(frames: np.ndarray, pooling: str) -> np.ndarray:
    """``(T, D)`` -> ``(D,)`` for "mean", ``(2 D,)`` for "mean+std"."""
    mean = frames.mean(0)
    return mean if pooling == "mean" else np.concatenate((mean, frames.std(0)))


def log_mel_statistics(files: Iterable[AudioFile], sampling_rate: int = 16000) -> list[np.ndarray | Skip]:
    """Mean, deviation and mean absolute change between frames of 64 log-mel bands: ``(192,)`` for each clip."""
    log_mel = LogMel(sampling_rate, n_fft=1024, win_length=400, hop_length=160, num_mels=64)
    rows: list[np.ndarray | Skip] = []
    for item in iterate_clips(files, sampling_rate):
        if isinstance(item, Skip):
            rows.append(item)
            continue
        with torch.inference_mode():
            frames = log_mel(torch.from_numpy(item[1])[None])[0][0].numpy()
        change = np.abs(np.diff(frames, axis=0)).mean(0) if len(frames) > 1 else np.zeros(frames.shape[1])
        rows.append(np.concatenate((frames.mean(0), frames.std(0), change)).astype(np.float32))
    return rows
