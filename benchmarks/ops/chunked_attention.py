"""``chunked_attention``: chunks with Transformer-XL positions, against the materialised forms and FlexAttention.

Two rows without positions show what attention alone costs: a floor, not the same function.

Shape labels: ``B<batch>H<heads>T<frames>d<head size>-c<chunk>l<left frames>r<right frames>``; without ``-c...`` the
context is full. Every case has positions and both biases.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Provider, Skip, Work, bestrq2_providers, compiled, seeded

OP = "chunked_attention"
BASELINE = "Transformer-XL, materialised"

_REFERENCE = "B2H4T2048d64-c64l256r0"
_SPEECHBRAIN = "B4H8T500d64-c16l64r0"  # 20 s at 25 Hz, 16 frames, 4 left chunks
_NEMO = "B2H8T1000d64-c14l70r0"  # FastConformer, att_context_size [70, 13]
_FULL = "B1H4T512d64"  # offline encoder, everything visible
_LONG = "B1H2T4096d64-c64l256r0"  # minutes of audio

SHAPES = {
    "cpu": (_REFERENCE, _SPEECHBRAIN, _NEMO, _FULL, _LONG),
    "cuda": (
        _REFERENCE,
        "B16H8T1500d64-c64l256r0",
        "B8H12T6000d64-c16l128r0",
        "B16H12T1500d64-c32l256r32",
        _NEMO,
        _FULL,
    ),
}
QUICK_SHAPES = ("B1H4T1024d64-c64l256r0", "B2H4T250d64-c16l64r0")
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}

TUNING = {
    f"{kernel}/{key}": (shape, dtype)
    for kernel in ("forward", "backward_query", "backward_key", "band", "table_gradient")
    for key, shape, dtype in (
        ("64", "B16H8T1500d64-c64l256r0", "bfloat16"),
        ("128", "B16H4T1500d128-c64l256r0", "bfloat16"),
        ("64/fp32", "B16H8T1500d64-c64l256r0", "float32"),
        ("128/fp32", "B16H4T1500d128-c64l256r0", "float32"),
    )
}

_TENSORS = ("query", "key", "value", "position", "content_bias", "position_bias")
_MOST_BYTES = 6 * 2**30  # on a CPU; the materialised forms keep about six (B, H, T, 2T) tensors for the backward
_SHARE_OF_GPU = 0.6  # of its memory, on a GPU


def _options(case: Case) -> dict[str, Any]:
    return {name: case.inputs[name] for name in ("chunk_size", "left_context", "right_context")}


def _attention_inputs(case: Case) -> dict[str, Any]:
    return {name: case.inputs[name] for name in _TENSORS}


def _visible(case: Case) -> Tensor:
    from bestrq2.ops import ChunkLayout

    return ChunkLayout(**_options(case)).mask(case.inputs["query"].shape[2], device=case.device)


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Normal inputs; query, key and value are the (B, T, H, d) of a projection, seen as (B, H, T, d)."""
    match = re.fullmatch(r"B(\d+)H(\d+)T(\d+)d(\d+)(?:-c(\d+)l(\d+)r(\d+))?", shape)
    if not match:
        raise ValueError(f"chunked_attention: a shape reads like {_REFERENCE} or {_FULL}, got {shape!r}")
    batch, heads, frames, dim = (int(number) for number in match.groups()[:4])
    chunk, left, right = (None, None, 0) if match[5] is None else (int(match[i]) for i in (5, 6, 7))

    def make(*size: int, seed: int) -> Tensor:
        return seeded(*size, dtype=dtype, device=device, seed=seed)

    inputs: dict[str, Any] = {
        name: make(batch, frames, heads, dim, seed=i).transpose(1, 2).requires_grad_()
        for i, name in enumerate(_TENSORS[:3])
    }
    inputs["position"] = make(heads, 2 * frames - 1, dim, seed=3).requires_grad_()
    for i, name in enumerate(_TENSORS[4:]):
        inputs[name] = make(heads, dim, seed=4 + i).requires_grad_()
    inputs |= {"chunk_size": chunk, "left_context": left, "right_context": right}
    from bestrq2.ops import ChunkLayout
    from bestrq2.ops.chunked_attention.cpu import multiplies_bf16
    from bestrq2.ops.common import native

    pairs = float(ChunkLayout(chunk, left, right).mask(frames).sum()) * batch * heads
    # Each visible pair: content, position and value forward; backward eight, position and content scores among them.
    product = 2.0 * pairs * dim
    tensor = batch * heads * frames * dim * dtype.itemsize
    # On a CPU all sums are fp32; whether products are bf16 depends on the processor.
    fp32 = device.type == "cpu" and not (native.extension_obstacle() is None and multiplies_bf16(dtype))
    arithmetic = "float32" if fp32 else str(dtype).removeprefix("torch.")
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=inputs,
        work=Work(flops=3 * product, bytes=4 * tensor, arithmetic=arithmetic),
        backward_work=Work(flops=8 * product, bytes=8 * tensor, arithmetic=arithmetic),
        differentiable=tuple(name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad),
        upstream=make(batch, heads, frames, dim, seed=9),
        gold=_gold,
    )


