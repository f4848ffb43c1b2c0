"""Triton compiles a kernel again for integers that are 1 or multiples of 16 and for pointers at 16 bytes. Numbers of
rows, frames and tokens change in every step: they may not be among those.
"""

import collections

import pytest
import torch
from interpreter import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
ROWS = (1, 2, 15, 16, 63, 64, 100, 130, 133, 134, 208, 300)


@pytest.fixture
def variants(monkeypatch):
    """Numbers of compilations that an H100 would need for the launches so far, by kernel; nothing is launched."""
    from bestrq2.kernels import tuning
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, binders, found = make_backend(GPUTarget("cuda", 90, 32)), {}, collections.defaultdict(set)

    def run(kernel, *args, grid, warmup, **options):
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, left = binders[kernel](*args, **options)
        found[kernel.__name__].add(repr((specialization, sorted(left.items()))))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(tuning, "_names", lambda device: ("NVIDIA H100 80GB HBM3", 90))
    return lambda: {name: len(variants) for name, variants in found.items()}


@pytest.mark.parametrize("books", [1, 3])
@pytest.mark.parametrize("form", ["every row", "nearly every row", "few rows", "no gradient", "no gradient, few rows"])
def test_masked_cross_entropy(form, books, variants):
    from bestrq2.kernels.masked_cross_entropy.launch import masked_cross_entropy

    weight, bias = torch.zeros(books, 96, 32).bfloat16(), torch.zeros(books, 96).bfloat16()
    for rows in ROWS:
        hidden, targets = torch.zeros(rows, 32).bfloat16(), torch.zeros(rows, books, dtype=torch.int64).T
        mask = None if form in ("every row", "no gradient") else torch.ones(rows, dtype=torch.bool)
        wanted = (not form.startswith("no gradient"),) * 3
        most = rows if form == "nearly every row" else None
        masked_cross_entropy(hidden, weight, targets, mask, bias, True, torch.bfloat16, 0.0, 0.0, wanted, most)
    assert set(variants().values()) == {1}


@pytest.mark.parametrize("masked", [False, True])
def test_quantize(masked, variants):
    """Also for all sizes of codes that are padded to the same: the one that test_quantize_compile.py compiles."""
    from bestrq2.kernels.quantize import quantize

    for rows, dims in [(rows, 16) for rows in ROWS] + [(300, 13), (300, 8), (300, 1)]:
        projection, codebook = torch.zeros(1, 32, dims), torch.zeros(1, 300, dims)
        mask = torch.ones(rows, dtype=torch.bool) if masked else None
        quantize(torch.zeros(rows, 32), projection, codebook, mask, False)
    assert variants() == {"quantize_kernel": 1}


def test_chunked_attention(variants):
    from bestrq2.kernels.chunked_attention import launch

    from bestrq2.ops.chunked_attention.operator import Options

    bias = torch.zeros(2, 16).bfloat16()
    for frames in ROWS[1:]:
        query, key, value = (torch.zeros(2, frames, 2, 16).bfloat16().transpose(1, 2) for _ in "qkv")
        table, lengths = torch.zeros(2, 2 * frames - 1, 16).bfloat16(), torch.tensor([frames, 1])
        numbers = (None, None, None, 0, frames - 1, 0.25)
        options = Options(table, bias, bias, lengths, None, None, *numbers, "triton")
        out, logsumexp = launch.forward(query, key, value, options)
        launch.backward(torch.zeros_like(out), out, logsumexp, query, key, value, options)
    assert len(variants()) == 5
    assert set(variants().values()) == {1}


def test_short_attention(variants):
    """One variant for each padded number of keys."""
    from bestrq2.kernels import short_attention

    for tokens in range(65, 129, 9):
        qkv = torch.zeros(3, 2, 2, tokens, 64).bfloat16()
        out, logsumexp = torch.empty_like(qkv[0]), torch.empty(2, 2, tokens)
        short_attention.forward(*qkv, out, logsumexp, None, True)
        short_attention.backward(out, *qkv, logsumexp, None, True, tuple(torch.empty_like(qkv)))
    assert variants() == {"short_attention_forward_kernel": 1, "short_attention_backward_kernel": 1}
