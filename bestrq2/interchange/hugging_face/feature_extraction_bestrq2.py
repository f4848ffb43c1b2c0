"""Pads waveforms; the spectrogram is computed inside the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor


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
        raw_speech: np.ndarray | Sequence[Any],
        sampling_rate: int | None = None,
        padding: bool | str = True,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one mono waveform (S,) or a list of them.
            sampling_rate: of the waveforms; must be the model's.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(f"expected audio at {self.sampling_rate} Hz, got {sampling_rate} Hz: resample it first")
        single = np.ndim(raw_speech[0]) == 0
        clips = [np.asarray(clip, dtype=np.float32) for clip in ([raw_speech] if single else raw_speech)]
        if any(clip.ndim != 1 for clip in clips):
            raise ValueError(f"expected mono waveforms (S,), got shapes {[clip.shape for clip in clips]}")
        batch = BatchFeature({"input_values": clips})
        return self.pad(
            batch,
            padding=padding,
            return_attention_mask=self.return_attention_mask,
            return_tensors=return_tensors,
            **kwargs,
        )
