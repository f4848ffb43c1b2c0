"""Contract of ``ops.masked_cross_entropy`` on every backend this machine can run, against the float64 reference."""

import functools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than_torch, assert_term_matters
from cross_entropy_cases import BACKENDS, FULL, grads_of, make, plain, usable

from bestrq2 import ops
from bestrq2.ops import reference
from bestrq2.ops.common import native
from bestrq2.ops.masked_cross_entropy import cpu as masked_cross_entropy_cpu


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    return usable(request, device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", ["none", "bool", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_no_worse_than_torch(backend, device, dtype, weights, reduction):
    hidden, weight, targets, bias, mask, row_weights = make(dtype=dtype, device=device)
    mask = {"none": None, "bool": mask, "float": row_weights}[weights]
    given = torch.ones_like(row_weights) if mask is None else mask.to(row_weights)

    def ours(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, reduction=reduction, backend=backend, **FULL)

    def torchs(h, w, b):
        return plain(h, w, targets, b, given.to(h.dtype) if h.dtype == torch.float64 else given, reduction, **FULL)

    gold, gold_grads = grads_of(torchs, [x.double() for x in (hidden, weight, bias)])
    value, grads = grads_of(ours, (hidden, weight, bias))
    base, base_grads = grads_of(torchs, (hidden, weight, bias))
    assert value.dtype == torch.float32
    assert_no_worse_than_torch("loss", value, base.float(), gold)
    for name, grad, base_grad, gold_grad in zip(("hidden", "weight", "bias"), grads, base_grads, gold_grads):
        assert grad.dtype == dtype
        assert_no_worse_than_torch(f"grad {name}", grad, base_grad, gold_grad)


@pytest.mark.parametrize("term", ["bias", "mask", "row weights", "label_smoothing", "z_loss"])
def test_every_term_matters(backend, device, term):
    hidden, weight, targets, bias, mask, row_weights = make(device=device)
    options = dict(bias=bias, mask=row_weights, backend=backend, **FULL)
    without = {
        "bias": {"bias": None},
        "mask": {"mask": None},
        "row weights": {"mask": mask},
        "label_smoothing": {"label_smoothing": 0.0},
        "z_loss": {"z_loss": 0.0},
    }[term]

    def run(options, h, w):
        return ops.masked_cross_entropy(h, w, targets, **options)

    gold, grads = grads_of(functools.partial(run, options), (hidden, weight))
    value, other_grads = grads_of(functools.partial(run, {**options, **without}), (hidden, weight))
    assert_term_matters(f"{term} in the loss", gold, value, torch.float32)
    for name, grad, other in zip(("hidden", "weight"), grads, other_grads):
        assert_term_matters(f"{term} in grad {name}", grad, other, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 2, 127, 601])
@pytest.mark.parametrize(("features", "classes"), [(1, 1), (7, 2), (13, 1021), (64, 17)])
def test_odd_shapes(backend, device, rows, features, classes, reduction):
    hidden, weight, targets, bias, _, row_weights = make((rows,), features, classes, device=device)

    def ours(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=row_weights, reduction=reduction, backend=backend)

    def gold(h, w, b):
        return reference.masked_cross_entropy(h, w, targets, bias=b, mask=row_weights, reduction=reduction)[0]

    value, grads = grads_of(ours, (hidden, weight, bias))
    gold_value, gold_grads = grads_of(gold, (hidden.double(), weight.double(), bias.double()))
    torch.testing.assert_close(value.double(), gold_value, rtol=1e-5, atol=1e-5)
    for grad, gold_grad in zip(grads, gold_grads):
        torch.testing.assert_close(grad.double(), gold_grad, rtol=1e-4, atol=1e-5 * max(1, rows))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_masked_is_exactly_zero(backend, device, reduction):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    hidden.fill_(float("nan"))
    for nothing in (mask & False, (mask & False).float()):

        def ours(h, w, b, nothing=nothing):
            loss, accuracy = ops.masked_cross_entropy(
                h, w, targets, bias=b, mask=nothing, reduction=reduction, return_accuracy=True, backend=backend
            )
            assert accuracy == 0
            return loss

        value, grads = grads_of(ours, (hidden, weight, bias))
        assert (value == 0).all()
        assert all((grad == 0).all() for grad in grads)


def test_rows_that_do_not_count_are_ignored(backend, device):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    hidden, targets = hidden.masked_fill(~mask.unsqueeze(-1), float("nan")), targets.masked_fill(~mask, -1)
    targets[~mask & (torch.rand(mask.shape, device=device) < 0.5)] = 10**12
    clean = hidden.nan_to_num(), weight, bias

    def run(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, backend=backend)

    value, grads = grads_of(run, (hidden, weight, bias))
    clean_value, clean_grads = grads_of(run, clean)
    assert torch.equal(value, clean_value)
    assert all(torch.equal(a, b) for a, b in zip(grads, clean_grads))
    assert (grads[0][~mask] == 0).all()
    assert (grads[0][mask] != 0).any(-1).all()


def test_one_masked_row(backend, device):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    mask = torch.zeros_like(mask)
    mask[1, 7] = True
    loss, accuracy = ops.masked_cross_entropy(
        hidden, weight, targets, bias=bias, mask=mask, return_accuracy=True, backend=backend
    )
    logits = F.linear(hidden[1, 7], weight, bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets[1, 7]))
    assert accuracy == (logits.argmax() == targets[1, 7])


