"""Conformer blocks of ``ConformerEncoder``, forward, against the same blocks with materialised attention.

Shape labels: ``B<batch>T<frames>-w<width>h<heads>n<blocks>-c<chunk>l<left frames>``; without ``-c...`` the context is
full. At 40 ms per frame a call encodes ``0.04 * B * T`` seconds of audio. Feed-forward width 4 * width, kernel 31.

Every provider has the same weights and computes the same function: SpeechBrain's attention (distances without
direction, scale 1 / sqrt(width)) in blocks whose other parts are ours, so that only the attention differs. torchaudio's
Conformer is not here: it has no relative positions and its convolution reads padding, so its features are others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Provider, Skip, Work, seeded

if TYPE_CHECKING:
    from bestrq2.layers.conformer import Conformer, ConformerBlock
    from bestrq2.layers.conformer_attention import RelativeAttention
    from bestrq2.layers.conformer_convolution import ConvMode
    from bestrq2.ops import ChunkLayout

OP = "encode"
BASELINE = "SpeechBrain, materialised"

SHAPES = {
    "cpu": ("B1T500-w256h4n4", "B1T1500-w256h4n4", "B1T1500-w256h4n4-c16l64", "B4T500-w576h8n2-c16l64"),
    "cuda": ("B16T1500-w576h8n12", "B16T1500-w576h8n12-c16l64", "B1T15000-w576h8n12-c16l64"),
}
QUICK_SHAPES = ("B1T750-w256h4n2-c16l64", "B2T250-w64h2n1-c16l64")
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float32")}

_KERNEL = 31
_MOST_BYTES = 6 * 2**30


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Random blocks and normal tokens ``(B, T, D)``; no padding."""
    from bestrq2.layers.conformer import Conformer, ConformerSettings
    from bestrq2.ops import ChunkLayout

    match = re.fullmatch(r"B(\d+)T(\d+)-w(\d+)h(\d+)n(\d+)(?:-c(\d+)l(\d+))?", shape)
    if not match:
        raise ValueError(f"encode: a shape reads like {QUICK_SHAPES[0]} or {SHAPES['cpu'][0]}, got {shape!r}")
    batch, frames, width, heads, depth = (int(number) for number in match.groups()[:5])
    layout = ChunkLayout() if match[6] is None else ChunkLayout(int(match[6]), int(match[7]))
    mode: ConvMode = "full" if layout.chunk_size is None else "chunk"
    settings = ConformerSettings(
        width, depth, heads, 4 * width, _KERNEL, mode, dropout=0.0, symmetric_positions=True, scale_by_width=True
    )
    model = Conformer(settings).eval().requires_grad_(False)
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() > 1:
            fan = parameter[0].numel()
            parameter.copy_(
                seeded(*parameter.shape, dtype=torch.float32, device=torch.device("cpu"), seed=number, scale=fan**-0.5)
            )
    model = model.to(device, dtype)
    keys = float(layout.mask(frames).sum()) / frames
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs={"x": seeded(batch, frames, width, dtype=dtype, device=device), "model": model, "layout": layout},
        work=Work(flops=batch * model.flops(frames, frames, keys), bytes=float(weights)),
        gold=_gold,
    )


def _ours(backend: Any) -> Callable[[Case], Callable[[], Tensor]]:
    def build(case: Case) -> Callable[[], Tensor]:
        from bestrq2 import ops
        from bestrq2.layers.frame_grid import FrameGrid

        x, model, layout = (case.inputs[name] for name in ("x", "model", "layout"))
        if backend == "reference":
            _fits(case)
        elif backend is not None and backend not in ops.available_backends():
            raise Skip(f"backend {backend} is not available")

        @torch.inference_mode()
        def call() -> Tensor:
            if backend is None:
                return model(x, FrameGrid(x.shape[1]), layout)
            with ops.use_backend(backend):
                return model(x, FrameGrid(x.shape[1]), layout)

        return call

    return build


def _fits(case: Case) -> None:
    batch, frames, _ = case.inputs["x"].shape
    heads = case.inputs["model"].settings.heads
    if 6 * batch * heads * frames * frames * case.dtype.itemsize > _MOST_BYTES:
        raise Skip(f"its T x T tensors would need more than {_MOST_BYTES / 2**30:.0f} GiB")


def _attention(attn: RelativeAttention, x: Tensor, table: Tensor, visible: Tensor) -> Tensor:
    """SpeechBrain's formula: both score matrices in full, relative shift by pad and view, mask, fp32 softmax."""
    batch, frames, width = x.shape
    heads = attn.heads
    query, key, value = attn.qkv(x).view(batch, frames, 3, heads, -1).permute(2, 0, 3, 1, 4)
    position = attn.position(table).view(2 * frames - 1, heads, -1).permute(1, 2, 0)  # (H, d, 2T - 1)
    content = ((query + attn.content_bias[:, None]) * attn.scale) @ key.transpose(-1, -2)
    shifted = F.pad(((query + attn.position_bias[:, None]) * attn.scale) @ position, (1, 0))
    shifted = shifted.view(batch, heads, 2 * frames, frames)[:, :, 1:].reshape(batch, heads, frames, 2 * frames - 1)
    score = (content + shifted[..., :frames]).masked_fill(~visible, float("-inf"))
    weights = score.softmax(-1, dtype=torch.promote_types(torch.float32, score.dtype)).to(value.dtype)
    return attn.proj((weights @ value).transpose(1, 2).reshape(batch, frames, width))


def _dense(model: Conformer, x: Tensor, visible: Tensor, layout: ChunkLayout) -> Tensor:
    from bestrq2.layers.conformer_attention import relative_sinusoids
    from bestrq2.layers.frame_grid import FrameGrid

    frames = x.shape[1]
    grid = FrameGrid(frames)
    # From offset T - 1 (the farthest past) down to 1 - T, as the shift expects.
    table = relative_sinusoids(1 - frames, frames - 1, x.shape[2], True, x.device).flip(0).to(x.dtype)
    for block in map(_block, model.blocks):
        x = x + 0.5 * block.ff1(x)
        x = x + _attention(block.attn, block.attn_norm(x), table, visible)
        x = x + block.conv(x, grid, layout, None)
        x = block.norm(x + 0.5 * block.ff2(x))
    return model.norm(x)


def _block(module: torch.nn.Module) -> ConformerBlock:
    from bestrq2.layers.conformer import ConformerBlock

    assert isinstance(module, ConformerBlock)
    return module


def _speechbrain(case: Case) -> Callable[[], Tensor]:
    _fits(case)
    x, model, layout = (case.inputs[name] for name in ("x", "model", "layout"))
    visible = layout.mask(x.shape[1], device=str(x.device))
    return torch.inference_mode()(lambda: _dense(model, x, visible, layout))


def _gold(case: Case) -> dict[str, Tensor]:
    x, layout = case.inputs["x"], case.inputs["layout"]
    model = copy.deepcopy(case.inputs["model"]).double()
    with torch.no_grad():
        visible = layout.mask(x.shape[1], device=str(x.device))
        return {"out": torch.cat([_dense(model, clip[None].double(), visible, layout) for clip in x])}


PROVIDERS = [
    Provider("bestrq2", _ours(None)),
    Provider("bestrq2[triton]", _ours("triton"), on=("cuda",)),
    Provider("reference", _ours("reference")),
    Provider("SpeechBrain, materialised", _speechbrain, note="formula restated"),
]
