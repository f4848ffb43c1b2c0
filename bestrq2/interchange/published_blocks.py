"""Transformer blocks in the names of the published checkpoints, whatever variant their shapes show."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bestrq2.errors import ConfigError
from bestrq2.layers.positions import PositionKind
from bestrq2.layers.transformer import Norm, TransformerSettings

from .published_keys import Keys, unknown_layout

# Names under which code bases keep the three matrices of SwiGLU: gate (through the SiLU), value, output.
SWIGLU_NAMES = (("fc1_g", "fc1_x", "fc2"), ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
PACKED_NAMES = (("fc1", "fc2"), ("w12", "w3"))


def read_transformer(
    keys: Keys, stem: str, rows: int, heads: int | None, default_head_dim: int
) -> tuple[TransformerSettings, dict[str, Tensor], PositionKind]:
    """The Transformer whose tensors begin with ``stem``.

    A norm without bias is an RMSNorm; a feed-forward layer with three matrices, or a first matrix twice as wide as the
    second takes, is SwiGLU with the gate first; absent biases are zeros where others are present.

    Returns:
        its settings, its tensors in our names, and its positions ("sincos" or "rope").

    Raises:
        UnknownLayoutError, ConfigError: as :func:`from_published`.
    """
    depth = 0
    while f"{stem}blocks.{depth}.attn.qkv.weight" in keys.tensors:
        depth += 1
    if depth == 0:
        raise unknown_layout(keys.origin, f"no tensor '{stem}blocks.0.attn.qkv.weight'", list(keys.tensors))
    width = keys.need(f"{stem}blocks.0.attn.qkv.weight", dims=2).shape[1]
    linear = [name for name in keys.below(f"{stem}blocks.") if name.endswith(".bias") and ".norm" not in name]
    out: dict[str, Tensor] = {}
    hidden, gated = 0, False
    for i in range(depth):
        block = f"{stem}blocks.{i}."
        _copy_norms(keys, block, f"blocks.{i}.", out)
        for name in ("attn.qkv", "attn.proj"):
            out[f"blocks.{i}.{name}.weight"] = keys.need(f"{block}{name}.weight", dims=2)
            _copy_bias(keys, f"{block}{name}.bias", f"blocks.{i}.{name}", out, bool(linear))
        _check_shape(keys, f"{block}attn.qkv.weight", 3 * width, width)
        hidden, gated = _copy_feed_forward(keys, block, f"blocks.{i}.mlp.", out, bool(linear))
        for name in ("attn.q_norm", "attn.k_norm"):
            scale = keys.get(f"{block}{name}.weight", dims=1)
            if scale is not None:
                out[f"blocks.{i}.{name}.weight"] = scale
    out["norm.weight"] = keys.need(stem + "norm.weight")
    final_bias = keys.get(stem + "norm.bias")
    if final_bias is not None:
        out["norm.bias"] = final_bias
    kind: Norm = "layer_norm" if final_bias is not None else "rms_norm"
    head_dim = _head_dim(keys, stem, out, width, rows, heads, default_head_dim)
    settings = TransformerSettings(
        width=width,
        depth=depth,
        heads=width // head_dim,
        hidden=hidden,
        norm=kind,
        feed_forward="swiglu" if gated else "gelu",
        bias=bool(linear),
        qk_norm="blocks.0.attn.q_norm.weight" in out,
    )
    # A sin-cos table is always stored; a file without one has rotary positions, whose frequencies need not be stored.
    position: PositionKind = "sincos" if stem + "pos_embed" in keys.tensors else "rope"
    if position == "rope":
        _check_rotary(keys, stem, head_dim, rows)
        if rows > 1:
            _swap_rotary_layout(out, settings.heads)
    return settings, out, position


def _copy_norms(keys: Keys, block: str, own: str, out: dict[str, Tensor]) -> None:
    for name in ("norm1", "norm2"):
        out[f"{own}{name}.weight"] = keys.need(f"{block}{name}.weight")
        bias = keys.get(f"{block}{name}.bias", dims=1)
        if bias is not None:
            out[f"{own}{name}.bias"] = bias


def _check_shape(keys: Keys, name: str, *expected: int) -> None:
    found = keys.need(name)
    if found.shape != expected:
        raise ConfigError(f"{keys.origin}: {name}: expected the shape {list(expected)}, got {list(found.shape)}")


def _copy_bias(keys: Keys, name: str, own: str, out: dict[str, Tensor], wanted: bool) -> None:
    bias = keys.get(name)
    if bias is not None:
        _check_shape(keys, name, out[f"{own}.weight"].shape[0])
    if wanted:
        out[f"{own}.bias"] = (
            torch.zeros(out[f"{own}.weight"].shape[0], dtype=torch.float32, device="cpu") if bias is None else bias
        )


def _copy_feed_forward(keys: Keys, block: str, own: str, out: dict[str, Tensor], bias: bool) -> tuple[int, bool]:
    """Returns the hidden width and whether it is SwiGLU."""
    stem = block + "mlp."
    for gate, value, last in SWIGLU_NAMES:
        if f"{stem}{gate}.weight" in keys.tensors:
            _check_shape(keys, f"{stem}{value}.weight", *keys.need(f"{stem}{gate}.weight", dims=2).shape)
            out[f"{own}fc1.weight"] = torch.cat([keys.need(f"{stem}{name}.weight", dims=2) for name in (gate, value)])
            out[f"{own}fc2.weight"] = keys.need(f"{stem}{last}.weight", dims=2)
            if bias:
                parts = [keys.get(f"{stem}{name}.bias", dims=1) for name in (gate, value)]
                width = out[f"{own}fc2.weight"].shape[1]
                out[f"{own}fc1.bias"] = torch.cat(
                    [torch.zeros(width, dtype=torch.float32, device="cpu") if part is None else part for part in parts]
                )
            _copy_bias(keys, f"{stem}{last}.bias", own + "fc2", out, bias)
            return out[f"{own}fc2.weight"].shape[1], True
    first, last = next((pair for pair in PACKED_NAMES if f"{stem}{pair[0]}.weight" in keys.tensors), PACKED_NAMES[0])
    out[f"{own}fc1.weight"], out[f"{own}fc2.weight"] = (
        keys.need(f"{stem}{first}.weight", dims=2),
        keys.need(f"{stem}{last}.weight", dims=2),
    )
    _copy_bias(keys, f"{stem}{first}.bias", own + "fc1", out, bias)
    _copy_bias(keys, f"{stem}{last}.bias", own + "fc2", out, bias)
    hidden = out[f"{own}fc2.weight"].shape[1]
    return hidden, out[f"{own}fc1.weight"].shape[0] == 2 * hidden


def _head_dim(
    keys: Keys, stem: str, out: dict[str, Tensor], width: int, rows: int, heads: int | None, default: int
) -> int:
    query_scale = out.get("blocks.0.attn.q_norm.weight")
    frequencies = _rotary_frequencies(keys, stem)
    if query_scale is not None:
        head_dim = len(query_scale)
    elif frequencies:
        head_dim = len(frequencies[0][1]) * (2 if rows == 1 else 4)
    else:
        head_dim = width // heads if heads else default
    if head_dim < 1 or width % head_dim or (heads is not None and heads * head_dim != width):
        raise ConfigError(
            f"{keys.origin}: heads of width {head_dim} do not make up the width {width}"
            + (f" with heads={heads}" if heads else ": give heads (--heads)")
        )
    return head_dim


def _rotary_frequencies(keys: Keys, stem: str) -> list[tuple[str, Tensor]]:
    names = [name for name in keys.below(stem) if ".inv_freq" in name and "rope" in name]
    return [(name, tensor) for name in names if (tensor := keys.get(name, dims=1)) is not None]


def _check_rotary(keys: Keys, stem: str, head_dim: int, rows: int) -> None:
    count = head_dim // (2 if rows == 1 else 4)
    expected = 10000.0 ** (-torch.arange(count, device="cpu", dtype=torch.float32) / count)
    for name, found in _rotary_frequencies(keys, stem):
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=keys.tolerance(name)):
            raise ConfigError(f"{keys.origin}: {name} {list(found.shape)} are not {count} frequencies of base 10000")


def _swap_rotary_layout(weights: dict[str, Tensor], heads: int) -> None:
    """Reorder the channels of every query and key head in place, from the published two-dimensional rotary layout to
    ours or back; their products do not change.

    Theirs has its pairs inside each half of a head, f f' t t', ours across the halves, f t f' t': the middle quarters
    change places.
    """

    def swap(channels: Tensor) -> Tensor:
        first, second, third, fourth = channels.chunk(4, dim=-2)
        return torch.cat((first, third, second, fourth), dim=-2)

    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            parts = tensor.view(3, heads, tensor.shape[0] // (3 * heads), -1)
            weights[name] = torch.cat((swap(parts[:2]), parts[2:])).view(tensor.shape)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = swap(tensor[:, None])[:, 0]


def write_transformer(
    weights: Mapping[str, Tensor], own: str, stem: str, heads: int, swap_rotary_layout: bool
) -> dict[str, Tensor]:
    """Tensors of our Transformer ``own`` in published names below ``stem``."""
    out = {name[len(own) :]: tensor for name, tensor in weights.items() if name.startswith(own)}
    if swap_rotary_layout:
        _swap_rotary_layout(out, heads)
    return {stem + name: tensor for name, tensor in out.items()}
