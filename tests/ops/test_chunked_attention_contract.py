"""Chunked attention as a PyTorch operation: compile, determinism, memory, autocast, errors."""

import re
import subprocess
import sys

import pytest
import torch
from accuracy import relative_error

from bestrq2 import ops
from bestrq2.ops.chunked_attention import cpu as chunked_attention_cpu

HAS_CPU = chunked_attention_cpu.obstacle(torch.empty(1)) is None
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="the C++ extension is not built")


def make_inputs(frames: int = 100, dtype: torch.dtype = torch.float32, requires_grad: bool = True):
    """query, key, value, position, content_bias, position_bias of 2 items and 2 heads of size 16."""
    shapes = [(2, frames, 2, 16)] * 3 + [(2 * frames - 1, 2, 16), (2, 16), (2, 16)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    # As projections leave them: heads behind time.
    tensors = [x.transpose(-3, -2) if x.dim() > 2 else x for x in tensors]
    return [x.requires_grad_(requires_grad) for x in tensors]


def attend(query, key, value, position=None, content_bias=None, position_bias=None, **options):
    tables = {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    return ops.chunked_attention(query, key, value, **tables, **{"chunk_size": 16, "left_context": 16, **options})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("terms", [3, 6])
def test_opcheck(backend: str, terms: int):
    if backend == "cpu" and not HAS_CPU:
        pytest.skip("the C++ extension is not built")
    key_mask = torch.rand(2, 37) < 0.8 if terms == 6 else None
    tensors = [*make_inputs(37), None, None, None][:6] if terms == 6 else [*make_inputs(37)[:3], None, None, None]
    arguments = (*tensors, torch.tensor([37, 20]), None, key_mask, 5, 7, 2, 0, 36, 0.3, backend)
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention.default, arguments)
    if backend == "reference":  # its backward asks autograd, which opcheck switches off when it calls it directly
        return
    out, logsumexp = torch.ops.bestrq2.chunked_attention.default(*arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in (out, out, logsumexp, *arguments)]
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention_backward.default, tuple(detached))


def test_compiles_once_for_every_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for frames in (37, 64, 65, 100, 131):
        inputs = make_inputs(frames)
        lengths = torch.tensor([frames, frames // 2])
        upstream = torch.randn(2, 2, frames, 16)
        key_mask = torch.rand(2, frames) < 0.8
        out = compiled(*inputs, lengths=lengths, key_mask=key_mask)
        gradients = torch.autograd.grad(out, inputs, upstream)
        expected = attend(*inputs, lengths=lengths, key_mask=key_mask)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs, upstream)):
            assert torch.equal(ours, theirs)
    assert counter.frame_count == 1


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_deterministic_for_any_number_of_threads(dtype: torch.dtype):
    torch.manual_seed(0)
    inputs = make_inputs(2300, dtype)  # several segments of the backward pass
    upstream = torch.randn(2, 2, 2300, 16).to(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(count == 3)
            out = attend(*inputs, lengths=torch.tensor([2300, 1801]))
            results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other))


@needs_cpu
def test_segments_add_up():
    """Long enough for three segments of the backward pass, whose key gradients overlap."""
    inputs = make_inputs(2300)
    upstream = torch.randn(2, 2, 2300, 16)
    options = {"left_context": 40, "right_context": 5}
    gradients = torch.autograd.grad(attend(*inputs, backend="cpu", **options), inputs, upstream)
    gold = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(attend(*gold, **options), gold, upstream.double())
    for ours, theirs in zip(gradients, expected):
        assert relative_error(ours, theirs) < 2e-6


