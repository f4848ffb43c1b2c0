"""The Triton kernels of attention over few keys in the interpreter, against float64."""

import re

import pytest
import torch
from interpreter import INTERPRETED, run_interpreted
from short_attention_cases import SHAPES, compare_self, compare_separate, packed

from bestrq2.layers.short_attention import short_attention, short_self_attention

pytest.importorskip("triton")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels already run in this process")
def test_in_the_interpreter():
    counts = run_interpreted(__file__)
    assert re.search(r"\d+ passed, 1 skipped", counts), "more was skipped than this test itself"


needs_kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or interpreter")


@needs_kernels
@pytest.mark.parametrize(("tokens", "dim", "padded", "first"), SHAPES)
def test_self_attention(tokens, dim, padded, first, device):
    from bestrq2.kernels import tuning

    heads = 1 + (tokens < 70)
    with tuning.override("short_attention", tuning.merged(tuning.FOLDER, "short_attention", None, 90)):
        compare_self(short_self_attention, tokens, dim, padded, first, torch.bfloat16, device, heads)


@needs_kernels
def test_a_tile_that_does_not_fit_is_refused(device):
    qkv = packed(257, 16, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"key: expected fewer than 257 keys of 16 channels"):
        short_self_attention(qkv)


@needs_kernels
@pytest.mark.parametrize(("queries", "keys", "dim"), [(40, 70, 32), (90, 20, 24), (33, 33, 12), (70, 70, 40)])
def test_separate_inputs(queries, keys, dim, device):
    compare_separate(short_attention, queries, keys, dim, torch.float16, device)


@needs_kernels
def test_single_precision_takes_the_formula(device):
    """The kernels multiply with 16-bit matrix units; fp32 asked for by name is as accurate as PyTorch's fp32."""
    compare_self(short_self_attention, 21, 24, True, 2, torch.float32, device)


@needs_kernels
def test_padding_is_never_read(device):
    qkv, lengths = packed(30, 32, torch.bfloat16, device), torch.tensor([11, 30], device=device)
    poisoned = qkv.detach().clone()
    poisoned[0, 11:] = torch.nan
    poisoned.requires_grad_()
    results = []
    for x in (qkv, poisoned):
        out = short_self_attention(x, lengths)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for clean, other in zip(*results):
        assert torch.equal(clean, other)
        assert clean.isfinite().all()