def _gold(case: Case) -> dict[str, Tensor]:
    """The specification in fp64, one item and head at a time: its T x T tensors would not fit otherwise."""
    from bestrq2 import ops

    batch, heads = case.inputs["query"].shape[:2]
    results: dict[str, Tensor] = {}
    for b in range(batch):
        for h in range(heads):
            tensors: dict[str, Any] = {}
            for name in case.differentiable:
                x = case.inputs[name].detach()
                part = x[b : b + 1, h : h + 1] if x.dim() == 4 else x[h : h + 1]
                tensors[name] = part.double().requires_grad_()
            out = ops.reference.chunked_attention(**tensors, **_options(case))
            assert case.upstream is not None
            upstream = case.upstream[b : b + 1, h : h + 1].double()
            gradients = torch.autograd.grad(out, list(tensors.values()), upstream)
            parts = {"out": out.detach(), **{f"grad {name}": x for name, x in zip(tensors, gradients)}}
            for name, part in parts.items():
                like = case.inputs["query" if name == "out" else name.removeprefix("grad ")]
                whole = results.setdefault(name, torch.zeros(like.shape, dtype=torch.float64, device=case.device))
                (whole[b : b + 1, h : h + 1] if part.dim() == 4 else whole[h : h + 1]).add_(part)
    return results


def _ours(case: Case, backend: Any) -> Tensor:
    from bestrq2 import ops

    if backend == "reference":
        _fits(case)
    return ops.chunked_attention(**_attention_inputs(case), **_options(case), backend=backend)


def _bias(case: Case) -> Callable[..., Tensor]:
    """Function of (query, position, position_bias): the shifted position scores (B, H, T, T), by pad and view."""

    def bias(query: Tensor, position: Tensor, position_bias: Tensor) -> Tensor:
        batch, heads, frames, _ = query.shape
        scores = (query + position_bias[:, None]) @ position.flip(1).transpose(-1, -2)
        padded = F.pad(scores, (1, 0)).view(batch, heads, 2 * frames, frames)
        return padded[:, :, 1:].reshape(batch, heads, frames, 2 * frames - 1)[..., :frames]

    return bias


def _fits(case: Case) -> None:
    batch, heads, frames, _ = case.inputs["query"].shape
    most = float(_MOST_BYTES)
    if case.device.type == "cuda":
        most = _SHARE_OF_GPU * torch.cuda.get_device_properties(case.device).total_memory
    if 12 * batch * heads * frames * frames * case.dtype.itemsize > most:
        raise Skip(f"its T x T tensors would need more than {most / 2**30:.0f} GiB")