def test_second_backward():
    inputs = make_inputs()
    out = attend(*inputs)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_backward_runs_on_any_backend_after_any_forward():
    """use_backend() governs the moment of the call: what one backend saved, another must be able to use."""
    inputs, upstream = make_inputs(), torch.randn(2, 2, 100, 16)
    expected = torch.autograd.grad(attend(*inputs, backend="reference"), inputs, upstream)
    for forward, backward in (("reference", None), (None, "reference")):
        with ops.use_backend(forward or ops.available_backends()[0]):
            out = attend(*inputs)
        with ops.use_backend(backward or ops.available_backends()[0]):
            gradients = torch.autograd.grad(out, inputs, upstream)
        for ours, theirs in zip(gradients, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_some_gradients():
    query, key, value, position, *_ = (x.detach() for x in make_inputs())
    position.requires_grad_()
    attend(query, key, value, position).sum().backward()
    assert position.grad is not None
    assert query.grad is None


@pytest.mark.parametrize("layout", ["batch first", "heads first", "strided", "expanded"])
def test_any_memory_order(layout: str):
    query, key, value, *tables = make_inputs(requires_grad=False)
    expected = attend(query, key, value, *tables)
    change = {
        "batch first": lambda x: x.contiguous(),
        "heads first": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    }[layout]
    inputs = [change(x).requires_grad_() for x in (query, key, value)]
    out = attend(*inputs, *tables)
    same = expected[:1].expand_as(expected) if layout == "expanded" else expected
    torch.testing.assert_close(out, same)
    assert all(gradient.shape == (2, 2, 100, 16) for gradient in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast(backend):
    """Outputs and gradients of 16-bit inputs outside of it: sums stay fp32, also in the plain form."""
    if backend == "cpu" and not HAS_CPU:
        pytest.skip("no C++ extension here")
    inputs = make_inputs()
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    expected = attend(*rounded, backend=backend)
    upstream = torch.ones_like(expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(*inputs, backend=backend)
        gradients = torch.autograd.grad(out, inputs, upstream)
    assert torch.equal(out, expected)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, rounded, upstream)):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.float())
    assert relative_error(out, attend(*(x.double() for x in inputs))) < 0.02


def test_inference_mode():
    with torch.inference_mode():
        inputs = make_inputs(requires_grad=False)
        out = attend(*inputs)
    torch.testing.assert_close(out.clone(), attend(*(x.clone() for x in inputs)))


MEMORY = """
import re, sys, torch
from bestrq2 import ops

dtype = getattr(torch, sys.argv[1])

torch.set_num_threads(2)
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def step(frames):
    query, key, value = (torch.randn(1, frames, 4, 64).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    position = torch.randn(4, 2 * 64 + 256, 64).to(dtype).requires_grad_()
    upstream = torch.ones(1, 4, frames, 64, dtype=dtype)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    out = ops.chunked_attention(query, key, value, chunk_size=64, left_context=256, position=position,
                                position_zero=64, backend="cpu")
    torch.autograd.grad(out, (query, key, value, position), upstream)
    return status("VmHWM") - before

step(1024)
small, large = step(8192), step(32768)
print(small, large, status("VmHWM"))
"""


