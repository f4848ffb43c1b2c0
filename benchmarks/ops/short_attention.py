"""``short_attention``: softmax attention over few keys, against PyTorch's attention kernels and stored scores.

Every provider takes queries, keys and values as one linear layer gives them, ``qkv (B, N, 3, H, d)``, and its gradient
is that of qkv: what PyTorch's kernels need to join three gradients is in their time, as in a training step.

Shape labels: ``B<clips>H<heads>N<tokens>d<head size>``; with ``-ragged`` the clips have 1/4, 2/4, 3/4 and all of the
tokens in turn, and outputs of padding count as zero. The kernel runs in layers (bestrq2/layers/attention.py), so it is
none of ``bestrq2.ops``; its formula is in bestrq2/layers/short_attention.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Provider, Skip, Work, compiled, gold_of, seeded
from bestrq2.layers.padding import length_mask

OP = "short_attention"
BASELINE = "stored scores"

_BASE = "B256H12N64d64"  # tokens of base that are seen, 10 s, half masked: the encoder of the published recipe
_PREDICTOR = "B256H12N128d64"  # all tokens of it
SHAPES = {
    "cpu": ("B32H3N100d64", "B8H12N128d64", "B8H12N64d64", "B8H12N128d64-ragged"),
    "cuda": (_BASE, _PREDICTOR, "B256H12N32d64", "B256H12N128d64-ragged", "B256H6N128d128", "B256H8N100d72"),
}
QUICK_SHAPES = ("B8H3N64d64",)
DTYPES = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16")}
TUNING = {
    f"{kernel}/{dim}/{tokens}": (f"B256H{768 // dim}N{tokens}d{dim}", "bfloat16")
    for kernel in ("forward", "backward")
    for dim in (64, 128)
    for tokens in (16, 32, 64, 128)
}
SPREAD = 1.5  # of queries, keys and values: scores are not all alike


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    match = re.fullmatch(r"B(\d+)H(\d+)N(\d+)d(\d+)(-ragged)?", shape)
    if not match:
        raise ValueError(f"short_attention: a shape reads like {_BASE} or {SHAPES['cuda'][3]}, got {shape!r}")
    clips, heads, tokens, dim = (int(number) for number in match.groups()[:4])
    lengths = None
    if match[5]:
        lengths = (torch.arange(clips) % 4 + 1) * tokens // 4
        lengths = lengths.clamp(1).to(device)
    of_clip = torch.full((clips,), tokens) if lengths is None else lengths.cpu()
    product = 2.0 * float((of_clip.double() ** 2).sum()) * heads * dim
    tensor = float(of_clip.sum()) * heads * dim * dtype.itemsize
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs={
            "qkv": seeded(clips, tokens, 3, heads, dim, dtype=dtype, device=device, scale=SPREAD).requires_grad_(),
            "lengths": lengths,
        },
        differentiable=("qkv",),
        upstream=seeded(clips, heads, tokens, dim, dtype=dtype, device=device, seed=1),
        # Queries, keys and values read, the output written; those and its gradient read, three gradients written.
        work=Work(flops=2 * product, bytes=4 * tensor, arithmetic=str(dtype).removeprefix("torch.")),
        backward_work=Work(flops=5 * product, bytes=7 * tensor, arithmetic=str(dtype).removeprefix("torch.")),
        gold=lambda case: gold_of(case, _stored_scores),
    )


def _valid(qkv: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Valid tokens ``(B, 1, 1, N)``."""
    if lengths is None:
        return None
    return length_mask(lengths, qkv.shape[1], qkv.device)[:, None, None]


def _frames(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _without_padding(out: Tensor, valid: Tensor | None) -> Tensor:
    return out if valid is None else out.masked_fill(~valid.mT, 0.0)


def _stored_scores(qkv: Tensor, lengths: Tensor | None) -> Tensor:
    """The formula, ``(B, H, N, d)``."""
    query, key, value = _frames(qkv)
    valid = _valid(qkv, lengths)
    scores = query @ key.mT * qkv.shape[-1] ** -0.5
    if valid is not None:
        scores = scores.masked_fill(~valid, float("-inf"))
    return _without_padding(scores.softmax(-1) @ value, valid)


def _sdpa(qkv: Tensor, lengths: Tensor | None) -> Tensor:
    query, key, value = _frames(qkv)
    valid = _valid(qkv, lengths)
    return _without_padding(F.scaled_dot_product_attention(query, key, value, attn_mask=valid), valid)


def _by(function: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Case], Callable[[], Tensor]]:
    return lambda case: lambda: function(case.inputs["qkv"], case.inputs["lengths"])


def _only(backend: str) -> Callable[[Case], Callable[[], Tensor]]:
    """PyTorch's attention with one of its kernels."""

    def build(case: Case) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.inputs["lengths"] is not None and backend == "FLASH_ATTENTION":
            raise Skip("flash attention takes no mask")
        chosen = getattr(SDPBackend, backend)

        def call() -> Tensor:
            with sdpa_kernel(chosen):
                return _sdpa(case.inputs["qkv"], case.inputs["lengths"])

        return call

    return build


def _layer(case: Case) -> Callable[[], Tensor]:
    """Attention as a layer runs it here, by the rule of bestrq2/layers/attention.py."""
    from bestrq2.layers.attention import self_attend

    # On CPUs outputs of padding are undefined: they count as zero for everybody.
    valid = _valid(case.inputs["qkv"], case.inputs["lengths"]) if case.device.type == "cpu" else None
    return lambda: _without_padding(self_attend(case.inputs["qkv"], case.inputs["lengths"]), valid)


def _triton(case: Case) -> Callable[[], Tensor]:
    from bestrq2.layers.short_attention import runs_kernels, short_self_attention

    if not runs_kernels(case.inputs["qkv"]):
        raise Skip("its kernels take bf16 and fp16, on an NVIDIA GPU or in Triton's interpreter")
    return lambda: short_self_attention(case.inputs["qkv"], case.inputs["lengths"])


def _graph(case: Case) -> Callable[[], Tensor]:
    from benchmarks.graphs import captured

    return captured(case, _triton(case))


def _flex(case: Case) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    qkv, lengths = case.inputs["qkv"], case.inputs["lengths"]
    clips, tokens = qkv.shape[:2]
    blocks = None
    if lengths is not None:
        blocks = create_block_mask(
            lambda b, h, i, j: (i < lengths[b]) & (j < lengths[b]), clips, None, tokens, tokens, device=str(case.device)
        )

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = _frames(qkv)
        return flex_attention(query, key, value, block_mask=blocks)

    run = torch.compile(attention, fullgraph=True, dynamic=False)
    return lambda: run(qkv)


def _compiled(case: Case) -> Callable[[], Tensor]:
    run = compiled(_stored_scores)
    return lambda: run(case.inputs["qkv"], case.inputs["lengths"])


PROVIDERS = [
    Provider("bestrq2", _layer),
    Provider("bestrq2[triton]", _triton),
    Provider("SDPA, cuDNN", _only("CUDNN_ATTENTION"), on=("cuda",)),
    Provider("SDPA, flash", _only("FLASH_ATTENTION")),
    Provider("SDPA, efficient", _only("EFFICIENT_ATTENTION"), on=("cuda",)),
    Provider("SDPA", _by(_sdpa), note="the kernel that PyTorch chooses"),
    Provider(BASELINE, _by(_stored_scores)),
    Provider("torch.compile", _compiled, note="of the stored scores"),
    Provider("FlexAttention", _flex, on=("cuda",)),
    Provider("bestrq2 graph", _graph, on=("cuda",), note="CUDA graphs of forward and backward"),
]
