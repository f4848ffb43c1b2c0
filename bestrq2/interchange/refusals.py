"""Clips that an encoder of others refuses: found one by one and left out, as long as it takes some."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile
from bestrq2.errors import BestRQError, Skip, counted
from bestrq2.hardware import is_out_of_memory
from bestrq2.models import ConformerEncoder, ViTEncoder

from .adapters import ForeignEncoder

REFUSED = "refused by the encoder"
Clip = tuple[AudioFile, np.ndarray]
T = TypeVar("T")


class FeatureError(BestRQError, ValueError):
    """Features that nothing can use: not finite, or no frame at all."""

    def __init__(self, path: str, fault: str) -> None:
        self.fault = fault
        super().__init__(f"{path}: {fault}")


def check_usable(clips: Sequence[Clip], features: Tensor, counts: Tensor) -> None:
    """Check features ``(..., B, T, D)`` with ``counts (B,)`` frames of B clips.

    Raises:
        FeatureError: a clip has no frame, or a value that is not finite.
    """
    finite = features.isfinite().all(-1).flatten(0, -3).all(0) if features.ndim > 3 else features.isfinite().all(-1)
    for (file, _), row, count in zip(clips, finite, counts.tolist()):
        if not count:
            raise FeatureError(file.path, "the encoder gives no frame for it")
        if not bool(row[:count].all()):
            raise FeatureError(file.path, "the encoder's features of it are not finite")


def encode_or_skip(encoder: Any, clips: Sequence[Clip], encode: Callable[[Sequence[Clip]], list[T]]) -> list[T | Skip]:
    """``encode(clips)``; where an encoder of others fails, the same one by one, with a Skip for each that it refuses.

    Our own encoders take every clip: their errors are passed on, as are those of memory, of the device, and those that
    name what to change. Features that cannot be used (:func:`check_usable`) are a refusal of an adapted encoder, one
    that was opened from a file, and an error of any other module.
    """
    try:
        return list(encode(clips))
    except Exception as error:
        if not _of_a_clip(encoder, error):
            raise
        if len(clips) == 1:
            lines = str(error).strip().splitlines()
            detail = error.fault if isinstance(error, FeatureError) else ": ".join([type(error).__name__, *lines[:1]])
            return [Skip(clips[0][0].path, REFUSED, detail)]
    return [result for clip in clips for result in encode_or_skip(encoder, [clip], encode)]


def _of_a_clip(encoder: Any, error: Exception) -> bool:
    if isinstance(error, FeatureError):
        return isinstance(encoder, ForeignEncoder)
    if isinstance(encoder, (ViTEncoder, ConformerEncoder)) or isinstance(error, (BestRQError, OSError)):
        return False
    return not (is_out_of_memory(error) or "CUDA error" in str(error))


def check_some_taken(skips: Iterable[Skip], taken: int) -> None:
    """
    Raises:
        ConfigError: if the encoder refused clips and took none; with its message.
    """
    refused = [skip for skip in skips if skip.reason == REFUSED]
    if refused and not taken:
        raise ConfigError(f"the encoder fails on every clip ({counted(len(refused), 'clip')} tried): {refused[0]}")
