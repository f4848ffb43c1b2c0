"""Contract of ``ops.masked_cross_entropy`` on every backend this machine can run, against the float64 reference."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than_torch, assert_term_matters
from torch.library import opcheck

from bestrq2 import ops
from bestrq2.ops import native, reference

FULL = {"label_smoothing": 0.1, "z_loss": 1e-2}


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request, device):
    dtype = request.node.callspec.params.get("dtype")
    if request.param == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    try:
        problem = make(device=device, shape=(3,), features=2, classes=3)
        ops.masked_cross_entropy(*problem[:3], backend=request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param


def make(shape=(3, 41), features=32, classes=203, dtype=torch.float32, device="cpu", scale=2.0):
    """hidden, weight, targets, bias, bool mask, row weights; logits of standard deviation about ``scale``."""
    hidden = torch.randn(*shape, features, device=device).to(dtype)
    weight = (scale * torch.randn(classes, features, device=device) / features**0.5).to(dtype)
    bias = torch.randn(classes, device=device).to(dtype)
    targets = torch.randint(classes, shape, device=device)
    mask = torch.rand(shape, device=device) < 0.6
    return hidden, weight, targets, bias, mask, mask * torch.rand(shape, device=device)


def grads_of(function, tensors, upstream=None):
    """Value of ``function`` at leaves made of ``tensors``, and its gradients under a non-constant upstream gradient."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    upstream = torch.linspace(0.5, 2.0, max(loss.numel(), 2), device=loss.device)[-loss.numel() or 2 :]
    upstream = upstream[: loss.numel()].reshape(loss.shape).to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)


def plain(hidden, weight, targets, bias, weights, reduction, label_smoothing=0.0, z_loss=0.0):
    """What a PyTorch user writes: the rows are gathered, the logits are stored."""
    rows = weights.flatten().nonzero().squeeze(1)
    logits = F.linear(hidden.flatten(0, -2)[rows], weight, bias)
    losses = F.cross_entropy(logits, targets.flatten()[rows], reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(-1) ** 2
    weights = weights.flatten()[rows].to(losses.dtype)
    if reduction == "none":
        return losses.new_zeros(targets.numel()).index_put((rows,), losses * weights).reshape(targets.shape)
    return (losses * weights).sum() / (weights.sum() if reduction == "mean" else 1)


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
    mask[1, 17] = True
    loss, accuracy = ops.masked_cross_entropy(
        hidden, weight, targets, bias=bias, mask=mask, return_accuracy=True, backend=backend
    )
    logits = F.linear(hidden[1, 17], weight, bias)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets[1, 17]))
    assert accuracy == (logits.argmax() == targets[1, 17])


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_wanted_gradients_are_computed(backend, device, reduction, wanted):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    leaves = [x.requires_grad_(bool(want)) for x, want in zip((hidden, weight, bias), wanted)]
    loss = ops.masked_cross_entropy(
        leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, reduction=reduction, backend=backend
    )
    loss.square().sum().backward()
    assert [x.grad is not None for x in leaves] == [bool(want) for want in wanted]
    outputs = torch.ops.bestrq2.masked_cross_entropy(
        hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), None, bias.detach(), True, torch.float32,
        0.0, 0.0, *(bool(want) for want in wanted), backend,
    )  # fmt: skip
    assert [grad.numel() > 0 for grad in outputs[3:]] == [bool(want) for want in wanted]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_gives_the_same(backend, device, reduction):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = ops.masked_cross_entropy(hidden, weight, targets, bias=bias, mask=mask, reduction=reduction, backend=backend)
    loss = loss.sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.mul_(3)  # what an optimizer or gradient clipping may do: it must not reach what the graph has saved
    loss.backward()
    for x, grad in zip(leaves, first):
        torch.testing.assert_close(x.grad, 4 * grad)


def test_upstream_gradient_scales(backend, device):
    hidden, weight, targets, *_ = make(device=device)
    hidden.requires_grad_()
    (one,) = torch.autograd.grad(ops.masked_cross_entropy(hidden, weight, targets, backend=backend), hidden)
    (minus,) = torch.autograd.grad(-3.5 * ops.masked_cross_entropy(hidden, weight, targets, backend=backend), hidden)
    torch.testing.assert_close(minus, -3.5 * one)


