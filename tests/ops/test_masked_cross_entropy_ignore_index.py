"""Targets that count as not masked, as in ``torch.nn.functional.cross_entropy``, and targets of other integer types."""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import BACKENDS, grads_of, make, usable

from bestrq2 import ops

IGNORED = -100


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    return usable(request, device)


def with_ignored(targets, share=0.3, value=IGNORED):
    """Some targets replaced by ``value``: the first one always, the last one never."""
    ignored = torch.rand(targets.shape, device=targets.device) < share
    ignored.view(-1)[0], ignored.view(-1)[-1] = True, False
    return torch.where(ignored, value, targets)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [IGNORED, 7], ids=["outside", "a class"])
def test_equals_pytorch(backend, device, reduction, ignore_index):
    hidden, weight, targets, bias, *_ = make(device=device)
    targets = with_ignored(targets, value=ignore_index)
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1}

    def ours(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, backend=backend, **options)

    def torchs(h, w, b):
        losses = F.cross_entropy(F.linear(h, w, b).flatten(0, -2), targets.flatten(), **options)
        return losses.reshape(targets.shape) if reduction == "none" else losses

    value, grads = grads_of(ours, (hidden, weight, bias))
    expected, expected_grads = grads_of(torchs, [x.double() for x in (hidden, weight, bias)])
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads):
        torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["no mask", "bool", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_is_a_mask(backend, device, kind, dtype):
    """Bit for bit the result of leaving the rows out by the mask, whatever they hold."""
    hidden, weight, targets, bias, mask, row_weights = make(dtype=dtype, device=device)
    given = {"no mask": None, "bool": mask, "weights": row_weights}[kind]
    targets = with_ignored(targets)
    hidden = hidden.masked_fill((targets == IGNORED).unsqueeze(-1), float("nan"))
    explicit = targets != IGNORED if given is None else torch.where(targets != IGNORED, given, 0).to(given.dtype)

    def run(targets, mask, most):
        def loss(h, w, b):
            return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, max_rows=most, backend=backend)

        accuracy = ops.masked_cross_entropy(hidden, weight, targets, mask=mask, return_accuracy=True, backend=backend)[
            1
        ]
        value, grads = grads_of(loss, (hidden, weight, bias))
        return (value, accuracy, *grads)

    ours = run(targets, given, None)
    # Without a mask nearly every row counts, so a GPU takes library products as it does with a bound.
    expected = run(targets.clamp_min(0), explicit, targets.numel() if given is None else None)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))
    assert ours[0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_codebook_of_a_row(backend, device, dtype, masked):
    """An ignored target leaves out its codebook's term alone; the mean divides by the terms that count."""
    books, hidden = 3, torch.randn(4, 15, 16, device=device).to(dtype)
    weight = torch.randn(books, 37, 16, device=device).to(dtype)
    bias = torch.randn(books, 37, device=device).to(dtype)
    bias[:, 0] = -torch.inf  # a class that is excluded: an ignored target must not stand for it
    targets = with_ignored(torch.randint(1, 37, (4, 15, books), device=device))
    targets[1, 3] = IGNORED  # a whole row
    mask = torch.rand(4, 15, device=device) if masked else None
    weights = (targets != IGNORED) * (1.0 if mask is None else mask.unsqueeze(-1))

    def ours(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, backend=backend)

    def formula(h, w, b):
        logits = torch.einsum("...d,gvd->...gv", h, w) + b
        losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return (losses.reshape(targets.shape) * weights).sum() / weights.sum()

    value, grads = grads_of(ours, (hidden, weight, bias))
    gold, gold_grads = grads_of(formula, [x.double() for x in (hidden, weight, bias)])
    tolerance = {"rtol": 3e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(value.double(), gold, **tolerance)
    for grad, gold_grad in zip(grads, gold_grads):
        torch.testing.assert_close(grad.double(), gold_grad, **tolerance)

    _, accuracy = ops.masked_cross_entropy(
        hidden, weight, targets, bias=bias, mask=mask, return_accuracy=True, backend=backend
    )
    best = (torch.einsum("...d,gvd->...gv", hidden.float(), weight.float()) + bias.float()).argmax(-1)
    hits = ((best == targets) * weights).sum((0, 1)) / weights.sum((0, 1))
    torch.testing.assert_close(
        accuracy, hits.to(accuracy.dtype), rtol=1e-5, atol=0.05 if dtype == torch.bfloat16 else 0
    )

    losses = ops.masked_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", backend=backend)
    assert losses.isfinite().all()
    assert torch.equal(losses != 0, targets != IGNORED)


@pytest.mark.parametrize("codebooks", [None, 2])
def test_nothing_but_ignored_targets(backend, device, codebooks):
    hidden = torch.full((6, 8), float("nan"), device=device)
    weight = torch.randn(*([codebooks] if codebooks else []), 9, 8, device=device)
    targets = torch.full((6, *([codebooks] if codebooks else [])), IGNORED, device=device)
    value, grads = grads_of(lambda h, w: ops.masked_cross_entropy(h, w, targets, backend=backend), (hidden, weight))
    assert value == 0
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_types_of_targets(backend, device, dtype):
    hidden, weight, targets, *_ = make(classes=100, device=device)
    expected = ops.masked_cross_entropy(hidden, weight, targets, backend=backend)
    assert torch.equal(ops.masked_cross_entropy(hidden, weight, targets.to(dtype), backend=backend), expected)
    if dtype != torch.uint8:
        ignored = with_ignored(targets)
        expected = ops.masked_cross_entropy(hidden, weight, ignored, backend=backend)
        assert torch.equal(ops.masked_cross_entropy(hidden, weight, ignored.to(dtype), backend=backend), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_and_recomputes(backend, device, reduction):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    targets = with_ignored(targets)

    def run(h, w, b):
        return ops.masked_cross_entropy(
            h, w, targets, bias=b, mask=mask, reduction=reduction, recompute=True, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    value, grads = grads_of(compiled, (hidden, weight, bias))
    expected, expected_grads = grads_of(run, (hidden, weight, bias))
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (2, 7, 4), (2, 7)))
    targets = with_ignored(torch.randint(7, (5, 2)))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: ops.masked_cross_entropy(h, w, targets, bias=b, reduction=reduction, backend="reference"),
        leaves,
    )


def test_none_ignores_nothing(device):
    hidden, weight, targets, *_ = make(device=device)
    targets[0, 0] = IGNORED
    if device.type == "cpu":
        with pytest.raises(ValueError, match="target -100 of row 0 is outside the 203 classes"):
            ops.masked_cross_entropy(hidden, weight, targets, ignore_index=None)
    else:
        assert ops.masked_cross_entropy(hidden, weight, targets, ignore_index=None).isnan()
    with pytest.raises(TypeError, match=r"ignore_index must be an integer or None, got 0\.5"):
        ops.masked_cross_entropy(hidden, weight, targets, ignore_index=0.5)
