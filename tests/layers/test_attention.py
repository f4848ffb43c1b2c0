"""Attention of plain encoders: every way that the rule can choose, against the formula in fp64."""

import pytest
import torch
import torch.nn.functional as F

from bestrq2.layers import attention
from bestrq2.layers.attention import attend, self_attend
from bestrq2.ops.common import native


def frames(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_()


def exact(query, key, value, lengths):
    mask = None if lengths is None else (torch.arange(key.shape[2]) < lengths[:, None])[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def error(found, true):
    return float((found.detach().double() - true.detach()).abs().max() / true.detach().abs().max().clamp(min=1e-3))


def compare(function, inputs, lengths, dtype):
    """Output and gradients of ``function`` within twice the error of PyTorch's own attention in this dtype."""
    query = inputs[0]
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(9))
    if lengths is not None and query.shape[2] == inputs[1].shape[2]:
        upstream = upstream * (torch.arange(query.shape[2]) < lengths[:, None])[:, None, :, None]
        valid = (torch.arange(query.shape[2]) < lengths[:, None])[:, None, :, None]
    else:
        valid = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    double = [x.detach().double().requires_grad_() for x in inputs]
    mine = function(*inputs, lengths)
    theirs, true = exact(*inputs, lengths), exact(*double, lengths)
    grads = (
        torch.autograd.grad(out, x, upstream.to(out.dtype))
        for out, x in ((mine, inputs), (theirs, inputs), (true, double))
    )
    pairs = [(mine * valid, theirs * valid, true * valid), *zip(*grads)]
    for of_mine, of_theirs, of_true in pairs:
        assert of_mine.dtype == dtype
        assert error(of_mine, of_true) <= 2 * error(of_theirs, of_true) + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(20, 20, 64), (100, 100, 24), (37, 130, 40), (1, 1, 16), (400, 400, 32)]
)
def test_attend(queries, keys, dim, padded, dtype):
    lengths = torch.tensor([keys, max(1, keys // 2), max(1, keys // 3)]) if padded else None
    inputs = [frames(3, n, 2, dim, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys))]
    compare(attend, inputs, lengths, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", ["of a CPU", "chunks", "of a GPU"])
@pytest.mark.parametrize(("queries", "keys"), [(20, 20), (30, 20), (20, 30)])
def test_every_query_of_cross_attention_counts(queries, keys, rule, dtype, monkeypatch):
    """Also those behind the last valid key, and where there are as many queries as keys."""
    if rule == "chunks":
        monkeypatch.setattr(attention, "_is_short", lambda *_: False)
    if rule == "of a GPU":
        monkeypatch.setattr(attention, "GPU_TYPE", "cpu")
        monkeypatch.setattr(attention, "_gpu_obstacle", lambda index: None)
    lengths = torch.tensor([keys, keys // 2, 3])
    query, key, value = (frames(3, n, 2, 16, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys)))
    found = attend(query, key, value, lengths, cross=True)
    one_by_one = [attend(query[b : b + 1], *(x[b : b + 1, :, :n] for x in (key, value))) for b, n in enumerate(lengths)]
    torch.testing.assert_close(found, torch.cat(one_by_one), atol=2 * torch.finfo(dtype).eps, rtol=0.01)


@pytest.mark.parametrize(
    "lengths", [torch.tensor([7], dtype=torch.int64).expand(3), torch.tensor([7, 7, 7], dtype=torch.int32)]
)
def test_lengths_of_any_layout(lengths):
    qkv = torch.randn(3, 20, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    found, expected = (self_attend(qkv, given)[:, :, :7] for given in (lengths, torch.tensor([7, 7, 7])))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_self_attend_is_attend(dtype):
    qkv = torch.randn(2, 50, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    lengths = torch.tensor([50, 20])
    parts = qkv.detach().permute(2, 0, 3, 1, 4).unbind()
    parts = [x.clone().requires_grad_() for x in parts]
    joined, apart = self_attend(qkv, lengths), attend(*parts, lengths)
    assert torch.equal(joined, apart)
    joined.float().square().sum().backward()
    apart.float().square().sum().backward()
    assert torch.equal(qkv.grad, torch.stack([x.grad for x in parts]).permute(1, 3, 0, 2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_self_attend_from_a_token_on(dtype):
    qkv = torch.randn(2, 50, 3, 4, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    late, every = self_attend(qkv, first=17), self_attend(qkv)
    assert torch.equal(late, every[:, :, 17:])
    of_late, of_every = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (late, every[:, :, 17:]))
    assert error(of_late, of_every) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize(("first", "padded"), [(0, False), (0, True), (9, False)])
@pytest.mark.parametrize("dim", [16, 24])
def test_self_attend_adds_the_bias(dim, first, padded, short, dtype, monkeypatch):
    if not short:
        monkeypatch.setattr(attention, "_is_short", lambda *_: False)
    lengths = torch.tensor([70, 31]) if padded else None
    generator = torch.Generator().manual_seed(3)
    layer = torch.randn(2, 70, 3, 2, dim, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(3 * 2 * dim, generator=generator).requires_grad_()
    upstream = torch.randn(2, 2, 70 - first, dim, generator=generator).to(dtype)
    if padded:
        upstream[1, :, 31:] = 0

    def plain(of_layer, of_bias):
        query, key, value = (of_layer + of_bias.to(of_layer.dtype).view(3, 2, dim)).permute(2, 0, 3, 1, 4)
        return exact(query[:, :, first:], key, value, lengths)

    results = []
    for function, wide in (
        (lambda x, b: self_attend(x.clone(), lengths, first, b), False),
        (plain, False),
        (plain, True),
    ):
        inputs = [x.detach().double().requires_grad_() if wide else x for x in (layer, bias)]
        out = function(*inputs)
        results.append(
            (out if not padded else out[:, :, :31], *torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
        )
    for mine, theirs, true in zip(*results):
        assert error(mine, true) <= 2 * error(theirs, true) + torch.finfo(dtype).eps


@pytest.mark.skipif(native.extension_obstacle() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_fp32_kernel_on_every_instruction_set(isa, monkeypatch):
    extension = native.extension()
    before = extension.isa()
    if not extension.force_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        monkeypatch.setattr(attention, "_is_short", lambda *_: True)
        inputs = [frames(2, n, 2, 37, seed=i, dtype=torch.float32) for i, n in enumerate((33, 65, 65))]
        compare(attend, inputs, torch.tensor([65, 7]), torch.float32)
    finally:
        extension.force_isa(before)


@pytest.mark.skipif(
    native.extension_obstacle() is not None or native.extension().bf16_dot() == "none", reason="no bf16 products here"
)
@pytest.mark.parametrize("most", ["avx512_bf16", "amx"])
def test_cached_kernel_on_either_instruction_set(most, monkeypatch):
    monkeypatch.setattr(attention, "_is_short", lambda *_: True)
    native.extension().limit_bf16_dot(most)
    try:
        inputs = [frames(2, n, 2, 48, seed=i, dtype=torch.bfloat16) for i, n in enumerate((33, 65, 65))]
        compare(attend, inputs, torch.tensor([65, 7]), torch.bfloat16)
    finally:
        native.extension().limit_bf16_dot("amx")


def test_padding_is_never_read():
    qkv = torch.randn(2, 30, 3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = torch.tensor([30, 11])
    poisoned = qkv.clone()
    poisoned[1, 11:] = torch.nan
    clean = self_attend(qkv, lengths)
    if native.extension_obstacle() is None:  # scaled_dot_product_attention lets NaN values through a mask
        assert torch.equal(self_attend(poisoned, lengths)[1, :, :11], clean[1, :, :11])