def _transformer_xl(case: Case) -> Callable[..., Tensor]:
    """Both score matrices in full, relative shift, mask, softmax: how the toolkits compute it."""
    _fits(case)
    visible, bias = _visible(case), _bias(case)

    def attention(query, key, value, position, content_bias, position_bias):
        score = (query + content_bias[:, None]) @ key.transpose(-1, -2) + bias(query, position, position_bias)
        score = (score * query.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
        return score.softmax(-1) @ value

    return attention


def _sdpa(case: Case) -> Callable[..., Tensor]:
    """Position scores materialised as the additive mask of scaled_dot_product_attention (NeMo's fast path)."""
    _fits(case)
    visible, bias = _visible(case), _bias(case)

    def attention(query, key, value, position, content_bias, position_bias):
        mask = bias(query, position, position_bias) * query.shape[-1] ** -0.5
        mask = mask.masked_fill(~visible, float("-inf"))
        return F.scaled_dot_product_attention(query + content_bias[:, None], key, value, attn_mask=mask)

    return attention


def _offsets(case: Case) -> tuple[int, int]:
    """Bounds on query - key over the visible pairs."""
    frames = case.inputs["query"].shape[2]
    chunk, left, right = (case.inputs[name] for name in ("chunk_size", "left_context", "right_context"))
    if chunk is None:
        return 1 - frames, frames - 1
    return max(1 - chunk - right, 1 - frames), min(chunk - 1 + left, frames - 1)


def _flex(positions: bool) -> Callable[[Case], Callable[..., Tensor]]:
    """Block mask for the chunks; position scores of the window alone, (B, H, T, W), read by a score_mod."""

    def build(case: Case) -> Callable[..., Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if case.device.type == "cpu":
            raise Skip("FlexAttention has no backward on CPUs")
        if positions and case.inputs["chunk_size"] is None:
            _fits(case)
        frames, (lowest, highest) = case.inputs["query"].shape[2], _offsets(case)
        visible = _visible(case)
        blocks = create_block_mask(
            lambda b, h, i, j: visible[i, j], None, None, frames, frames, device=str(case.device)
        )
        first, width = frames - 1 + lowest, highest - lowest + 1

        def attention(query, key, value, position, content_bias, position_bias):
            if not positions:
                return flex_attention(query, key, value, block_mask=blocks)
            table = position[:, first : first + width]
            band = (query + position_bias[:, None]) @ table.transpose(-1, -2) * query.shape[-1] ** -0.5

            def add_position(score, b, h, i, j):
                return score + band[b, h, i, (i - j - lowest).clamp(0, width - 1)]

            return flex_attention(query + content_bias[:, None], key, value, score_mod=add_position, block_mask=blocks)

        return torch.compile(attention, fullgraph=True, dynamic=False)

    return build


def _sdpa_alone(case: Case) -> Callable[..., Tensor]:
    """cuDNN's attention with the chunks as a mask and nothing else: less than the operation does."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    visible = _visible(case)

    def attention(query, key, value, position, content_bias, position_bias):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    return attention


def _call(build: Callable[[Case], Callable[..., Tensor]]) -> Callable[[Case], Callable[[], Tensor]]:
    def prepare(case: Case) -> Callable[[], Tensor]:
        function = build(case)
        return lambda: function(*_attention_inputs(case).values())

    return prepare


PROVIDERS = [
    *bestrq2_providers(OP, _ours),
    Provider(BASELINE, _call(_transformer_xl)),
    Provider("torch.compile", _call(lambda case: compiled(_transformer_xl(case))), note="of the materialised form"),
    Provider("SDPA + position mask", _call(_sdpa)),
    Provider("FlexAttention", _call(_flex(True)), note="table limited to the window"),
    Provider("FlexAttention, no positions", _call(_flex(False)), on=("cuda",), floor=True, note="without positions"),
    Provider("cuDNN, no positions", _call(_sdpa_alone), on=("cuda",), floor=True, note="mask alone, no positions"),
]
