"""Conformer weights of SpeechBrain in our blocks: the same numbers, streaming and chunk attention included."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from bestrq2.layers.conformer import Activation, Conformer, ConformerSettings
from bestrq2.layers.conformer_convolution import ConvMode

# Ours <- SpeechBrain's, inside of a layer; the weights that need rearranging are not in the table.
NAMES = {
    "ff1.norm": "ffn_module1.0",
    "ff1.fc1": "ffn_module1.1.ffn.0",
    "ff1.fc2": "ffn_module1.1.ffn.3",
    "attn_norm": "norm1.norm",
    "attn.proj": "mha_layer.out_proj",
    "conv.norm": "convolution_module.layer_norm",
    "conv.depthwise": "convolution_module.conv",
    "conv.conv_norm": "convolution_module.after_conv.0",
    "conv.pointwise2": "convolution_module.after_conv.2",
    "ff2.norm": "ffn_module2.0",
    "ff2.fc1": "ffn_module2.1.ffn.0",
    "ff2.fc2": "ffn_module2.1.ffn.3",
    "norm": "norm2.norm",
}
FIRST = "layers.0.mha_layer.in_proj_weight"


def speechbrain_conformer(
    weights: Mapping[str, Tensor],
    heads: int,
    *,
    activation: Activation = "silu",
    conv_mode: ConvMode = "full",
    dropout: float = 0.0,
) -> Conformer:
    """Build a :class:`Conformer` from the state of SpeechBrain's ``ConformerEncoder`` with ``RelPosMHAXL`` attention.

    What agrees: blocks, layer norms, convolution ("full", or "chunk" for dynamic chunk training), positions of
    distances without direction, the score scale 1 / sqrt(width). Sizes are read from the tensors. In a padded batch our
    features are those of SpeechBrain for the clip alone; its own convolution reads padded frames. SpeechBrain's
    convolutional front end and its linear input layer are not part of this.

    Args:
        weights: state dict; the encoder may lie under any prefix, other tensors are left alone.
        heads: number of attention heads, which no tensor tells.
        activation: "silu" (SpeechBrain's Swish, its default) or "gelu".
        conv_mode: "chunk" for a model of dynamic chunk training, "causal" for ``causal=True``.
        dropout: for fine-tuning.

    Returns:
        The Conformer in evaluation mode. Its last norm has SpeechBrain's eps of 1e-6.

    Raises:
        ValueError: if there is no such encoder among the weights, a tensor is missing or has another shape, naming it.
    """
    found = next((name for name in weights if name.endswith(FIRST)), None)
    if found is None:
        raise ValueError(f"expected a SpeechBrain ConformerEncoder with RelPosMHAXL: no tensor named *{FIRST}")
    prefix = found[: -len(FIRST)]
    layers = {int(m[1]) for name in weights if (m := re.match(re.escape(prefix) + r"layers\.(\d+)\.", name))}
    width = weights[found].shape[1]
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")

    def take(name: str) -> Tensor:
        if prefix + name not in weights:
            raise ValueError(f"no tensor {prefix + name!r}")
        return weights[prefix + name]

    settings = ConformerSettings(
        width,
        len(layers),
        heads,
        take("layers.0.ffn_module1.1.ffn.0.weight").shape[0],
        take("layers.0.convolution_module.conv.weight").shape[-1],
        conv_mode,
        "layer_norm",
        activation,
        dropout=dropout,
        symmetric_positions=True,
        scale_by_width=True,
    )
    model = Conformer(settings)
    state: dict[str, Tensor] = {f"norm.{kind}": take(f"norm.norm.{kind}") for kind in ("weight", "bias")}
    for number in sorted(layers):
        theirs, ours = f"layers.{number}.", f"blocks.{number}."
        for target, source in NAMES.items():
            for kind in ("weight", "bias"):
                state[f"{ours}{target}.{kind}"] = take(f"{theirs}{source}.{kind}")
        # Rows lie as (head, q | k | v, channel); ours as (q | k | v, head, channel), with biases it does not have.
        joint = take(f"{theirs}mha_layer.in_proj_weight").unflatten(0, (heads, 3, width // heads))
        state[f"{ours}attn.qkv.weight"] = joint.transpose(0, 1).reshape(3 * width, width)
        state[f"{ours}attn.qkv.bias"] = torch.zeros(3 * width, dtype=torch.float32, device="cpu")
        state[f"{ours}attn.position.weight"] = take(f"{theirs}mha_layer.linear_pos.weight")
        for target, source in (("content_bias", "pos_bias_u"), ("position_bias", "pos_bias_v")):
            # Stored as (channel, head), but used as if the same memory were (head, channel).
            state[f"{ours}attn.{target}"] = take(f"{theirs}mha_layer.{source}").reshape(heads, width // heads)
        for kind in ("weight", "bias"):
            pointwise = take(f"{theirs}convolution_module.bottleneck.0.{kind}")
            state[f"{ours}conv.pointwise1.{kind}"] = pointwise.flatten(1) if kind == "weight" else pointwise
    for name, tensor in model.state_dict().items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name}: expected shape {tuple(tensor.shape)}, found {tuple(state[name].shape)}")
    model.load_state_dict(state)
    model.norm.eps = 1e-6
    return model.eval()
