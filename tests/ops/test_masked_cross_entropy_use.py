"""``ops.masked_cross_entropy`` in use: autograd, torch.compile, autocast, wrong input, memory."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_no_worse_than_torch
from cross_entropy_cases import BACKENDS, FULL, grads_of, make, usable
from torch.library import opcheck

from bestrq2 import ops
from bestrq2.ops.common import native


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    return usable(request, device)


@pytest.mark.parametrize(("mask", "bound"), [(False, False), (True, False), (True, True)], ids=["all", "mask", "bound"])
@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(backend, device, mask, bound, grads):
    hidden, weight, targets, bias, _, row_weights = make((37,), device=device)
    arguments = (
        hidden, weight[None], targets[None], row_weights if mask else None, bias[None] if mask else None,
        grads, grads, grads and mask, True, torch.float32, 0.1, 1e-3, -100, 30 if bound else None, backend,
    )  # fmt: skip
    opcheck(torch.ops.bestrq2.masked_cross_entropy.default, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_recompiling(backend, device, reduction):
    from torch._dynamo.testing import CompileCounter

    def step(hidden, weight, targets, bias, mask):
        loss, accuracy = ops.masked_cross_entropy(
            hidden, weight, targets, bias=bias, mask=mask, reduction=reduction, return_accuracy=True,
            max_rows=mask.numel(), backend=backend, **FULL,
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_runs_products_like_linear(backend, device, dtype):
    hidden, weight, targets, bias, mask, _ = make((4, 64), 256, device=device)

    def run(h, w, b, reduction="mean"):
        with torch.autocast(device.type, dtype=dtype):
            return ops.masked_cross_entropy(h, w, targets, bias=b, mask=mask, reduction=reduction, backend=backend)

    def torchs(h, w, b, reduction="mean"):
        with torch.autocast(device.type, dtype=dtype):
            return F.cross_entropy(F.linear(h[mask], w, b).float(), targets[mask], reduction=reduction)

    def gold(h, w, b, reduction="mean"):
        return F.cross_entropy(F.linear(h[mask], w, b), targets[mask], reduction=reduction)

    gold_rows = gold(hidden.double(), weight.double(), bias.double(), reduction="none")
    gold_value, gold_grads = grads_of(gold, (hidden.double(), weight.double(), bias.double()))
    for inputs in ((hidden, weight, bias), (hidden.to(dtype), weight, bias)):
        value, grads = grads_of(run, inputs)
        _, base_grads = grads_of(torchs, inputs)
        assert value.dtype == torch.float32
        # Of a mean the rounding errors may cancel in one of the two.
        rows, base_rows = run(*inputs, reduction="none")[mask], torchs(*inputs, reduction="none")
        assert_no_worse_than_torch("losses", rows, base_rows, gold_rows)
        torch.testing.assert_close(value.double(), gold_value, rtol=torch.finfo(dtype).eps, atol=0)
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
        # On a GPU another kernel computes the loss where no gradient is wanted.
        torch.testing.assert_close(run(hidden.clone(), weight.clone(), bias.clone()), first[0], rtol=1e-6, atol=0)


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
        (ValueError, r"z_loss must be at least 0, got -1", {"z_loss": -1.0}),
        (ValueError, r"mask must be \(\.\.\.\) = \(3, 41\), got \(3, 40\)", {"mask": mask[:, 1:]}),
        (TypeError, r"mask must be bool or floating row weights, got torch.int64", {"mask": mask.long()}),
        (ValueError, r"row weights are not differentiable", {"mask": row_weights.requires_grad_()}),
        (ValueError, r"bias must be \(V,\) = \(203,\), got \(202,\)", {"bias": bias[1:]}),
        (TypeError, r"bias is torch.float16 but the products run in torch.float32", {"bias": bias.half()}),
        (ValueError, r"unknown backend 'gpu'", {"backend": "gpu"}),
        (ValueError, r"max_rows bounds the rows that a mask selects", {"max_rows": 5}),
        (ValueError, r"max_rows must be at least 0 or None, got -1", {"mask": mask, "max_rows": -1}),
        (ValueError, r'reduction "none" always recomputes', {"reduction": "none", "recompute": False}),
        (ValueError, r"bias is on meta", {"bias": bias.to("meta")}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            call(**options)
    with pytest.raises(
        ValueError, match=r"weight must be \(V, D\) = \(V, 31\) or \(G, V, D\) = \(G, V, 31\), got \(203, 32\)"
    ):
        ops.masked_cross_entropy(hidden[..., 1:], weight, targets)
    with pytest.raises(ValueError, match=r"targets must be \(\.\.\.\) = \(3, 41\), got \(41,\)"):
        ops.masked_cross_entropy(hidden, weight, targets[0])
    with pytest.raises(TypeError, match=r"targets must be integers, got torch.float32"):
        ops.masked_cross_entropy(hidden, weight, targets.float())
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
        with pytest.raises(ValueError, match=r"row weights of a mean must be >= 0 and finite, got -0.5 in row 3"):
            ops.masked_cross_entropy(hidden, weight, targets, mask=row_weights, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_an_error(backend, device, reduction):
    """A penalty of the gradient behind a layer would train that layer as if the loss were linear."""
    hidden, weight, targets, *_ = make(device=device)
    scale = torch.ones((), device=device, requires_grad=True)
    x = scale * hidden.requires_grad_()
    loss = ops.masked_cross_entropy(x, weight, targets, reduction=reduction, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hvp(
            lambda x: ops.masked_cross_entropy(x, weight, targets, backend=backend), hidden, hidden.detach()
        )


@pytest.mark.parametrize("recompute", [None, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_second_backward_gives_the_same(backend, device, reduction, recompute):
    hidden, weight, targets, bias, mask, _ = make(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = ops.masked_cross_entropy(
        hidden, weight, targets, bias=bias, mask=mask, reduction=reduction, recompute=recompute, backend=backend
    )
    loss = loss.sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.mul_(3)  # what an optimizer or gradient clipping may do: it must not reach what the graph has saved
    loss.backward()
    for x, grad in zip(leaves, first):
        torch.testing.assert_close(x.grad, 4 * grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_recomputing_form_is_the_same_function(backend, device, reduction, dtype):
    """Same gradients under an upstream gradient, and nothing but inputs kept for the backward."""
    hidden, weight, targets, bias, _, row_weights = make(dtype=dtype, device=device)

    def run(recompute, h, w, b):
        return ops.masked_cross_entropy(
            h, w, targets, bias=b, mask=row_weights, reduction=reduction, recompute=recompute, backend=backend, **FULL
        )

    saved = []
    kept, kept_grads = grads_of(functools.partial(run, None), (hidden, weight, bias))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        value, grads = grads_of(functools.partial(run, True), (hidden, weight, bias))
    inputs = {x.untyped_storage().data_ptr() for x in (hidden, weight, bias, targets, row_weights)}
    assert saved
    assert {x.untyped_storage().data_ptr() for x in saved} <= inputs
    torch.testing.assert_close(value, kept, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=0)
    tolerance = 4 * torch.finfo(dtype).eps  # both forms run the same products, but scale before or after rounding
    for grad, expected in zip(grads, kept_grads):
        torch.testing.assert_close(grad, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("recompute", [None, True])
def test_bound_of_the_masked_rows(backend, device, recompute):
    """Exactly met, generous, and larger than the input: the same result. Too small: an error, or NaN on a GPU."""
    hidden, weight, targets, bias, mask, row_weights = make(device=device)
    hidden = hidden.masked_fill(~mask.unsqueeze(-1), float("nan"))
    count = int(row_weights.count_nonzero())

    def run(max_rows, h, w, b):
        return ops.masked_cross_entropy(
            h, w, targets, bias=b, mask=row_weights, max_rows=max_rows, recompute=recompute, backend=backend
        )

    expected, expected_grads = grads_of(functools.partial(run, None), (hidden, weight, bias))
    for most in (count, count + 20, 10**6):
        value, grads = grads_of(functools.partial(run, most), (hidden, weight, bias))
        torch.testing.assert_close(value, expected)
        for grad, expected_grad in zip(grads, expected_grads):
            torch.testing.assert_close(grad, expected_grad)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=f"{count} rows are masked but max_rows is {count - 1}"):
            run(count - 1, hidden, weight, bias)
    elif backend == "triton":
        assert run(count - 1, hidden, weight, bias).isnan()


@pytest.mark.parametrize("recompute", [None, True])
def test_several_upstream_gradients_at_once(backend, device, recompute):
    """The call of torch.autograd.functional.jacobian(vectorize=True): an upstream gradient without a single value."""
    hidden, weight, targets, *_ = make(device=device)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss = ops.masked_cross_entropy(hidden, weight, targets, recompute=recompute, backend=backend)
    batched = torch.autograd.grad(
        loss, leaves, torch.tensor([1.0, -2.0], device=device), is_grads_batched=True, retain_graph=True
    )
    for both, one in zip(batched, torch.autograd.grad(loss, leaves)):
        torch.testing.assert_close(both, torch.stack((one, -2 * one)))


def test_upstream_gradient_scales(backend, device):
    hidden, weight, targets, *_ = make(device=device)
    hidden.requires_grad_()
    (one,) = torch.autograd.grad(ops.masked_cross_entropy(hidden, weight, targets, backend=backend), hidden)
    (minus,) = torch.autograd.grad(-3.5 * ops.masked_cross_entropy(hidden, weight, targets, backend=backend), hidden)
    torch.testing.assert_close(minus, -3.5 * one)


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
        hidden.detach().flatten(0, 1), weight.detach()[None], targets.flatten()[None], None, bias.detach()[None],
        *(bool(want) for want in wanted), True, torch.float32, 0.0, 0.0, None, None, backend,
    )  # fmt: skip
    assert [grad.numel() > 0 for grad in outputs[3:]] == [bool(want) for want in wanted]


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
def extra(rows, gradients):
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")
    if gradients:
        ops.masked_cross_entropy(hidden[:rows], weight, targets[:rows], backend=sys.argv[1]).backward()
    else:
        with torch.no_grad():
            ops.masked_cross_entropy(hidden[:rows], weight, targets[:rows], backend=sys.argv[1])
    hidden.grad = weight.grad = None
    return status("VmHWM:") - before
extra(64, True)
print(extra(rows, True), extra(rows, False))
"""
    environment = os.environ | {"MKL_DISABLE_FAST_MM": "1"}
    logits = 4096 * 8192 * 4 / 2**20
    used = {}
    for backend in ("cpu", "reference"):
        command = [sys.executable, "-c", script, backend]
        try:
            output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
            used[backend], used[f"{backend}, losses only"] = map(float, output.split())
        except subprocess.CalledProcessError as error:
            if b"clear_refs" in error.stderr:
                pytest.skip("/proc/self/clear_refs is not writable")
            raise
    print(f"extra memory: {used}, logits {logits:.0f} MiB")
    assert used["cpu"] < used["reference"] / 8
    assert used["cpu"] < logits / 3
    assert used["cpu, losses only"] < logits / 10
    assert used["reference"] > logits, "the measurement does not see the logits"
