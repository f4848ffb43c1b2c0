"""Clips that an encoder of others refuses: found one by one and left out, as long as it takes some."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile
from bestrq2.errors import BestRQError, Skip, counted
from bestrq2.hardware import is_out_of_memory
from bestrq2.models import ConformerEncoder, ViTEncoder

REFUSED = "refused by the encoder"
Clip = tuple[AudioFile, np.ndarray]
T = TypeVar("T")


def encode_or_skip(encoder: Any, clips: Sequence[Clip], encode: Callable[[Sequence[Clip]], list[T]]) -> list[T | Skip]:
    """``encode(clips)``; where an encoder of others fails, the same one by one, with a Skip for each that it refuses.

    Our own encoders take every clip: their errors are passed on, as are those of memory, of the device, and those that
    name what to change.
    """
    try:
        return list(encode(clips))
    except Exception as error:
        if not _of_a_clip(encoder, error):
            raise
        if len(clips) == 1:
            lines = str(error).strip().splitlines()
            return [Skip(clips[0][0].path, REFUSED, ": ".join([type(error).__name__, *lines[:1]]))]
    return [result for clip in clips for result in encode_or_skip(encoder, [clip], encode)]


def _of_a_clip(encoder: Any, error: Exception) -> bool:
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
