"""``ops.masked_cross_entropy`` near the limits of a dtype: fp16 sums, odd weights, -inf, large logits."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import BACKENDS, make, usable

from bestrq2 import ops


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    return usable(request, device)


def test_fp16_weight_gradient_of_many_equal_rows(backend, device):
    """The sum over rows exceeds the range of fp16, the mean does not."""
    rows = 256
    hidden, weight, targets, bias, *_ = make((rows,), 40, 64, torch.float16, device)
    hidden[:, 0] += 640
    weight[:, 0] = 0  # whatever its size, this feature moves no logit
    targets[: rows // 2] = 7
    leaves = [x.requires_grad_() for x in (weight, bias)]
    loss = ops.masked_cross_entropy(hidden, weight, targets, bias=bias, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    gold_leaves = [x.detach().double().requires_grad_() for x in leaves]
    logits = F.linear(hidden.double(), *gold_leaves)
    gold = torch.autograd.grad(F.cross_entropy(logits, targets), gold_leaves)
    assert gold[0].abs().max() * rows > torch.finfo(torch.float16).max
    for grad, gold_grad in zip(grads, gold):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad.double(), gold_grad, rtol=5e-3, atol=2e-3)


@pytest.mark.parametrize("weight_of_rows", [1e-8, 1e-4, 1e5])
def test_fp16_mean_ignores_a_common_row_weight(backend, device, weight_of_rows):
    hidden, weight, targets, bias, *_ = make((64,), 32, 203, torch.float16, device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def grads(mask):
        loss = ops.masked_cross_entropy(hidden, weight, targets, bias=bias, mask=mask, backend=backend)
        return torch.autograd.grad(loss, leaves)

    plain = grads(torch.ones(64, device=device))
    for grad, base in zip(grads(torch.full((64,), weight_of_rows, device=device)), plain):
        torch.testing.assert_close(grad, base, rtol=2e-3, atol=1e-6)


def test_a_class_excluded_by_the_bias(backend, device):
    hidden, weight, targets, bias, *_ = make((50,), 32, 130, device=device)
    bias[10:] = -torch.inf
    loss = ops.masked_cross_entropy(hidden, weight, targets % 10, bias=bias, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias), targets % 10))


def test_large_logits_keep_small_differences(backend, device):
    """Logits of 1e4 that differ by 1, all exact in fp32."""
    hidden = torch.tensor([[1e4, 1.0]], device=device)
    weight = torch.tensor([[1.0, 0], [1, 0], [1, -1], [0, 1]], device=device, requires_grad=True)
    targets = torch.tensor([2], device=device)
    loss = ops.masked_cross_entropy(hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss, weight)
    exact = weight.detach().double().requires_grad_()
    gold = F.cross_entropy(F.linear(hidden.double(), exact), targets)
    (gold_grad,) = torch.autograd.grad(gold, exact)
    torch.testing.assert_close(loss.double(), gold, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), gold_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("recompute", [None, True])
@pytest.mark.parametrize("weight_of_row", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_reaches_the_loss_and_only_its_row(
    backend, device, weight_of_row, recompute, dtype
):
    hidden, weight, targets, bias, *_ = make((8,), 16, 40, dtype, device)
    mask = torch.tensor([1, 1, 0, 2, 1, weight_of_row, 1, 0.5], device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    expected = mask.isfinite()

    def run(reduction, **options):
        return ops.masked_cross_entropy(
            hidden, weight, targets, mask=mask, bias=bias, reduction=reduction, backend=backend, **options
        )

    total, accuracy = run("sum", recompute=recompute, return_accuracy=True)
    assert total.isnan() if math.isnan(weight_of_row) else total == math.inf
    assert accuracy.isnan()
    grad_hidden, *others = torch.autograd.grad(total, leaves)
    losses = run("none")
    assert torch.equal(losses.isfinite(), expected)
    assert torch.equal(grad_hidden.isfinite().all(1), expected)
    assert not any(grad.isfinite().all() for grad in others)
    with torch.no_grad():
        torch.testing.assert_close(run("none"), losses, equal_nan=True, rtol=1e-2, atol=1e-2)


def test_an_upstream_gradient_that_is_not_finite_reaches_only_rows_that_count(backend, device):
    """GradScaler looks for infinities: those of a row that counts must arrive, those of another must not."""
    for dtype in (torch.float32, torch.float16):
        hidden, weight, targets, bias, *_ = make((8,), 16, 40, dtype, device)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        for bad in (math.nan, math.inf):
            upstream = torch.ones(8, device=device).index_fill(0, torch.tensor(2, device=device), bad)
            for counts in (True, False):
                mask = torch.arange(8, device=device) != (5 if counts else 2)
                options = {"mask": mask, "bias": bias, "reduction": "none", "backend": backend}
                losses = ops.masked_cross_entropy(hidden, weight, targets, **options)
                grad_hidden, *others = torch.autograd.grad(losses, leaves, upstream)
                assert [row for row in range(8) if not grad_hidden[row].isfinite().all()] == [2] * counts
                assert all(bool(grad.isfinite().all()) != counts for grad in others)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_weights_without_a_mean(backend, device, bad, monkeypatch):
    """An error where the values can be read, else NaN in the loss and in every gradient: never a plausible number."""
    hidden, weight, targets, bias, *_ = make((4,), 16, 40, device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    mask = torch.tensor([1.0, bad, 0, 0], device=device)  # -1: the sum is zero, as if nothing were masked

    def run():
        return ops.masked_cross_entropy(hidden, weight, targets, mask=mask, bias=bias, backend=backend)

    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"row weights of a mean must be >= 0 and finite, got {bad} in row 1"):
            run()
        monkeypatch.setattr(
            importlib.import_module("bestrq2.ops.masked_cross_entropy.operator"), "check_rows", lambda *a, **k: 0
        )
    loss = run()
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, leaves))
    assert ops.reference.masked_cross_entropy(hidden, weight, targets, mask=mask, bias=bias)[0].isnan()


def test_meta_tensors():
    hidden, weight, targets, *_ = (x.to("meta") for x in make())
    assert ops.masked_cross_entropy(hidden, weight, targets, reduction="none").shape == targets.shape
