"""The C++ kernels with products of their own, with every instruction set there is, and the products of a library."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than_torch, relative_error
from cross_entropy_cases import FULL, grads_of, make, plain

from bestrq2 import ops
from bestrq2.ops.common import native
from bestrq2.ops.masked_cross_entropy import cpu, cpu_fused

BF16 = torch.bfloat16
BF16_KERNELS = ["amx", "avx512_bf16"]
FP32_KERNELS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=[*BF16_KERNELS, *FP32_KERNELS, "library"], autouse=True)
def kernel(request, monkeypatch):
    if native.extension_obstacle() is not None:
        pytest.skip("needs the C++ extension")
    extension = native.extension()
    best = extension.isa()
    if request.param in BF16_KERNELS:
        extension.limit_bf16_dot(request.param)
        if extension.bf16_dot() != request.param:
            pytest.skip(f"this processor, system or compiler lacks {request.param}")
    elif request.param == "library":
        monkeypatch.setattr(cpu_fused, "FP32_INSTRUCTIONS", [])
    else:
        if not extension.force_isa(request.param):
            pytest.skip(f"this processor or compiler lacks {request.param}")
        monkeypatch.setattr(cpu_fused, "FP32_INSTRUCTIONS", FP32_KERNELS)
        monkeypatch.setattr(cpu_fused, "FP32_FEATURES", 10**6)
    yield request.param
    extension.limit_bf16_dot("amx")
    assert extension.force_isa(best)


@pytest.fixture
def dtype(kernel):
    """The dtype of the products."""
    dtype = BF16 if kernel in BF16_KERNELS else torch.float32
    assert cpu_fused.is_fused(dtype, 32) == (kernel != "library")
    return dtype


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(cpu_fused, "BF16_CHUNK_ROWS", 64)
    monkeypatch.setattr(cpu_fused, "BF16_SINGLE_CHUNK_ROWS", 64)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "MIN_CHUNK_ROWS", 64)


def run(hidden, weight, targets, bias=None, **options):
    return ops.masked_cross_entropy(hidden, weight, targets, bias=bias, backend="cpu", **options)


def assert_all_no_worse(ours, torchs, leaves):
    """Loss and gradients of ``ours`` against float64, beside those of ``torchs`` in the dtype of ``leaves``."""
    gold, gold_grads = grads_of(torchs, [x.double() for x in leaves])
    value, grads = grads_of(ours, leaves)
    base, base_grads = grads_of(torchs, leaves)
    assert_no_worse_than_torch("loss", value, base.float(), gold)
    for name, grad, base_grad, gold_grad in zip(("hidden", "weight", "bias"), grads, base_grads, gold_grads):
        assert_no_worse_than_torch(f"grad {name}", grad, base_grad, gold_grad)


# bf16: panels have 32 rows, classes or features; 16 steps are one product; 8 panels of classes or features are one
# task; 32 panels of classes are one group. fp32: panels of 8, 16 or 32 rows, tiles of 6 or 12 classes or features,
# products of 384 features or 64 classes; 8 or 16 tiles of classes are one task.
@pytest.mark.parametrize(
    ("rows", "features", "classes"),
    [
        (1, 1, 1),
        (33, 31, 65),  # one more or less than panels
        (130, 300, 97),  # 3 chunks, the last ragged; two blocks of features
        (40, 580, 40),  # products of more than 16 steps
        (50, 33, 2100),  # three groups of classes
        (600, 16, 50),  # many chunks
        (40, 800, 150),  # three products of features
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_worse_than_torch(small_chunks, dtype, rows, features, classes, reduction):
    hidden, weight, targets, bias, _, row_weights = make((rows,), features, classes, dtype)
    row_weights[0] = 0.5

    def ours(h, w, b):
        return run(h, w, targets, b, mask=row_weights, reduction=reduction, **FULL)

    def torchs(h, w, b):
        given = row_weights.to(torch.float64 if h.dtype == torch.float64 else torch.float32)
        return plain(h, w, targets, b, given, reduction, **FULL)

    assert_all_no_worse(ours, torchs, (hidden, weight, bias))


@pytest.mark.parametrize("kernel", BF16_KERNELS, indirect=True)
def test_loss_comes_from_logits_that_were_not_rounded():
    """Rounding the logits to bf16, as PyTorch does, costs the loss a thousand times its fp32 error."""
    hidden, weight, targets, bias, *_ = make((64,), 64, 1000, BF16)
    gold = F.cross_entropy(F.linear(hidden.double(), weight.double(), bias.double()), targets, reduction="none")
    rounded = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")
    with torch.no_grad():
        error = relative_error(run(hidden, weight, targets, bias, reduction="none"), gold)
    print(f"error {error:.1e}, from rounded logits {relative_error(rounded, gold):.1e}")
    assert error < 1e-6 < relative_error(rounded, gold) / 100


def test_gradient_of_confident_rows(dtype):
    """p - 1 of the target where p is nearly 1: from a p rounded to bf16 it would be an error of up to 2^-9."""
    hidden, weight, *_ = make((48,), 64, 100, dtype)
    targets = F.linear(hidden.double(), weight.double()).argmax(-1)
    weight = weight * 32

    def gold(h):
        return F.cross_entropy(F.linear(h, weight.to(h.dtype)), targets)

    exact, (gold_grad,) = grads_of(gold, [hidden.double()])
    _, (base_grad,) = grads_of(gold, [hidden])
    _, (grad,) = grads_of(lambda h: run(h, weight, targets), [hidden])
    assert exact < 0.05
    assert_no_worse_than_torch("grad hidden", grad, base_grad, gold_grad)


@pytest.mark.parametrize("kernel", BF16_KERNELS, indirect=True)
def test_fp32_weight_gradient_is_summed_in_fp32_over_chunks(small_chunks, monkeypatch):
    """16 chunks against one: the same rounded logit gradients, so only the order of fp32 additions may differ."""
    hidden, weight, targets, bias, *_ = make((1024,), 40, 203)

    def gradients():
        leaves = [x.detach().requires_grad_() for x in (weight, bias)]
        with torch.autocast("cpu", dtype=BF16):
            loss = run(hidden, leaves[0], targets, leaves[1])
        return torch.autograd.grad(loss, leaves)

    several = gradients()
    monkeypatch.setattr(cpu_fused, "BF16_SINGLE_CHUNK_ROWS", 1024)
    for name, a, b in zip(("weight", "bias"), several, gradients()):
        assert a.dtype == torch.float32
        assert not torch.equal(a, a.bfloat16().float()), "the gradient was rounded to bf16"
        assert relative_error(a, b) < 1e-6, name


@pytest.mark.parametrize("kernel", BF16_KERNELS + FP32_KERNELS, indirect=True)
@pytest.mark.parametrize("rows", [70, 300])
def test_results_do_not_depend_on_threads(small_chunks, dtype, rows):
    hidden, weight, targets, bias, mask, _ = make((rows,), 70, 1200, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(grads_of(lambda h, w, b: run(h, w, targets, b, mask=mask), (hidden, weight, bias)))
    finally:
        torch.set_num_threads(before)
    for value, grads in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1]))


def test_kernels_agree_on_accuracy_and_first_of_equal_logits(dtype):
    hidden = torch.ones(4, 1, dtype=dtype)
    for targets, expected in (([0, 1, 20, 39], 0.25), ([0, 0, 0, 99], 0.75), ([32, 64, 96, 31], 0.0)):
        _, accuracy = run(hidden, torch.ones(100, 1, dtype=dtype), torch.tensor(targets), return_accuracy=True)
        assert accuracy == expected


def test_classes_that_are_excluded_by_the_bias(dtype):
    """A bias of -inf removes a class, also all the classes of a panel, and leaves no NaN anywhere."""
    hidden, weight, targets, bias, *_ = make((50,), 32, 130, dtype)
    bias[10:100] = -torch.inf
    targets = targets % 10
    kept = [*range(10), *range(100, 130)]

    def gold(h, w, b):
        return F.cross_entropy(F.linear(h, w[kept], b[kept]), targets)

    value, grads = grads_of(lambda h, w, b: run(h, w, targets, b), (hidden, weight, bias))
    exact, exact_grads = grads_of(gold, [x.double() for x in (hidden, weight, bias)])
    _, base_grads = grads_of(gold, (hidden, weight, bias))
    assert relative_error(value, exact) < 1e-6
    for grad, base, exact_grad in zip(grads, base_grads, exact_grads):
        assert_no_worse_than_torch("grad", grad, base, exact_grad)
    assert (grads[1][10:100] == 0).all()
    assert (grads[2][10:100] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_are_not_hidden(dtype, bad):
    hidden, weight, targets, *_ = make((40,), 32, 100, dtype)
    hidden[7, 3] = bad
    losses = run(hidden, weight, targets, reduction="none")
    assert torch.isnan(losses[7])
    assert torch.isfinite(losses[torch.arange(40) != 7]).all()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_at_a_time(small_chunks, dtype, wanted):
    hidden, weight, targets, bias, mask, _ = make((150,), 40, 203, dtype)
    _, all_grads = grads_of(lambda h, w, b: run(h, w, targets, b, mask=mask), (hidden, weight, bias))
    leaves = [x.detach().requires_grad_(want) for x, want in zip((hidden, weight, bias), wanted)]
    loss = run(leaves[0], leaves[1], targets, leaves[2], mask=mask)
    loss.backward(torch.tensor(2.0))  # as in grads_of
    for leaf, want, grad in zip(leaves, wanted, all_grads):
        if want:
            assert torch.equal(leaf.grad, grad)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("kernel", BF16_KERNELS, indirect=True)
def test_chunks_are_even_and_bounded():
    """Whatever the number of rows, no more of them than the limit have their exponentials in memory at once."""
    assert cpu_fused.bf16_chunk_rows(1) == 32
    assert cpu_fused.bf16_chunk_rows(1024) == 1024
    for count in (1025, 2000, 4096, 10**6):
        step = cpu_fused.bf16_chunk_rows(count)
        assert step % 32 == 0
        assert step <= cpu_fused.BF16_CHUNK_ROWS
        assert -(-count // step) == -(-count // cpu_fused.BF16_CHUNK_ROWS)


@pytest.mark.parametrize("recompute", [False, True])
def test_several_codebooks(small_chunks, dtype, recompute):
    """Gradients of the rows are summed over codebooks chunk by chunk, whose rows are kept or packed again."""
    hidden, _, _, _, mask, _ = make((150,), 40, 50, dtype)
    problems = [make((150,), 40, 50, dtype)[1:4] for _ in range(3)]
    weight, targets, bias = (torch.stack(tensors, dim) for tensors, dim in zip(zip(*problems), (0, -1, 0)))

    def ours(h, w, b):
        return run(h, w, targets, b, mask=mask, recompute=recompute, **FULL)

    def torchs(h, w, b):
        of_each = [plain(h, w[g], targets[..., g], b[g], mask.to(h.dtype), "mean", **FULL) for g in range(3)]
        return torch.stack(of_each).mean()

    assert_all_no_worse(ours, torchs, (hidden, weight, bias))


@pytest.mark.parametrize("kernel", FP32_KERNELS, indirect=True)
def test_rows_behind_the_last_are_kept_out_of_infinite_products(dtype):
    """Panels are filled with rows of zeros, and 0 times an infinite weight is NaN."""
    hidden, weight, targets, *_ = make((3,), 5, 7, dtype)
    weight[6, 0] = -torch.inf
    targets, hidden = targets % 6, hidden.abs()
    _, (grad,) = grads_of(lambda w: run(hidden, w, targets), [weight])
    _, (expected,) = grads_of(lambda w: F.cross_entropy(F.linear(hidden, w), targets), [weight])
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(grad, expected)
