"""Pooled features of clips by encoder, in memory and in files: another task, head or start encodes no clip again."""

import hashlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bestrq2.probing import ProbeTask
from bestrq2.probing.features import Reading

LOG_MEL_NAME = "log-mel"


def digest_of(encoder: torch.nn.Module) -> str:
    """Digest of weights, buffers and settings, 12 hexadecimal digits: the same weights with other heads, positions or
    another floor of the spectrogram are another encoder."""
    digest = hashlib.sha256()
    for name, module in encoder.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, (int, float, str, tuple)) or is_dataclass(value):
                digest.update(f"{name} {key} {value!r}".encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


class KeptFeatures:
    """Vectors of clips under the names of their files, for one encoder and one readout.

    Args:
        path: file to read and to write; None: keep them in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.of: dict[str, dict[str, np.ndarray]] = {}  # clip -> end of the reading's name -> vector
        if path is None or not path.exists():
            return
        with np.load(path) as file:
            clips = [str(clip) for clip in file["clips"]]
            self.of = {clip: {} for clip in clips}
            for key in file.files:
                if key.startswith("features"):
                    for clip, vector in zip(clips, file[key]):
                        self.of[clip][key.removeprefix("features")] = vector

    def add(self, vectors: dict[str, dict[str, np.ndarray]]) -> None:
        """Keep vectors of more clips, and write all of them: the file is complete or as it was."""
        self.of |= vectors
        if self.path is None or not self.of:
            return
        ends = list(next(iter(self.of.values())))
        stacked: dict[str, Any] = {f"features{end}": np.stack([kept[end] for kept in self.of.values()]) for end in ends}
        stacked["clips"] = np.array(list(self.of))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        with partial.open("wb") as file:
            np.savez(file, **stacked)
        partial.replace(self.path)


class FeatureFolder:
    """The kept features of all encoders.

    Args:
        folder: of the files; None: memory alone, and the two encoders of the last task.
        precision: in which encoders compute.
    """

    def __init__(self, folder: Path | None, precision: str) -> None:
        self.folder, self.precision = folder, precision
        self._open: dict[str, KeptFeatures] = {}

    def of(self, encoder: Any | None, task: ProbeTask, wanted: list[Reading]) -> KeptFeatures:
        """Those of an encoder, or of log-mel statistics for None, in the readout of a task."""
        name = LOG_MEL_NAME
        if encoder is not None:
            described = repr((wanted, task.rows, task.pooling, self.precision, encoder.sampling_rate))
            name = f"{digest_of(encoder)}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
        if name not in self._open:
            while len(self._open) > 2:  # features of three encoders in memory at most
                self._open.pop(next(iter(self._open)))
            self._open[name] = KeptFeatures(self.folder / f"{name}.npz" if self.folder is not None else None)
        return self._open[name]
