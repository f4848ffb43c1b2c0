"""An encoder exported by bestrq2, as a transformers model. The architecture itself is that of the package bestrq2."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bestrq2.config import ConfigError, config_from_dict
from bestrq2.layers.conformer_attention import RelativeAttention
from bestrq2.layers.conformer_convolution import MaskedBatchNorm
from bestrq2.layers.log_mel import LogMel
from bestrq2.models import build_encoder
from bestrq2.models.build import check_finite

from .configuration_bestrq2 import BestRQ2Config

MOST_NAMES = 8  # of missing tensors in a message


@dataclass
class BestRQ2Output(ModelOutput):
    """
    Attributes:
        last_hidden_state: ``(B, T, D)`` frame features, normalised, zeros behind a clip's end.
        pooler_output: ``(B, D)`` mean over the frames of each clip.
        attention_mask: ``(B, T)`` int64, 1 for frames of the clip.
        hidden_states: if asked for, the embeddings and the output of every block, ``(B, T, D)`` each.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class BestRQ2Model(PreTrainedModel):
    """Waveforms to features; a clip gives the same ones alone and in any padded batch.

    In any dtype of the weights the spectrogram is computed from the waveform as it comes, in float64: do not convert
    ``input_values`` to half precision. Outputs have the dtype of the weights.
    """

    config_class = BestRQ2Config
    base_model_prefix = "bestrq2"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "ConformerBlock", "ConvSubsampling"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["front_end"]  # noqa: RUF012

    def __init__(self, config: BestRQ2Config) -> None:
        super().__init__(config)
        own = config_from_dict(config.bestrq2_config)
        self.encoder = build_encoder(own.model, own.data.crop_seconds, seed=own.train.seed)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, but for a damaged file.

        Raises:
            ConfigError: if tensors of the encoder are missing, or any tensor holds NaN or infinity.
        """
        source = pretrained_model_name_or_path
        opened: Any = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        model, info = opened
        _check_missing(info, source)
        # Those elsewhere (meta, subclasses of tensors, quantised to one byte) have no values that could be looked at.
        found = {n: t for n, t in model.state_dict().items() if type(t) is Tensor and not t.is_meta and t.itemsize > 1}
        check_finite(found, source)
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a file lacks, and the constants of the spectrogram, which are in no file."""
        if isinstance(module, LogMel):
            module.restore_constants()
        elif isinstance(module, RelativeAttention):
            nn.init.zeros_(module.content_bias)
            nn.init.zeros_(module.position_bias)
        elif isinstance(module, MaskedBatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
        else:
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        # Every block calls torch's own checkpointing, whatever function is given.
        self.encoder.encoder.activation_checkpointing = enable  # type: ignore[assignment]
        self.gradient_checkpointing = enable

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BestRQ2Output | tuple[Tensor, ...]:
        """
        Args:
            input_values: ``(B, S)`` floating mono waveforms at ``config.sampling_rate``, padded at the end.
            attention_mask: ``(B, S)``, 1 for samples of the clip, then 0. None: all.
            output_hidden_states: also return the embeddings and the output of every block; default: of the config.
            output_attentions: only False: the weights of attention are never stored.
            return_dict: False for a tuple; default: of the config.

        Raises:
            ValueError: for other shapes, dtypes or values, padding at the start, or ``output_attentions``.
        """
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: this model does not store the weights of attention, expected False")
        wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        lengths = None if attention_mask is None else mask_lengths(attention_mask, input_values)
        layers: list[Any] = ["embeddings", *range(self.encoder.depth), None] if wanted else [None]
        states, frames = self.encoder.encode_layers(input_values, lengths, layers)
        features = states[-1]
        mask = torch.arange(features.shape[1], device=features.device) < frames.to(features.device)[:, None]
        pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        output = BestRQ2Output(
            last_hidden_state=features.to(self.dtype),
            pooler_output=pooled.to(self.dtype),
            attention_mask=mask.long(),
            hidden_states=tuple(states[:-1].to(self.dtype)) if wanted else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _check_missing(info: dict[str, Any], source: Any) -> None:
    """Raise ConfigError if the encoder, which nothing but the file can give, lacks tensors.

    With ``ignore_mismatched_sizes`` those of another shape are initialised, which statistics of the data cannot be.
    """
    reshaped = {entry[0] for entry in info["mismatched_keys"] if ".front_end." in entry[0]}
    missing = sorted(name for name in {*info["missing_keys"], *reshaped} if name.startswith("encoder."))
    if missing:
        names = ", ".join(missing[:MOST_NAMES]) + (", ..." if len(missing) > MOST_NAMES else "")
        raise ConfigError(
            f"{source}: expected all tensors of the encoder, got a file without {len(missing)} of them: {names}"
        )


def mask_lengths(mask: Tensor, input_values: Tensor) -> Tensor:
    """Samples of each clip ``(B,)`` from ``attention_mask (B, S)``.

    Raises:
        ValueError: unless every row is ones, at least one, and then zeros.
    """
    if not isinstance(mask, Tensor) or mask.shape != input_values.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected a tensor like input_values, {tuple(input_values.shape)}, got {found}"
        )
    inside = mask == 1
    if not bool((inside | (mask == 0)).all()):
        raise ValueError(
            f"attention_mask: expected ones and zeros, got other values, from {mask.min()} to {mask.max()}"
        )
    lengths = inside.sum(1)
    if not bool((inside == (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).all()):
        raise ValueError("attention_mask: expected ones, then zeros in every row: pad clips at their end, not before")
    if not bool((lengths > 0).all()):
        raise ValueError("attention_mask: expected at least one sample in every row")
    return lengths
