"""Configuration of an encoder exported by bestrq2."""

from typing import Any

from transformers import PretrainedConfig


class BestRQ2Config(PretrainedConfig):
    """
    Args:
        bestrq2_config: the configuration of the run, from which the encoder is built.
        hidden_size: width of the features.
        num_hidden_layers: number of blocks.
        sampling_rate: Hz of the input.
        hop_size_in_ms: between frames of the features.
    """

    model_type = "bestrq2"

    def __init__(
        self,
        bestrq2_config: dict[str, Any] | None = None,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        sampling_rate: int = 16000,
        hop_size_in_ms: float = 625.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bestrq2_config = bestrq2_config or {}
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.sampling_rate = sampling_rate
        self.hop_size_in_ms = hop_size_in_ms
