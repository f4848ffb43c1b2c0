"""The operator of attention over few keys without its kernels: formula, traces, torch.compile with changing lengths."""

import pytest
import torch
from short_attention_cases import SHAPES, compare_self, compare_separate, packed, some_lengths
from torch._dynamo.testing import CompileCounterWithBackend

from bestrq2.layers import attention
from bestrq2.layers.short_attention import short_attention, short_self_attention
from bestrq2.layers.transformer import Block, TransformerSettings


@pytest.mark.parametrize(("tokens", "dim", "padded", "first"), SHAPES)
def test_self_attention(tokens, dim, padded, first):
    compare_self(short_self_attention, tokens, dim, padded, first, torch.bfloat16, "cpu")


@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (90, 20), (33, 33)])
def test_separate_inputs(queries, keys):
    compare_separate(short_attention, queries, keys, 24, torch.float32, "cpu")


def test_no_clips():
    qkv = torch.randn(0, 20, 3, 2, 16, requires_grad=True)
    out = short_self_attention(qkv)
    assert out.shape == (0, 2, 20, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("inputs", ["packed", "separate"])
def test_opcheck(inputs):
    lengths = some_lengths(20, "cpu")
    qkv = packed(20, 16, torch.float32, "cpu")
    frames = [x.detach().clone().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]
    arguments = (qkv, None, None, lengths, 3) if inputs == "packed" else (*frames, lengths, 0)
    torch.library.opcheck(torch.ops.bestrq2.short_attention.default, arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    out, logsumexp = torch.ops.bestrq2.short_attention.default(*detached)
    torch.library.opcheck(torch.ops.bestrq2.short_attention_backward.default, (out, logsumexp, *detached))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_compiled_block(monkeypatch, qk_norm, padded):
    """By the rule of a GPU: one graph for every number of tokens, with the operator and its backward in it."""
    monkeypatch.setattr(attention, "GPU_TYPE", "cpu")
    monkeypatch.setattr(attention, "_gpu_obstacle", lambda index: None)
    torch.compiler.reset()
    torch.manual_seed(0)
    block = Block(TransformerSettings(width=32, heads=2, hidden=48, qk_norm=qk_norm)).bfloat16()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for tokens in (30, 17, 64, 128):
        x = torch.randn(3, tokens, 32).bfloat16().requires_grad_()
        torch._dynamo.maybe_mark_dynamic(x, 1)
        lengths = torch.tensor([tokens, 3, tokens // 2]) if padded else None
        upstream = torch.randn(3, tokens, 32).bfloat16()
        results = []
        for function in (block, compiled):
            out = function(x, lengths)
            results.append((out, *torch.autograd.grad(out, (x, *block.parameters()), upstream)))
        for eager, of_graph in zip(*results):
            torch.testing.assert_close(of_graph, eager, atol=0.02 * eager.abs().max().item(), rtol=0)
    assert counter.frame_count == 1
    assert "bestrq2.short_attention" in str(counter.graphs[0].code)
    torch.compiler.reset()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_take_the_formula(monkeypatch, transform):
    monkeypatch.setattr(attention, "GPU_TYPE", "cpu")
    monkeypatch.setattr(attention, "_gpu_obstacle", lambda index: None)
    qkv = packed(20, 16, torch.bfloat16, "cpu").detach()

    def total(x):
        return attention.self_attend(x).float().square().sum()

    if transform == "vmap":
        found = torch.func.vmap(total)(qkv[:, None])
        expected = torch.stack([total(x[None]) for x in qkv])
    else:
        found = torch.func.grad(total)(qkv).float()
        leaf = qkv.clone().requires_grad_()
        expected = torch.autograd.grad(total(leaf), leaf)[0].float()
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0)


def test_rule_on_a_gpu(monkeypatch):
    """On tensors without memory that claim to be on a GPU."""
    monkeypatch.setattr(attention, "_gpu_obstacle", lambda index: None)

    class Shape:
        device = torch.device("cuda", 0)

        def __init__(self, tokens, dim=64, dtype=torch.bfloat16):
            self.shape, self.dtype = (2, 3, tokens, dim), dtype

    def holds(*frames):
        return attention._is_short_on_gpu(*frames)

    most = attention.GPU_KEYS
    assert holds(*[Shape(most)] * 3)
    assert holds(*[Shape(1, 128, torch.float16)] * 3)
    assert not holds(*[Shape(most + 1)] * 3)
    assert not holds(Shape(most + 1), Shape(most), Shape(most))
    assert not holds(*[Shape(20, 136)] * 3)
    assert not holds(*[Shape(20, dtype=torch.float32)] * 3)
    assert not holds(Shape(20), Shape(20), Shape(20, dtype=torch.float32))
    monkeypatch.setenv("BESTRQ2_BACKEND", "reference")
    assert not holds(*[Shape(20)] * 3)