def test_fp16_gradients_survive_many_rows(backend, device):
    """Divided by 20000 rows before the products, the gradient of a row would leave the range of fp16."""
    hidden, weight, targets, *_ = make((20000,), 8, 64, torch.float16, device, scale=0.05)
    hidden.requires_grad_()
    loss = ops.masked_cross_entropy(hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(loss * 65536, hidden)
    exact = hidden.detach().double().requires_grad_()
    (gold,) = torch.autograd.grad(65536 * F.cross_entropy(exact @ weight.double().T, targets), exact)
    torch.testing.assert_close(grad.double(), gold, rtol=2e-2, atol=2e-3 * gold.abs().max().item())


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


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(backend, device, mask, grads):
    hidden, weight, targets, bias, _, row_weights = make((37,), device=device)
    arguments = (
        hidden, weight, targets, row_weights if mask else None, bias if mask else None, True, torch.float32,
        0.1, 1e-3, grads, grads, grads and mask, backend,
    )  # fmt: skip
    opcheck(torch.ops.bestrq2.masked_cross_entropy.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_recompiling(backend, device, reduction):
    from torch._dynamo.testing import CompileCounter

    def step(hidden, weight, targets, bias, mask):
        loss, accuracy = ops.masked_cross_entropy(
            hidden, weight, targets, bias=bias, mask=mask, reduction=reduction, return_accuracy=True,
            backend=backend, **FULL,
        )  # fmt: skip
        return loss * 2.0, accuracy

    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (41, 7, 64):
        hidden, weight, targets, bias, mask, _ = make((3, length), device=device)
        hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        counted(hidden, weight, targets, bias, mask)
        results = []
        for function in (step, compiled):
            loss, accuracy = function(hidden, weight, targets, bias, mask)
            results.append((loss, accuracy, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def test_autocast_runs_products_like_linear(backend, device):
    hidden, weight, targets, bias, mask, _ = make((4, 64), 256, device=device)

    def run(h, w, b):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, backend=backend)

    def torchs(h, w, b):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return F.cross_entropy(F.linear(h[mask], w, b).float(), targets[mask])

    def gold(h, w, b):
        return F.cross_entropy(F.linear(h[mask], w, b), targets[mask])

    gold_value, gold_grads = grads_of(gold, (hidden.double(), weight.double(), bias.double()))
    for inputs in ((hidden, weight, bias), (hidden.bfloat16(), weight, bias)):
        value, grads = grads_of(run, inputs)
        base, base_grads = grads_of(torchs, inputs)
        assert value.dtype == torch.float32
        assert_no_worse_than_torch("loss", value, base, gold_value)
        assert [x.dtype for x in grads] == [x.dtype for x in inputs]
        for grad, base_grad, gold_grad in zip(grads, base_grads, gold_grads):
            assert_no_worse_than_torch("grad", grad, base_grad, gold_grad)
    assert not torch.equal(value, grads_of(gold, (hidden, weight, bias))[0]), "autocast changed nothing"


def test_deterministic_algorithms_and_inference_mode(backend, device):
    hidden, weight, targets, bias, mask, _ = make((5, 333), device=device)

    def run(h, w, b):
        return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, backend=backend)

    torch.use_deterministic_algorithms(True)
    try:
        first, second = grads_of(run, (hidden, weight, bias)), grads_of(run, (hidden, weight, bias))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    with torch.inference_mode():
        assert torch.equal(run(hidden.clone(), weight.clone(), bias.clone()), first[0])


def test_vector_and_batch_shapes(backend, device):
    hidden, weight, targets, *_ = make((2, 3, 5), device=device)
    losses = ops.masked_cross_entropy(hidden, weight, targets, reduction="none", backend=backend)
    assert losses.shape == targets.shape
    single = ops.masked_cross_entropy(hidden[1, 2, 3], weight, targets[1, 2, 3], reduction="none", backend=backend)
    torch.testing.assert_close(single, losses[1, 2, 3])


def test_rejects_bad_input(device):
    hidden, weight, targets, bias, mask, row_weights = make(device=device)
    call = functools.partial(ops.masked_cross_entropy, hidden, weight, targets)
    cases = [
        (ValueError, r"reduction must be one of mean, sum, none, got 'avg'", {"reduction": "avg"}),
        (ValueError, r"label_smoothing must be in \[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (ValueError, r"z_loss must be a finite number >= 0, got -1", {"z_loss": -1.0}),
        (ValueError, r"expected mask \(3, 41\), got \(3, 40\)", {"mask": mask[:, 1:]}),
        (TypeError, r"mask must be bool or floating row weights, got torch.int64", {"mask": mask.long()}),
        (ValueError, r"row weights are not differentiable", {"mask": row_weights.requires_grad_()}),
        (ValueError, r"expected bias \(203,\), got \(202,\)", {"bias": bias[1:]}),
        (TypeError, r"bias is torch.float16 but the products run in torch.float32", {"bias": bias.half()}),
        (ValueError, r"unknown backend 'gpu'", {"backend": "gpu"}),
        (ValueError, r"bias is on meta", {"bias": bias.to("meta")}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            call(**options)
    with pytest.raises(ValueError, match=r"hidden \(3, 41, 31\) and weight \(203, 32\)"):
        ops.masked_cross_entropy(hidden[..., 1:], weight, targets)
    with pytest.raises(ValueError, match=r"expected targets \(3, 41\), got \(41,\)"):
        ops.masked_cross_entropy(hidden, weight, targets[0])
    with pytest.raises(TypeError, match=r"targets must be int64, got torch.int32"):
        ops.masked_cross_entropy(hidden, weight, targets.int())
    with pytest.raises(TypeError, match=r"weight is torch.bfloat16 but the products run in torch.float32"):
        ops.masked_cross_entropy(hidden, weight.bfloat16(), targets)


def test_bad_rows_are_named(backend, device):
    hidden, weight, targets, _, mask, row_weights = make(device=device)
    mask[0, :] = True
    for bad in (-1, 203, 10**12):
        wrong = targets.clone()
        wrong[0, 5] = bad
        if device.type == "cpu":
            with pytest.raises(ValueError, match=f"target {bad} of row 5 is outside the 203 classes"):
                ops.masked_cross_entropy(hidden, weight, wrong, mask=mask, backend=backend)
        else:
            assert ops.masked_cross_entropy(hidden, weight, wrong, mask=mask, backend=backend).isnan()
    row_weights[0, 3] = -0.5
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"row weights must be >= 0, got -0.5 in row 3"):
            ops.masked_cross_entropy(hidden, weight, targets, mask=row_weights, backend=backend)


def test_second_derivative_is_an_error(backend, device):
    hidden, weight, targets, *_ = make(device=device)
    hidden.requires_grad_()
    loss = ops.masked_cross_entropy(hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad(2 * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_memory_stays_far_below_the_logits(device):
    """High-water mark of resident memory, in a process of its own where the allocator gives freed memory back."""
    if not (sys.platform.startswith("linux") and native.extension_obstacle() is None and device.type == "cpu"):
        pytest.skip("needs Linux and the C++ extension")
    script = """
import ctypes, gc, sys, torch
from bestrq2 import ops
for parameter, value in ((-3, 65536), (-1, 65536), (-2, 0)):  # mmap every block, give it back when freed
    assert ctypes.CDLL(None).mallopt(parameter, value) == 1
torch.set_num_threads(2)
rows, features, classes = 4096, 64, 8192
hidden, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
targets = torch.randint(classes, (rows,))
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
def extra(rows):
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")
    ops.masked_cross_entropy(hidden[:rows], weight, targets[:rows], backend=sys.argv[1]).backward()
    hidden.grad = weight.grad = None
    return status("VmHWM:") - before
extra(64)
print(extra(rows))
"""
    environment = os.environ | {"MKL_DISABLE_FAST_MM": "1"}
    logits = 4096 * 8192 * 4 / 2**20
    used = {}
    for backend in ("cpu", "reference"):
        command = [sys.executable, "-c", script, backend]
        try:
            used[backend] = float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        except subprocess.CalledProcessError as error:
            if b"clear_refs" in error.stderr:
                pytest.skip("/proc/self/clear_refs is not writable")
            raise
    print(f"extra memory: {used}, logits {logits:.0f} MiB")
    assert used["cpu"] < used["reference"] / 8
    assert used["cpu"] < logits / 3
    assert used["reference"] > logits, "the measurement does not see the logits"
