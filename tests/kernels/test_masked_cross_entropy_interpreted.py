"""The contract of tests/ops/test_masked_cross_entropy*.py for the Triton backend, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import run_interpreted

pytest.importorskip("triton")
CONTRACT = sorted((Path(__file__).parents[1] / "ops").glob("test_masked_cross_entropy*.py"))
# One program a row makes many rows slow; what does not depend on the kernel is tested on the other backends.
LEFT_OUT = (
    *("many_rows", "601", "(127 and not 64-17-127)", "deterministic", "recompil", "only_wanted", "opcheck", "compiles"),
    *("second_backward", "autocast", "recomputing", "every_term", "every_codebook"),
)
# Of three parameters every two meet in every combination; the other backends meet all combinations of three.
TYPES, MASKS, REDUCTIONS = ("fp32", "bf16", "fp16"), ("none", "bool", "float"), ("mean", "sum", "none")
SHAPES, COUNTS = ("1-1", "7-2", "13-1021", "64-17"), ("0", "1", "2")


def third(test, first, second, third):
    """The cases of a test that are left out, as an expression for ``pytest -k``."""
    return [
        f"({test} and triton-{a}-{b}-{c})"
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        for k, c in enumerate(third)
        if (i + j + k) % len(third)
    ]


LATIN = [*third("no_worse_than_torch", TYPES, MASKS, REDUCTIONS), *third("odd_shapes", SHAPES, COUNTS, REDUCTIONS)]
SELECTION = " and not ".join(["triton", *LEFT_OUT, f"({' or '.join(LATIN)})"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the contract itself: pytest --device cuda")
def test_contract_in_the_interpreter():
    counts = run_interpreted("-k", SELECTION, *CONTRACT)
    assert " passed" in counts
    assert "skipped" not in counts


TILES = """
import interpreter_arithmetic
import torch
from bestrq2 import ops
from bestrq2.kernels import tuning
from bestrq2.kernels.masked_cross_entropy import launch

small = {"BM": 16, "BN": 16, "BK": 16, "num_warps": 1, "num_stages": 1}
configs = {f"{kernel}/32": small for kernel in ("logits", "hidden_gradient", "weight_gradient", "loss")}
configs["softmax_gradient/whole"] = {"BLOCK_V": 64, "num_warps": 1, "num_stages": 1}
configs["softmax_gradient"] = {"BLOCK_V": 128, "num_warps": 1, "num_stages": 1}  # 300 and 333 classes pass in blocks
configs["chunk"] = {"bytes": 1, "rows_multiple": 32}
generator = torch.Generator().manual_seed(0)
buffers, empty, empty_like = [], torch.empty, torch.empty_like

def poison(buffer):
    buffers.append(buffer.fill_(float("nan") if buffer.is_floating_point() else -1))
    return buffer

def check(rows, features, classes, count, first=0, max_rows=None):
    hidden, weight = (torch.randn(n, features, generator=generator) for n in (rows, classes))
    bias, targets = torch.randn(classes, generator=generator), torch.randint(classes, (rows,), generator=generator)
    weights = torch.zeros(rows)
    weights[first + torch.randperm(rows - first, generator=generator)[:count]] = 1.5
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    results = []
    for backend in ("triton", "reference"):
        options = dict(bias=bias, label_smoothing=0.1, z_loss=0.01, return_accuracy=True, backend=backend)
        buffers.clear()
        loss, hits = ops.masked_cross_entropy(hidden, weight, targets, mask=weights, max_rows=max_rows, **options)
        logits = [x for x in buffers if x.dim() == 2 and x.shape[1] == classes and len(x) != 1]
        gradients = torch.autograd.grad(loss, inputs)
        with torch.no_grad():
            buffers.clear()
            alone = ops.masked_cross_entropy(hidden, weight, targets, mask=weights, **options)
        results.append((loss, hits, *gradients, *alone))
        if backend == "triton":
            chosen = logits
            assert not any(buffer.shape[-1] == classes for buffer in buffers), "losses alone need no logits"
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    return chosen[0]

torch.empty = lambda *sizes, **options: poison(empty(*sizes, **options))
torch.empty_like = lambda *x, **options: poison(empty_like(*x, **options))
with tuning.override("masked_cross_entropy", configs):
    for rows, features, classes in ((49, 20, 50), (32, 16, 16), (33, 1, 300), (70, 33, 17), (5, 3, 1)):
        for count in (0, 33, rows) if rows > 33 else (rows,):
            check(rows, features, classes, count)
            check(rows, features, classes, count, max_rows=count)
        check(rows, features, classes, rows // 2, max_rows=rows)  # none is gathered
    launch.PROGRAMS = 3  # fewer than rows: each adds up several
    buffer = check(32, 20, 50, count=7)
    check(49, 20, 50, count=40)
    assert buffer[:7].isfinite().all() and buffer[7:].isnan().all(), "slots behind the count are left alone"
    launch.PROGRAMS = 1
    check(40, 20, 333, count=21)  # one share of all classes
    launch.PROGRAMS = 9
    check(40, 20, 333, count=21)
for size, factor in ((1, 3.0), (4096, 0.5), (5000, 1.0), (5000, float("inf"))):
    grad = torch.ones(size)
    launch.scale(grad, torch.tensor(factor))
    assert (grad == factor).all()
print("checked")
"""


def test_tiles_chunks_and_shares_in_the_interpreter():
    """Small tiles, so that few rows meet every edge: ragged tiles, several chunks, empty ones, several shares."""
    result = subprocess.run(
        [sys.executable, "-c", TILES],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "checked", result.stdout + result.stderr
