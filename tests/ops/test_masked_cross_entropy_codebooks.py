"""Several codebooks, each with a classifier of its own, in one call of ``ops.masked_cross_entropy``."""

import pytest
import torch
from accuracy import assert_no_worse_than_torch, assert_term_matters
from cross_entropy_cases import BACKENDS, FULL, grads_of, plain, usable
from torch.library import opcheck

from bestrq2 import ops
from bestrq2.ops import reference
from bestrq2.ops.masked_cross_entropy import cpu as masked_cross_entropy_cpu
from bestrq2.ops.masked_cross_entropy import cpu_fused

G = 3


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    return usable(request, device)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu_fused, "BF16_CHUNK_ROWS", 32)
    monkeypatch.setattr(cpu_fused, "BF16_SINGLE_CHUNK_ROWS", 32)
    monkeypatch.setattr(masked_cross_entropy_cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(masked_cross_entropy_cpu, "MIN_CHUNK_ROWS", 16)


def make(shape=(3, 13), features=16, classes=37, dtype=torch.float32, device="cpu", codebooks=G):
    """hidden, weight (G, V, D), targets (..., G), bias (G, V), bool mask, row weights."""
    hidden = torch.randn(*shape, features, device=device).to(dtype)
    weight = (2 * torch.randn(codebooks, classes, features, device=device) / features**0.5).to(dtype)
    bias = torch.randn(codebooks, classes, device=device).to(dtype)
    targets = torch.randint(classes, (*shape, codebooks), device=device)
    mask = torch.rand(shape, device=device) < 0.6
    return hidden, weight, targets, bias, mask, mask * torch.rand(shape, device=device)


def plain_codebooks(hidden, weight, targets, bias, weights, reduction, **options):
    losses = [
        plain(hidden, w, targets[..., g], b, weights, reduction, **options)
        for g, (w, b) in enumerate(zip(weight, bias))
    ]
    stacked = torch.stack(losses, -1)
    return {"none": stacked, "mean": stacked.mean(), "sum": stacked.sum()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", ["none", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_no_worse_than_torch(backend, device, small_chunks, dtype, weights, reduction):
    hidden, weight, targets, bias, _, row_weights = make(dtype=dtype, device=device)
    mask = row_weights if weights == "float" else None
    given = torch.ones_like(row_weights) if mask is None else mask

    def ours(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, reduction=reduction, backend=backend, **FULL)

    def torchs(h, w, b):
        return plain_codebooks(h, w, targets, b, given.to(h) if h.dtype == torch.float64 else given, reduction, **FULL)

    leaves = (hidden, weight, bias)
    gold, gold_grads = grads_of(torchs, [x.double() for x in leaves])
    value, grads = grads_of(ours, leaves)
    base, base_grads = grads_of(torchs, leaves)
    assert_no_worse_than_torch("loss", value, base.float(), gold)
    for name, leaf, grad, base_grad, gold_grad in zip(
        ("hidden", "weight", "bias"), leaves, grads, base_grads, gold_grads
    ):
        assert (grad.dtype, grad.shape) == (dtype, leaf.shape)
        assert_no_worse_than_torch(f"grad {name}", grad, base_grad, gold_grad)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_is_the_mean_over_single_calls(backend, device, small_chunks, bound, recompute):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    most = int(mask.sum()) + 1 if bound else None
    options = dict(mask=mask, return_accuracy=True, max_rows=most, recompute=recompute, backend=backend, **FULL)
    accuracies = []

    def together(h, w, b):
        loss, accuracy = ops.masked_cross_entropy(h, w, targets, bias=b, **options)
        accuracies.append(accuracy)
        return loss

    def one_by_one(h, w, b):
        pairs = [ops.masked_cross_entropy(h, w[g], targets[..., g], bias=b[g], **options) for g in range(G)]
        accuracies.append(torch.stack([accuracy for _, accuracy in pairs]))
        return torch.stack([loss for loss, _ in pairs]).mean()

    torch.testing.assert_close(grads_of(together, (hidden, weight, bias)), grads_of(one_by_one, (hidden, weight, bias)))
    assert accuracies[0].shape == (G,)
    torch.testing.assert_close(*accuracies)
    gold = reference.masked_cross_entropy(hidden, weight, targets, mask=mask, bias=bias, **FULL)
    torch.testing.assert_close(accuracies[0], gold[1])


def test_every_codebook_matters(backend, device):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    for g in range(G):
        other = targets.clone()
        other[..., g] = (other[..., g] + 1) % weight.shape[1]
        values = [
            grads_of(
                lambda h, w, t=t: ops.masked_cross_entropy(h, w, t, mask=mask, bias=bias, backend=backend),
                (hidden, weight),
            )
            for t in (targets, other)
        ]
        (loss, (of_hidden, of_weight)), (other_loss, (of_other_hidden, of_other_weight)) = values
        assert_term_matters(f"codebook {g} in the loss", loss, other_loss, torch.float32)
        assert_term_matters(f"codebook {g} in grad hidden", of_hidden, of_other_hidden, torch.float32)
        assert_term_matters(f"codebook {g} in grad weight", of_weight[g], of_other_weight[g], torch.float32)


@pytest.mark.parametrize("bound", [False, True])
def test_upstream_gradient_of_each_row_and_codebook(backend, device, bound):
    """Rows whose upstream gradient is 0 in some codebooks only, in all, and masked rows that hold NaN."""
    hidden, weight, targets, bias, mask, _ = make(device=device)
    mask[0, :4] = True
    upstream = torch.randn(targets.shape, device=device)
    upstream[0, 0], upstream[0, 1, 0], upstream[0, 2, 1:] = 0, 0, 0
    poisoned, wrong = hidden.clone(), targets.clone()
    poisoned[~mask], wrong[~mask] = float("nan"), -1

    def run(h, t, options):
        leaves = [x.detach().requires_grad_() for x in (h, weight, bias)]
        losses = ops.masked_cross_entropy(
            leaves[0], leaves[1], t, bias=leaves[2], mask=mask, reduction="none", **options
        )
        return losses.detach(), torch.autograd.grad(losses, leaves, upstream)

    ours = run(poisoned, wrong, {"backend": backend, "max_rows": int(mask.sum()) if bound else None})
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    losses, _ = reference.masked_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, reduction="none"
    )
    gold = losses.detach(), torch.autograd.grad(losses, leaves, upstream.double())
    torch.testing.assert_close(ours[0].double(), gold[0], rtol=1e-5, atol=1e-5)
    for grad, gold_grad in zip(ours[1], gold[1]):
        torch.testing.assert_close(grad.double(), gold_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("selected", ["all", "none"])
def test_few_rows(backend, device, rows, selected):
    hidden, weight, targets, bias, *_ = make((rows,), 7, 5, device=device, codebooks=2)
    mask = torch.zeros(rows, dtype=torch.bool, device=device) if selected == "none" else None

    def run(backend):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        loss, accuracy = ops.masked_cross_entropy(
            leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, return_accuracy=True, backend=backend
        )
        return loss, accuracy, *torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(run(backend), run("reference"))
    if rows == 0 or selected == "none":
        assert all(not value.any() for value in run(backend))


def test_no_rows_within_a_bound(backend, device):
    hidden, weight, targets, *_ = make((0,), 7, 5, device=device, codebooks=2)
    mask = torch.zeros(0, dtype=torch.bool, device=device)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = ops.masked_cross_entropy(*leaves, targets, mask=mask, max_rows=3, backend=backend)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaves)[1].any()


def test_hidden_gradient_is_summed_in_fp32(device):
    """In bf16 the sum over 16 codebooks is as exact as one codebook's gradient: it is rounded once."""
    backend = "triton" if device.type == "cuda" else "cpu"
    hidden, weight, targets, *_ = make((64,), 32, 103, torch.bfloat16, device, codebooks=16)

    def error(codebooks):
        def mean(h, backend):
            return ops.masked_cross_entropy(h, weight[:codebooks].to(h), targets[:, :codebooks], backend=backend)

        gold, found = hidden.double().requires_grad_(), hidden.detach().requires_grad_()
        (of_gold,) = torch.autograd.grad(mean(gold, "reference"), gold)
        (of_found,) = torch.autograd.grad(mean(found, backend), found)
        return ((of_found.double() - of_gold).norm() / of_gold.norm()).item()

    assert error(16) < 1.2 * error(1)


@pytest.mark.parametrize("mask", [False, True])
def test_opcheck(backend, device, mask):
    hidden, weight, targets, bias, _, row_weights = make((37,), device=device)
    arguments = (
        hidden, weight, targets.T, row_weights if mask else None, bias, True, True, True, True, torch.float32,
        0.1, 1e-3, -100, None, backend,
    )  # fmt: skip
    opcheck(torch.ops.bestrq2.masked_cross_entropy.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles(backend, device, reduction):
    def step(hidden, weight, targets, bias, mask):
        options = dict(bias=bias, mask=mask, reduction=reduction, backend=backend, **FULL)
        return ops.masked_cross_entropy(hidden, weight, targets, return_accuracy=True, **options)

    hidden, weight, targets, bias, mask, _ = make(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")):
        loss, accuracy = function(hidden, weight, targets, bias, mask)
        results.append((loss, accuracy, *torch.autograd.grad(loss.sum(), leaves)))
    torch.testing.assert_close(*results)


def test_errors(device):
    hidden, weight, targets, bias, *_ = make(device=device)
    call = ops.masked_cross_entropy
    with pytest.raises(ValueError, match=r"targets must be \(..., G\) = \(3, 13, 3\), got \(3, 13\)"):
        call(hidden, weight, targets[..., 0])
    with pytest.raises(ValueError, match=r"targets must be \(\.\.\.\) = \(3, 13\), got \(3, 13, 3\)"):
        call(hidden, weight[0], targets)
    with pytest.raises(ValueError, match=r"bias must be \(G, V\) = \(3, 37\), got \(37,\)"):
        call(hidden, weight, targets, bias=bias[0])
    with pytest.raises(ValueError, match=r"mask must be \(\.\.\.\) = \(3, 13\), got \(3, 13, 3\)"):
        call(hidden, weight, targets, mask=targets > 0)
    with pytest.raises(ValueError, match="at least one class"):
        call(hidden, weight[:0], targets[..., :0])
    if device.type == "cpu":
        targets[1, 2, 1] = 37
        with pytest.raises(ValueError, match="target 37 of row 15 of codebook 1 is outside the 37 classes"):
            call(hidden, weight, targets)
