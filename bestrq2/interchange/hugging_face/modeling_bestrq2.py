"""An encoder exported by bestrq2, as a transformers model. The architecture itself is that of the package bestrq2."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bestrq2.config import config_from_dict
from bestrq2.layers.log_mel import LogMel
from bestrq2.models import build_encoder

from .configuration_bestrq2 import BestRQ2Config


@dataclass
class BestRQ2Output(ModelOutput):
    """
    Attributes:
        last_hidden_state: ``(B, T, D)`` frame features, zeros behind a clip's end.
        pooler_output: ``(B, D)`` mean over the frames of each clip.
        attention_mask: ``(B, T)`` int64, 1 for frames of the clip.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    attention_mask: Tensor | None = None


class BestRQ2Model(PreTrainedModel):
    """Waveforms to features; a clip gives the same ones alone and in any padded batch."""

    config_class = BestRQ2Config
    base_model_prefix = "bestrq2"
    main_input_name = "input_values"

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        own = config_from_dict(config.bestrq2_config)
        self.encoder = build_encoder(own.model, own.data.crop_seconds, seed=own.train.seed)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        # Weights are drawn by the encoder itself. Loading leaves buffers that are in no file uninitialised: make the
        # constants of the spectrogram again.
        if isinstance(module, LogMel):
            module.restore_constants()

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, return_dict: bool | None = None, **others: Any
    ) -> BestRQ2Output | tuple[Tensor, ...]:
        """
        Args:
            input_values: ``(B, S)`` mono waveforms at ``config.sampling_rate``, padded at the end.
            attention_mask: ``(B, S)``, 1 for samples of the clip. None: all.

        Raises:
            TypeError: for another argument, unless it is None or False. A misspelt mask would encode padding as audio.
        """
        unknown = sorted(name for name, value in others.items() if value is not None and value is not False)
        if unknown:
            raise TypeError(
                f"expected input_values, attention_mask and return_dict, got {', '.join(unknown)}; outputs of blocks "
                "are those of bestrq2.load(FOLDER).encode_layers(waveform, lengths)"
            )
        lengths = None if attention_mask is None else (attention_mask != 0).sum(1).clamp(min=1)
        features, frames = self.encoder.encode(input_values.float(), lengths)
        mask = torch.arange(features.shape[1], device=features.device) < frames.to(features.device)[:, None]
        pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        output = BestRQ2Output(last_hidden_state=features, pooler_output=pooled, attention_mask=mask.long())
        return output.to_tuple() if return_dict is False else output
