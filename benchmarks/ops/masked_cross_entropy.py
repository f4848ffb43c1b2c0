"""``masked_cross_entropy``: linear classifier and cross-entropy with gradients of both inputs, against its peers.

Shape labels: ``<rows>x<features>-><classes>``, all rows masked; ``<masked>of<rows>x<features>-><classes>`` with a mask;
``x<codebooks>`` at the end for several codebooks: one classifier each on the same rows, mean of the losses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Provider, Skip, Work, bestrq2_providers, compiled, first, gold_of, seeded
from bestrq2 import ops
from bestrq2.ops import reference

OP = "masked_cross_entropy"
BASELINE = "eager"

_REFERENCE = "16384x768->8192"  # the base model: predictions of a large batch
_BASE = "4096x768->8192"
_SPEECHBRAIN = "4096x576->8192"
_NEMO = "4096x512->8192"
_NEMO_LARGE = "2048x1024->8192"
_SMALL_CODEBOOK = "8192x512->1024"
_MULTI_CODEBOOK = "4096x768->1024x16"  # several classifiers: the gradients of all losses wait for the backward
_HALF = "8192of16384x768->8192"
_MASKED = "2048of4096x768->8192"  # one-stage BEST-RQ: the masked half of all frames

SHAPES = {
    "cpu": (_BASE, "1024x768->8192", _MASKED, _SPEECHBRAIN, _NEMO, _NEMO_LARGE, _SMALL_CODEBOOK, _MULTI_CODEBOOK),
    "cuda": (
        *(_REFERENCE, "32768x768->8192", _HALF, "3277of16384x768->8192", _SPEECHBRAIN, _NEMO_LARGE, "65536x512->1024"),
        "16384x768->8192x16",
    ),
}
QUICK_SHAPES = ("512of1024x576->8192",)
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}

RECOMPUTE = "bestrq2 recompute"
TUNING = {
    "softmax_gradient": ("4096x768->32768", "bfloat16"),  # rows that fit no block; the others take .../whole
    **{f"{kernel}/16": (_HALF, "bfloat16") for kernel in ("logits", "hidden_gradient", "weight_gradient")},
    **{f"{kernel}/32": (_MASKED, "float32") for kernel in ("logits", "hidden_gradient", "weight_gradient")},
    "loss/16": (_REFERENCE, "bfloat16", RECOMPUTE),
    "loss/32": (_BASE, "float32", RECOMPUTE),
}
"""Where a kernel is tuned: shape, dtype and, unless it is ``bestrq2[triton]``, the provider that runs it."""


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Gaussian rows and classes with logits of unit variance, as at the start of training."""
    match = re.fullmatch(r"(?:(\d+)of)?(\d+)x(\d+)->(\d+)(?:x(\d+))?", shape)
    if not match:
        raise ValueError(f"{OP}: a shape reads like {_REFERENCE}, {_MASKED} or {_MULTI_CODEBOOK}, got {shape!r}")
    rows, features, classes = (int(number) for number in match.groups()[1:4])
    books = int(match[5] or 1)
    masked = int(match[1]) if match[1] else rows
    generator = torch.Generator().manual_seed(2)
    mask = None
    if match[1]:
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[torch.randperm(rows, generator=generator)[:masked]] = True
        mask = mask.to(device)
    hidden = seeded(rows, features, dtype=dtype, device=device).requires_grad_()
    weight = (
        (seeded(books, classes, features, dtype=torch.float32, device=device, seed=1) / features**0.5)
        .to(dtype)
        .requires_grad_()
    )
    product = 2.0 * masked * features * classes * books
    size = hidden.element_size()
    arithmetic = str(dtype).removeprefix("torch.")
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs={
            "hidden": hidden,
            "weight": weight,
            "targets": torch.randint(classes, (rows, books), generator=generator).to(device),
            "mask": mask,
        },
        differentiable=("hidden", "weight"),
        work=Work(
            flops=product,
            bytes=size * (masked + books * classes) * features,
            arithmetic=arithmetic,
            elementwise=float(masked) * classes * books,
        ),
        backward_work=Work(
            flops=2 * product, bytes=2.0 * size * (masked + books * classes) * features, arithmetic=arithmetic
        ),
        gold=lambda case: gold_of(case, partial(_mean_over_books, reference.masked_cross_entropy)),
    )


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _mean_over_books(
    loss: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> Tensor:
    """Mean of the losses of the codebooks, which peers compute one by one: weight (G, V, D), targets (rows, G)."""
    losses = [first(loss(hidden, w, t, **options)) for w, t in zip(weight, targets.unbind(1))]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _ours(case: Case, backend: Any, recompute: bool | None = None) -> Tensor:
    return first(ops.masked_cross_entropy(**case.inputs, backend=backend, recompute=recompute))


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _on_masked_rows(loss: Loss) -> Callable[[Case], Callable[[], Tensor]]:
    """Gather the masked rows as a user does, inside the timed call, then call ``loss`` for every codebook."""

    def prepare(case: Case) -> Callable[[], Tensor]:
        hidden, weight, targets, mask = (case.inputs[name] for name in ("hidden", "weight", "targets", "mask"))

        def call() -> Tensor:
            if mask is None:
                return _mean_over_books(loss, hidden, weight, targets)
            return _mean_over_books(loss, hidden[mask], weight, targets[mask])

        return call

    return prepare


def _linear_cross_entropy(chunked: bool) -> Callable[[Case], Callable[[], Any]]:
    def prepare(case: Case) -> Callable[[], Any]:
        if not hasattr(F, "linear_cross_entropy"):
            raise Skip(f"needs torch >= 2.13, this is {torch.__version__}")
        if not chunked:
            return _on_masked_rows(F.linear_cross_entropy)(case)
        options = torch.nn.LinearCrossEntropyOptions
        return _on_masked_rows(lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options()))(case)

    return prepare


