"""``ops.quantize`` in use: autocast, registration, torch.compile, wrong input, memory, threads."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from quantize_cases import backends, forced, problem

from bestrq2 import ops


@pytest.fixture(params=backends())
def backend(request):
    with forced(request.param) as name:
        yield name


def test_autocast_does_not_touch_codes(backend):
    x, projection, codebook = problem(700, 256)
    expected = ops.quantize(x, projection, codebook, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.quantize(x, projection, codebook, backend=backend), expected)


def test_inference_mode_and_determinism(backend):
    with torch.inference_mode():
        x, projection, codebook = problem(100)
        expected = ops.quantize(x, projection, codebook, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ops.quantize(x, projection, codebook, backend=backend), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    x, projection, codebook = (t.clone().requires_grad_() for t in (x, projection, codebook))
    assert not ops.quantize(x, projection, codebook, backend=backend).requires_grad


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in ops.available_backends()])
@pytest.mark.parametrize("books", [None, 2], ids=lambda n: f"G{n}")
def test_registration(backend, books):
    x, projection, codebook = problem(12, books=books)
    for mask in (None, torch.rand(12) < 0.5):
        for leaf in (x, x.clone().requires_grad_()):
            torch.library.opcheck(
                torch.ops.bestrq2.quantize.default, (leaf, projection, codebook, mask, "layer_norm", backend)
            )


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in ops.available_backends()])
def test_compiles_once_for_all_lengths(backend):
    x, projection, codebook = problem(300)
    mask = torch.rand(300) < 0.5

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x, mask):
        return ops.quantize(x * 1.0, projection, codebook, mask=mask, backend=backend) + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (300, 2, 77, 191):
            part, chosen = x[:rows].clone(), mask[:rows].clone()
            expected = ops.quantize(part, projection, codebook, mask=chosen, backend=backend) + 1
            assert torch.equal(compiled(part, chosen), expected)


def test_inductor_keeps_the_codes():
    x, projection, codebook = problem(300)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.quantize(x, projection, codebook, normalize="layer_norm"), fullgraph=True)
    assert torch.equal(compiled(x), ops.quantize(x, projection, codebook, normalize="layer_norm"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(3, 9)},
            r"projection must be \(D, d\) = \(9, d\) or \(G, D, d\) = \(G, 9, d\), got \(8, 4\)",
        ),
        (
            {"codebook": torch.zeros(5, 3)},
            r"codebook must be \(V, d\) = \(V, 4\) or \(G, V, d\) = \(G, V, 4\), got \(5, 3\)",
        ),
        (
            {"projection": torch.zeros(2, 8, 4), "codebook": torch.zeros(3, 5, 4)},
            r"codebook must be .* or \(G, V, d\) = \(2, V, 4\), got \(3, 5, 4\)",
        ),
        ({"codebook": torch.zeros(0, 4)}, "must not be empty"),
        ({"codebook": torch.zeros(4)}, r"codebook must be \(V, d\) .*, got \(4,\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x must be fp32"),
        ({"normalize": "batch"}, "normalize must be one of"),
        ({"mask": torch.zeros(3)}, "mask must be bool, got torch.float32"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, r"mask must be \(\.\.\.\) = \(3,\), got \(2,\)"),
        ({"backend": "gpu"}, "unknown backend"),
        ({"x": torch.zeros(3, 8, device="meta")}, "is on cpu but x is on meta"),
    ],
)
def test_rejects_bad_input(change, message):
    arguments = {"x": torch.zeros(3, 8), "projection": torch.zeros(8, 4), "codebook": torch.zeros(5, 4)} | change
    with pytest.raises(ValueError, match=message):
        ops.quantize(**arguments)


def test_impossible_backend_says_why():
    with pytest.raises(RuntimeError, match="cuda"):
        ops.quantize(*problem(3), backend="cuda")


def test_memory_does_not_grow_with_rows_times_codes():
    """Peak resident memory above the inputs, in a fresh process: the (rows, codes) scores would take 2 GiB here."""
    if "cpu" not in ops.available_backends() or not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs the C++ extension and /proc")
    script = """
import sys, torch
from bestrq2 import ops
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
x = torch.randn(65536, 64); p = torch.randn(64, 16); c = torch.randn(8192, 16)
ops.quantize(x[:1000], p, c, backend="cpu")
open("/proc/self/clear_refs", "w").write("5")
before = peak()
ops.quantize(x, p, c, backend="cpu")
print(peak() - before)
"""
    gc.collect()
    grown = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    print(f"peak memory grew by {grown:.1f} MiB")
    assert grown < 16


def test_shares_the_thread_pool_of_torch():
    """One OpenMP runtime in the process: ours would be a second one. In a fresh process: scikit-learn has its own."""
    if "cpu" not in ops.available_backends() or not os.path.exists("/proc/self/maps"):
        pytest.skip("needs the C++ extension and /proc")
    code = (
        "import torch; from bestrq2 import ops\n"
        "codebook = torch.nn.functional.normalize(torch.randn(512, 16), dim=1)\n"
        "ops.quantize(torch.randn(1000, 64), torch.randn(64, 16), codebook, backend='cpu')\n"
        "names = [line.split()[-1] for line in open('/proc/self/maps')]\n"
        "print(*sorted({n for n in names if 'libgomp' in n or 'libiomp' in n or 'libomp' in n}), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(result.stdout.split()) <= 1, result.stdout
