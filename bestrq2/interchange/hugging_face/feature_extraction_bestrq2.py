"""Pads waveforms; the spectrogram is computed inside the model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

MOST_CHANNELS = 8


class BestRQ2FeatureExtractor(SequenceFeatureExtractor):
    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.return_attention_mask = return_attention_mask

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one mono waveform (S,) or several: arrays, tensors, lists of numbers, an array (B, S), or rows
                of datasets with "array" and "sampling_rate". Full scale is 1.0.
            sampling_rate: of the waveforms; must be the model's.
            padding, return_tensors, kwargs: as for other feature extractors, with max_length, truncation,
                pad_to_multiple_of and return_attention_mask.

        Raises:
            ValueError: for another sampling rate, several channels, no samples, integers, or values not finite.
        """
        self._check_rate(sampling_rate)
        shape: tuple[int, ...] = tuple(getattr(raw_speech, "shape", ()))
        if len(shape) == 2 and shape[1] <= MOST_CHANNELS < shape[0]:
            raise ValueError(
                f"expected waveforms (S,) or (B, S), got shape {shape}, which looks like samples x channels as "
                "soundfile reads them: average the channels first"
            )
        clips = [self._waveform(clip) for clip in (raw_speech if _is_batch(raw_speech) else [raw_speech])]
        if not clips:
            raise ValueError("expected at least one waveform, got none")
        kwargs.setdefault("return_attention_mask", self.return_attention_mask)
        return self.pad(BatchFeature({"input_values": clips}), padding=padding, return_tensors=return_tensors, **kwargs)

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(f"expected audio at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample it first")

    def _waveform(self, clip: Any) -> np.ndarray:
        if _is_example(clip):
            self._check_rate(clip.get("sampling_rate") if isinstance(clip, Mapping) else clip["sampling_rate"])
            clip = clip["array"]
        if hasattr(clip, "detach"):
            clip = clip.detach().cpu().float().numpy() if clip.is_floating_point() else clip.cpu().numpy()
        values = np.asarray(clip)
        if values.ndim != 1 or not values.size:
            raise ValueError(f"expected mono waveforms (S,) of at least one sample, got shape {values.shape}")
        if values.dtype.kind != "f" and (not isinstance(clip, list | tuple) or np.abs(values).max() > 1):
            raise ValueError(
                f"expected floating samples with full scale 1.0, got {values.dtype}: divide int16 by 32768"
            )
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("expected finite samples, got NaN or infinity")
        return values


def _is_example(clip: Any) -> bool:
    """Return True for audio as datasets gives it: ``array`` and ``sampling_rate``, since datasets 4 in a decoder."""
    return isinstance(clip, Mapping) or hasattr(clip, "get_all_samples")


def _is_batch(raw_speech: Any) -> bool:
    if _is_example(raw_speech):
        return False
    if hasattr(raw_speech, "ndim"):
        return raw_speech.ndim > 1
    return len(raw_speech) == 0 or _is_example(raw_speech[0]) or np.ndim(raw_speech[0]) > 0