def _liger(accumulator: torch.dtype | None) -> Callable[[Case], Callable[[], Any]]:
    def prepare(case: Case) -> Callable[[], Any]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

        return _on_masked_rows(lambda h, w, t: first(loss(h, w, t, accum_dtype=accumulator)))(case)

    return prepare


def _cut_cross_entropy(impl: str) -> Callable[[Case], Callable[[], Any]]:
    def prepare(case: Case) -> Callable[[], Any]:
        from cut_cross_entropy import linear_cross_entropy

        return _on_masked_rows(lambda h, w, t: linear_cross_entropy(h, w, t, impl=impl))(case)

    return prepare


def _quack(case: Case) -> Callable[[], Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return _on_masked_rows(lambda h, w, t: chunked_linear_cross_entropy(h, w, t))(case)


PROVIDERS = [
    *bestrq2_providers(OP, _ours),
    Provider(RECOMPUTE, lambda case: lambda: _ours(case, None, recompute=True), note="nothing kept for the backward"),
    Provider(BASELINE, _on_masked_rows(_eager), note="logits in the dtype of the inputs, loss in fp32"),
    Provider("torch.compile", lambda case: _on_masked_rows(compiled(_eager))(case)),
    Provider("F.linear_cross_entropy", _linear_cross_entropy(False)),
    Provider("F.linear_cross_entropy chunked", _linear_cross_entropy(True)),
    Provider("liger-kernel", _liger(None), needs="liger_kernel", on=("cuda",), note="weight gradient in its own dtype"),
    Provider("liger-kernel fp32", _liger(torch.float32), needs="liger_kernel", on=("cuda",), note="summed in fp32"),
    Provider("cut-cross-entropy exact", _cut_cross_entropy("cce_exact"), needs="cut_cross_entropy", on=("cuda",)),
    Provider("cut-cross-entropy", _cut_cross_entropy("cce"), needs="cut_cross_entropy", on=("cuda",)),
    Provider("quack-kernels", _quack, needs="quack", on=("cuda",)),
]