@needs_cpu
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear(dtype: str):
    """T = 32,768 with d = 64 and 4 heads, forward and backward: linear in T and within 1.5 GB for the whole process."""
    done = subprocess.run([sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, check=True)
    small, large, process = map(int, done.stdout.split())
    tensor = 32768 * 4 * 64 * 4
    print(f"{dtype}: {small / 2**20:.0f} MiB, {large / 2**20:.0f} MiB, process {process / 2**30:.2f} GiB")
    assert large < 6 * small
    assert large < 7 * tensor  # out, three gradients, partial sums; the scores alone would be 512 such tensors
    assert process < 1.5 * 2**30


def broken(**changes):
    query, key, value, position, content_bias, position_bias = make_inputs(20, requires_grad=False)
    named = {"query": query, "key": key, "value": value, "position": position}
    named |= {"content_bias": content_bias, "position_bias": position_bias, **changes}
    return ops.chunked_attention(**named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(2, 20, 16)}, r"query must be \(B, H, Tq, d\), got \(2, 20, 16\)"),
        ({"key": torch.zeros(2, 3, 20, 16)}, r"key must be \(B, H, Tk, d\) = \(2, 2, Tk, 16\), got \(2, 3, 20, 16\)"),
        ({"value": torch.zeros(2, 2, 19, 16)}, r"value must be \(B, H, Tk, d\) = \(2, 2, 20, 16\), got"),
        ({"query": torch.zeros(2, 2, 20, 16, dtype=torch.int64)}, "query must be fp32, bf16, fp16 or fp64"),
        ({"key": torch.zeros(2, 2, 20, 16).half(), "value": torch.zeros(2, 2, 20, 16).half()}, "must share a dtype"),
        ({"position": torch.zeros(3, 39, 16)}, r"position must be \(H, R, d\) = \(2, R, 16\), got \(3, 39, 16\)"),
        ({"position": None}, "position_bias needs position"),
        ({"content_bias": torch.zeros(16)}, r"content_bias must be \(H, d\) = \(2, 16\), got \(16,\)"),
        ({"position_bias": torch.zeros(16, 2)}, "position_bias must be"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths must be \(B,\) = \(2,\), got \(3,\)"),
        ({"key_mask": torch.ones(2, 20)}, "key_mask must be bool, got torch.float32"),
        ({"key_mask": torch.ones(2, 1, 20).bool()}, r"key_mask must be \(B, Tk\) = \(2, 20\), got \(2, 1, 20\)"),
        ({"starts": torch.ones(2)}, "starts must be int32 or int64, got torch.float32"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"chunk_size": 4, "left_context": -1}, "left_context must be at least 0"),
        ({"query_offset": -1}, "query_offset must be at least 0"),
        ({"position": torch.zeros(2, 37, 16)}, "offsets -19 to 19, rows -1 to 37 .*position has rows 0 to 36"),
        ({"query_offset": 5}, "offsets -14 to 24, rows 5 to 43"),
        ({"content_bias": torch.zeros(2, 16, device="meta")}, "content_bias is on meta but query is on cpu"),
        ({"backend": "fast"}, "unknown backend"),
    ],
    ids=lambda x: re.sub(r"\W+", "-", x)[:30] if isinstance(x, str) else None,
)
def test_rejects_bad_input(changes, message: str):
    with pytest.raises(ValueError, match=message):
        broken(**changes)


def test_impossible_backend_says_why():
    with pytest.raises(RuntimeError, match="no 'cuda' implementation"):
        broken(backend="cuda")
    double = {name: torch.zeros(2, 2, 20, 16, dtype=torch.float64) for name in ("query", "key", "value")}
    with pytest.raises(RuntimeError, match=r"'cpu' cannot run this call: float64|extension"):
        broken(backend="cpu", **double)


def test_second_derivatives_and_forward_mode_are_refused(device):
    """A custom operator would give zeros for both, without a word."""
    q, k, v = torch.randn(3, 1, 2, 10, 8, device=device)

    def run(query):
        return ops.chunked_attention(query, k, v, chunk_size=4, left_context=4)

    leaf = q.clone().requires_grad_()
    for loss in (run(leaf).square().sum(), run(leaf).sum()):  # the upstream gradient depends on the query, or not
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(run, (q,), (torch.ones_like(q),))


def test_meta_tensors_empty_batches_and_no_heads(device):
    assert ops.chunked_attention(*torch.randn(3, 2, 3, 20, 8, device="meta")).shape == (2, 3, 20, 8)
    empty = torch.randn(0, 2, 5, 4, device=device, requires_grad=True)
    position = torch.randn(2, 15, 4, device=device)
    ops.chunked_attention(empty, empty, empty, chunk_size=4, left_context=4, position=position).sum().backward()
    assert empty.grad.shape == empty.shape
    for shape in ((1, 0, 5, 4), (1, 2, 5, 0)):
        with pytest.raises(ValueError, match="at least one head and one channel"):
            ops.chunked_attention(*torch.randn(3, *shape, device=device))