def test_accuracy_is_weighted_and_detached(backend, device):
    hidden, weight, targets, bias, mask, row_weights = make(device=device, scale=6.0)
    best = F.linear(hidden, weight, bias).argmax(-1)
    targets = torch.where(torch.rand(targets.shape, device=device) < 0.5, best, targets)
    correct = (best == targets).float()
    for given in (None, mask, row_weights):
        weights = torch.ones_like(row_weights) if given is None else given.float()
        _, accuracy = ops.masked_cross_entropy(
            hidden, weight.requires_grad_(), targets, bias=bias, mask=given, return_accuracy=True, backend=backend
        )
        assert not accuracy.requires_grad
        torch.testing.assert_close(accuracy, (correct * weights).sum() / weights.sum())
        assert 0.2 < accuracy < 0.8


def test_accuracy_counts_only_the_first_of_equal_logits(backend, device):
    hidden = torch.ones(4, 1, device=device)
    weight = torch.ones(40, 1, device=device)
    _, accuracy = ops.masked_cross_entropy(
        hidden, weight, torch.tensor([0, 1, 20, 39], device=device), return_accuracy=True, backend=backend
    )
    assert accuracy == 0.25


def test_non_contiguous_inputs(backend, device):
    hidden, weight, targets, bias, mask, _ = make(device=device)

    def run(h, w, b, targets=targets, mask=mask):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, reduction="none", backend=backend)

    expected, expected_grads = grads_of(run, (hidden, weight, bias))
    strided = (
        hidden.transpose(0, 2).contiguous().transpose(0, 2),
        weight.T.contiguous().T,
        torch.stack((bias, bias), 1)[:, 0],
    )
    targets, mask = targets.T.contiguous().T, torch.stack((mask, ~mask), -1)[..., 0]
    assert not any(x.is_contiguous() for x in (*strided, targets, mask))
    value, grads = grads_of(functools.partial(run, targets=targets, mask=mask), strided)
    torch.testing.assert_close(value, expected)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad)


def test_fp16_gradients_survive_many_rows(backend, device):
    """Divided by 20000 rows before the products, the gradient of a row would leave the range of fp16."""
    hidden, weight, targets, *_ = make((20000,), 8, 64, torch.float16, device, scale=0.05)
    hidden.requires_grad_()
    loss = ops.masked_cross_entropy(hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss * 65536, hidden)
    exact = hidden.detach().double().requires_grad_()
    (gold,) = torch.autograd.grad(65536 * F.cross_entropy(exact @ weight.double().T, targets), exact)
    torch.testing.assert_close(grad.double(), gold, rtol=2e-2, atol=2e-3 * gold.abs().max().item())


@pytest.fixture
def no_bf16_instructions():
    if native.extension_obstacle() is not None:
        pytest.skip("needs the C++ extension")
    native.extension().limit_bf16_dot("none")
    yield
    native.extension().limit_bf16_dot("amx")


@pytest.mark.parametrize("products", ["library", "own"])
def test_without_bf16_instructions_products_are_those_of_fp32(products, no_bf16_instructions, monkeypatch):
    """Gradients of 64 chunks under autocast and of bf16 leaves: rounding one product would show a hundredfold."""
    hidden, weight, targets, bias, *_ = make((1024,), 40, 203)
    monkeypatch.setattr(masked_cross_entropy_cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(masked_cross_entropy_cpu, "MIN_CHUNK_ROWS", 16)
    if products == "library":
        monkeypatch.setattr(masked_cross_entropy_cpu, "is_fused", lambda dtype, features: False)

    def gradients(*leaves, dtype=torch.float32):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        loss = ops.masked_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], backend="cpu")
        return torch.autograd.grad(loss, leaves)

    def errors(found, gold):
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, gold)]

    def exact(*leaves):
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        loss = F.cross_entropy(leaves[0] @ leaves[1].T + leaves[2], targets)
        return torch.autograd.grad(loss, leaves)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(hidden, weight, bias)
    assert max(errors(found, exact(hidden, weight, bias))) < 2e-6
    rounded = [leaf.bfloat16() for leaf in (hidden, weight, bias)]
    found, gold = gradients(*rounded, dtype=torch.bfloat16), exact(*rounded)
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert max(errors(found, [x.bfloat16().double() for x in gold])) < 1e-3  # now and then rounded to the other side


def test_gradcheck_reference():
    hidden, weight, targets, bias, _, row_weights = make((2, 3), 4, 7, torch.float64)
    row_weights[0, 0] = 0.7
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    for reduction in ("mean", "sum", "none"):

        def run(h, w, b, reduction=reduction):
            return reference.masked_cross_entropy(
                h, w, targets, bias=b, mask=row_weights.double(), reduction=reduction, **FULL
            )[0]

        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_public(reduction):
    hidden, weight, targets, bias, _, row_weights = make((2, 3), 4, 7, torch.float64)
    row_weights[0, 0] = 0.7
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run(h, w, b):
        return ops.masked_cross_entropy(
            h, w, targets, bias=b, mask=row_weights.double(), reduction=reduction, backend="reference", **FULL
        )

    assert torch.autograd.gradcheck(run, leaves)
    assert run(*leaves).dtype == torch.float64


def test_matches_cross_entropy_of_torch():
    """The reference itself against F.cross_entropy, whose smoothing formula it states."""
    hidden, weight, targets, bias, mask, _ = make(dtype=torch.float64)
    ours, accuracy = reference.masked_cross_entropy(hidden, weight, targets, mask=mask, bias=bias, label_smoothing=0.1)
    logits = F.linear(hidden[mask], weight, bias)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets[mask], label_smoothing=0.1))
    torch.testing.assert_close(accuracy, (logits.argmax(-1) == targets[mask]).double().mean())
