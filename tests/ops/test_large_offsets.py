"""Offsets past 2^31: every C++ kernel on tensors whose elements lie that far apart, against the same values packed."""

import pytest
import torch
from torch import Tensor
from untouched import spread, untouched

from bestrq2 import ops
from bestrq2.ops.common.native import extension, extension_obstacle

pytestmark = pytest.mark.skipif(bool(extension_obstacle()), reason="the C++ extension is not built")

ATTENTION = {"chunk_size": 2, "left_context": 3, "right_context": 1, "backend": "cpu"}


def attention_inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 4, 5, 16).bfloat16() for _ in "qkv"], torch.randn(4, 11, 16).bfloat16()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "frame"])
def test_chunked_attention(dim: int, monkeypatch):
    """Inputs, output and query gradient spread; the key gradients are dense sums of the kernel's own making."""
    tensors, position = attention_inputs()
    key_mask, upstream = torch.rand(3, 5) < 0.8, torch.randn(3, 4, 5, 16).bfloat16()

    def run(make, grad):
        inputs = [make(x).requires_grad_() for x in tensors]
        out = ops.chunked_attention(*inputs, position=position, key_mask=key_mask, **ATTENTION)
        return out, *torch.autograd.grad(out, inputs, grad)

    expected = run(lambda x: x.clone(), upstream)
    written = []

    def spread_like(x, **options):
        if "device" in options or x.shape != upstream.shape:  # asked for its strides only
            return torch.empty(x.shape, dtype=x.dtype, **options)
        written.append(spread(torch.zeros_like(x), dim))
        return written[-1]

    monkeypatch.setattr(torch, "empty_like", spread_like)
    results = run(lambda x: spread(x, dim), spread(upstream, dim))
    assert written[0].stride(dim) * (written[0].shape[dim] - 1) >= 2**31
    for ours, theirs in zip(results, expected):
        assert theirs.any()
        assert torch.equal(ours, theirs)


def test_chunked_attention_position_table():
    """Rows of a table that begin beyond 2^31 elements."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 20, 16)
    packed, zero = torch.randn(1, 39, 16), 2**27 + 30
    table = untouched((zero + 20) * 16, torch.float32).view(1, -1, 16)
    table[:, zero - 19 :] = packed
    out = ops.chunked_attention(query, key, value, position=table, position_zero=zero, backend="cpu")
    assert torch.equal(out, ops.chunked_attention(query, key, value, position=packed, backend="cpu"))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_vnni"])
@pytest.mark.parametrize("dim", [0, 1], ids=["row", "feature"])
def test_quantize(dim: int, isa: str):
    """600 rows: enough for the 8-bit screening of the last instruction set."""
    if not extension().force_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        x, projection = torch.randn(600, 24).bfloat16(), torch.randn(24, 16)
        codebook = torch.nn.functional.normalize(torch.randn(100, 16), dim=-1)
        expected = ops.quantize(x, projection, codebook, backend="cpu")
        far = spread(x, dim)
        assert far.stride(dim) * (far.shape[dim] - 1) >= 2**31
        assert torch.equal(ops.quantize(far, projection, codebook, backend="cpu"), expected)
    finally:
        assert any(extension().force_isa(name) for name in ("avx512_vnni", "avx512", "avx2", "portable"))


def test_masked_cross_entropy_softmax():
    """Targets, weights, losses and hits are indexed by row; here rows beyond 2^31."""
    logits, index = torch.randn(3, 10), torch.tensor([1, 2**31 + 5, 2**31 + 70])
    rows = int(index.max()) + 1
    packed = {"targets": torch.tensor([3, 9, 0]), "row_weights": torch.rand(3)}
    packed |= {"losses": torch.zeros(3), "correct": torch.zeros(3)}
    far = {name: untouched(rows, x.dtype) for name, x in packed.items()}
    for name in ("targets", "row_weights"):
        far[name][index] = packed[name]

    def run(index: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        gradient = logits.clone()
        options = {"rows": 3, "classes": 10, "scale": 0.5, "label_smoothing": 0.1, "z_loss": 0.01}
        addresses = {"logits": gradient, "index": index, **tensors}
        addresses = {name: x.data_ptr() for name, x in addresses.items()}
        extension().softmax_gradient({**options, **addresses, "gradient": True, "threads": 1})
        return gradient

    assert torch.equal(run(index, far), run(torch.arange(3), packed))
    assert packed["losses"].all()
    for name in ("losses", "correct"):
        assert torch.equal(far[name][index], packed[name])


def test_masked_cross_entropy_rows():
    """The operation as a whole, on rows that lie far apart."""
    hidden, weight, targets = torch.randn(3, 8), torch.randn(10, 8), torch.tensor([3, 9, 0])
    mask = torch.tensor([True, False, True])

    def run(hidden: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.requires_grad_(), weight.clone().requires_grad_()]
        loss = ops.masked_cross_entropy(*leaves, targets, mask=mask, backend="cpu")
        return loss, *torch.autograd.grad(loss, leaves)

    for far, packed in zip(run(spread(hidden, 0)), run(hidden)):
        assert torch.equal(far, packed)
