"""Meaning and accuracy of chunked attention: every backend against the float64 definition and independent formulas."""

import math

import pytest
import torch
from accuracy import assert_no_worse_than_torch, assert_term_matters, eager_attention, relative_error
from attention_cases import WINDOWS, make_inputs, make_key_mask, run
from torch import Tensor
from torch.nn import functional as F

from bestrq2 import ops
from bestrq2.ops.chunked_attention import cpu as chunked_attention_cpu

BACKENDS = ["cpu", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    if request.param == "cpu" and (reason := chunked_attention_cpu.obstacle(torch.empty(1))):
        pytest.skip(reason)
    return request.param


def compare(inputs, dtype, backend, **options) -> None:
    upstream = torch.randn_like(inputs["query"].double())
    gold = run(inputs, torch.float64, upstream=upstream.to(dtype), **options)
    plain = run(inputs, dtype, eager_attention, upstream, **options)
    kernel = run(inputs, dtype, ops.chunked_attention, upstream, backend=backend, **options)
    for name, value in kernel.items():
        assert_no_worse_than_torch(name, value, plain[name], gold[name])


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_matches_reference(window):
    inputs = make_inputs(dtype=torch.float32)
    compare(inputs, torch.float32, "cpu", lengths=torch.tensor([130, 77]), **window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_reference_in_half_precision(dtype: torch.dtype):
    inputs = make_inputs(queries=100, head_dim=64, dtype=dtype)
    compare(inputs, dtype, "cpu", chunk_size=16, left_context=40, right_context=2, lengths=torch.tensor([100, 61]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_may_leave_the_range_of_fp16(backend: str, dtype: torch.dtype):
    """Products of 90,000 before the scale. The reference is no coarser than its rounded output."""
    inputs = make_inputs(1, 2, 40, head_dim=64, dtype=torch.float64)
    inputs["query"], inputs["key"] = 40 * inputs["query"].sign(), 40 * inputs["key"].sign()
    inputs["query"][0, 0, 7], inputs["key"][0, 0, 9] = 40.0, 40.0
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    options = {"chunk_size": 16, "left_context": 16, "scale": 1e-4, "lengths": torch.tensor([37])}
    upstream = torch.randn(1, 2, 40, 64).to(dtype)
    assert (inputs["query"].double() @ inputs["key"].double().mT).max() > torch.finfo(torch.float16).max
    gold = run(inputs, torch.float64, upstream=upstream, **options)
    results = run(inputs, dtype, ops.chunked_attention, upstream, backend=backend, **options)
    for name, result in results.items():
        # 16-bit kernels round the weights of the values, too.
        assert relative_error(result, gold[name]) < (1 if backend == "reference" else 8) * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(1, 1, 0), (5, 70, 65), (40, 131, 61), (90, 40, 0), (64, 65, 1), (3, 200, 70)]
)
@pytest.mark.parametrize("window", [{}, {"chunk_size": 8, "left_context": 20, "right_context": 1}], ids=str)
def test_streaming_and_other_lengths(queries: int, keys: int, offset: int, window):
    """Tq != Tk, offsets that are not multiples of a tile, caches that are not yet full, lengths of all kinds."""
    inputs = make_inputs(3, 2, queries, keys, head_dim=12, dtype=torch.float32)
    inputs["position"] = torch.randn(2, 2 * (queries + keys + offset) + 1, 12)
    starts, lengths = torch.tensor([0, keys // 3, keys]), torch.tensor([keys, keys - 1, keys])
    compare(inputs, torch.float32, "cpu", query_offset=offset, starts=starts, lengths=lengths, **window)
    compare(inputs, torch.float32, "cpu", query_offset=offset, **window)


@pytest.mark.parametrize("head_dim", [1, 7, 60, 128, 256])
def test_head_sizes(head_dim: int):
    inputs = make_inputs(1, 2, 70, head_dim=head_dim, dtype=torch.float32)
    compare(inputs, torch.float32, "cpu", chunk_size=16, left_context=16)


@pytest.mark.parametrize("without", [(), ("position", "position_bias"), ("content_bias",), ("position_bias",)])
def test_optional_terms(without):
    inputs = {name: x for name, x in make_inputs(dtype=torch.float32).items() if name not in without}
    compare(inputs, torch.float32, "cpu", chunk_size=16, left_context=16, scale=0.2)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_key_mask(window):
    inputs, key_mask = make_inputs(3, queries=150, dtype=torch.float32), make_key_mask()
    compare(inputs, torch.float32, "cpu", key_mask=key_mask, **window)
    padding = {"lengths": torch.tensor([150, 150, 101]), "starts": torch.tensor([0, 2, 30])}
    compare(inputs, torch.float32, "cpu", key_mask=key_mask, **padding, **window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_key_mask_in_half_precision(dtype: torch.dtype):
    inputs = make_inputs(3, queries=150, head_dim=24, dtype=dtype)
    compare(inputs, dtype, "cpu", key_mask=make_key_mask(), chunk_size=16, left_context=40, right_context=2)


def test_key_mask_while_streaming():
    inputs = make_inputs(3, 2, 20, 150, head_dim=12, dtype=torch.float32)
    compare(inputs, torch.float32, "cpu", key_mask=make_key_mask(), chunk_size=8, left_context=60, query_offset=125)


def test_masked_keys_are_never_read(backend: str):
    """Rows whose whole window is masked are exact zeros; so are the gradients of masked keys, also if they hold NaN."""
    inputs, key_mask = make_inputs(3, 2, 150, dtype=torch.float32), make_key_mask()
    options = {"chunk_size": 8, "left_context": 4, "key_mask": key_mask, "backend": backend}
    upstream = torch.randn(3, 2, 150, 16)
    expected = run(inputs, torch.float32, ops.chunked_attention, upstream, **options)
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill(~key_mask[:, None, :, None], float("nan"))
    results = run(inputs, torch.float32, ops.chunked_attention, upstream, **options)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name
    sees = (ops.ChunkLayout(8, 4).mask(150) & key_mask[:, None]).any(-1)
    assert 0 < sees[0].sum() < 150
    for name in ("out", "grad of query"):
        assert torch.equal(results[name].any(-1), sees[:, None].expand(-1, 2, -1)), name
    for name in ("grad of key", "grad of value"):
        assert not results[name].transpose(1, 2)[~key_mask].any()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str):
    from bestrq2.ops.common.native import extension, extension_obstacle

    if extension_obstacle() or not extension().force_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            inputs = make_inputs(1, 2, 90, head_dim=20, dtype=dtype)
            compare(inputs, dtype, "cpu", chunk_size=12, left_context=25)
            compare(inputs, dtype, "cpu", chunk_size=12, left_context=25, key_mask=torch.rand(1, 90) < 0.5)
        query = torch.randn(1, 1, 20, 8)
        query.view(torch.int32)[0, 0, 3] = 0x7F800001  # a NaN with a payload, which integer arithmetic could move
        out = ops.chunked_attention(query, *torch.randn(2, 1, 1, 20, 8), backend="cpu")
        assert torch.equal(out.isnan().all(-1), query.isnan().all(-1))
        assert not out[0, 0, 4:].isnan().any()
    finally:
        assert any(extension().force_isa(name) for name in ("avx512_vnni", "avx512", "avx2", "portable"))


def test_equals_transformer_xl(backend: str):
    """Pad-and-view relative shift over a table from +(T-1) down to -(T-1), as Dai et al. published it."""
    inputs = make_inputs(2, 3, 37, head_dim=8)
    query, key, value, position, u, v = inputs.values()
    frames, dim = query.shape[2:]
    by_position = (query + v[:, None]) @ position.flip(1).transpose(-1, -2)
    padded = F.pad(by_position, (1, 0)).reshape(2, 3, 2 * frames, frames)
    shifted = padded[:, :, 1:].reshape(2, 3, frames, 2 * frames - 1)[..., :frames]
    score = ((query + u[:, None]) @ key.transpose(-1, -2) + shifted) / math.sqrt(dim)
    expected = score.softmax(-1) @ value
    dtype = torch.float64 if backend == "reference" else torch.float32
    out = run(inputs, dtype, ops.chunked_attention, backend=backend)["out"]
    torch.testing.assert_close(out, expected.to(dtype), rtol=1e-5, atol=1e-5)


def test_equals_double_loop(backend: str):
    """The formula pair by pair, with a table that covers only the window and starts anywhere."""
    chunk, left, right, offset, zero = 4, 5, 2, 6, 5
    inputs = make_inputs(1, 1, 9, 15, head_dim=4)
    inputs["position"] = torch.randn(1, zero + chunk + left, 4, dtype=torch.float64)
    query, key, value, position, u, v = (x.squeeze(0) for x in inputs.values())
    query, key, value = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    expected = torch.zeros_like(query)
    for i in range(9):
        n, weights = i + offset, {}
        for j in range(3, 14):
            if n // chunk * chunk - left <= j < (n // chunk + 1) * chunk + right and 3 <= n < 14:
                term = (query[i] + u) @ key[j] + (query[i] + v) @ position[zero + n - j]
                weights[j] = math.exp(term.item() * 0.3)
        for j, weight in weights.items():
            expected[i] += weight / sum(weights.values()) * value[j]
    options = {"chunk_size": chunk, "left_context": left, "right_context": right, "query_offset": offset}
    options |= {"position_zero": zero, "scale": 0.3, "starts": torch.tensor([3]), "lengths": torch.tensor([14])}
    dtype = torch.float64 if backend == "reference" else torch.float32
    out = run(inputs, dtype, ops.chunked_attention, backend=backend, **options)["out"]
    torch.testing.assert_close(out[0, 0], expected.to(dtype), rtol=1e-5, atol=1e-5)
    assert (out[0, 0, 8] == 0).all()  # position 14 is padding


def test_equals_scaled_dot_product_attention(backend: str):
    inputs = {name: x.float() for name, x in make_inputs(queries=50).items() if name in ("query", "key", "value")}
    mask = ops.ChunkLayout(8, 16).mask(50)
    out = ops.chunked_attention(**inputs, chunk_size=8, left_context=16, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs.values(), attn_mask=mask))
    key_mask = torch.rand(2, 50) < 0.7
    key_mask[:, ::8] = True  # scaled_dot_product_attention wants a key in every row
    out = ops.chunked_attention(**inputs, chunk_size=8, left_context=16, key_mask=key_mask, backend=backend)
    mask = mask & key_mask[:, None, None]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs.values(), attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_term_matters(dtype: torch.dtype):
    inputs = make_inputs(queries=40, dtype=dtype)
    options = {"chunk_size": 8, "left_context": 8}
    gold = run(inputs, torch.float64, **options)["out"]
    for term in ("content_bias", "position_bias"):
        without = run({**inputs, term: torch.zeros_like(inputs[term])}, torch.float64, **options)["out"]
        assert_term_matters(term, gold, without, dtype)
    changes = {"direction of the offset": inputs["position"].flip(1), "zero row": inputs["position"].roll(1, 1)}
    changes |= {"position": torch.zeros_like(inputs["position"])}
    for name, position in changes.items():
        without = run({**inputs, "position": position}, torch.float64, **options)["out"]
        assert_term_matters(name, gold, without, dtype)
    holes = {"key_mask": torch.arange(40).expand(2, -1) % 3 != 0}
    for change in ({"left_context": 4}, {"right_context": 3}, {"chunk_size": 10}, {"scale": 0.1}, holes):
        assert_term_matters(next(iter(change)), gold, run(inputs, torch.float64, **{**options, **change})["out"], dtype)


def test_padding_is_zero_and_never_read(backend: str):
    """Zero-length items, padded rows and rows that see nothing: exact zeros, also with NaN in the padding."""
    inputs = make_inputs(3, 2, 50, dtype=torch.float32)
    lengths, starts = torch.tensor([0, 31, 50]), torch.tensor([0, 5, 50])
    for item in range(3):
        padded = torch.ones(50, dtype=torch.bool)
        padded[starts[item] : lengths[item]] = False
        for name in ("query", "key", "value"):
            inputs[name][item, :, padded] = float("nan")
    upstream = torch.randn(3, 2, 50, 16)
    options = {"chunk_size": 8, "left_context": 4, "lengths": lengths, "starts": starts, "backend": backend}
    results = run(inputs, torch.float32, ops.chunked_attention, upstream, **options)
    for name, result in results.items():
        assert torch.isfinite(result).all(), name
        if result.dim() == 4:
            assert not result[0].any()
            assert not result[2].any()
            assert not result[1, :, :5].any()
            assert not result[1, :, 31:].any()
            assert result[1, :, 5:31].all()


def test_item_is_the_same_alone_and_padded():
    inputs = make_inputs(2, 2, 90, dtype=torch.float32)
    options = {"chunk_size": 16, "left_context": 16}
    batch = run(inputs, torch.float32, ops.chunked_attention, lengths=torch.tensor([90, 53]), **options)["out"]
    alone = {name: x[1:, :, :53] if x.dim() == 4 else x for name, x in inputs.items()}
    out = ops.chunked_attention(**{**alone, "position": inputs["position"]}, **options)
    assert torch.equal(out[0], batch[1, :, :53])


def test_streaming_equals_the_whole():
    """Chunk by chunk with a cache of the left context, as a streaming encoder runs it."""
    inputs = make_inputs(1, 2, 70, dtype=torch.float32)
    options = {"chunk_size": 8, "left_context": 16}
    whole = ops.chunked_attention(**inputs, **options)
    rest = {name: inputs[name] for name in ("position", "content_bias", "position_bias")}
    for begin in range(0, 70, 8):
        end, first = min(begin + 8, 70), max(begin - 16, 0)
        key, value = inputs["key"][:, :, first:end], inputs["value"][:, :, first:end]
        cached = {"query": inputs["query"][:, :, begin:end], "key": key, "value": value}
        out = ops.chunked_attention(**cached, **rest, query_offset=begin - first, **options)
        torch.testing.assert_close(out, whole[:, :, begin:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty(backend: str, batch: int, queries: int, keys: int):
    inputs = make_inputs(batch, 2, queries, keys, dtype=torch.float32)
    inputs["position"] = torch.randn(2, 21, 16)
    results = run(inputs, torch.float32, ops.chunked_attention, torch.ones(batch, 2, queries, 16), backend=backend)
    assert results["out"].shape == (batch, 2, queries, 16)
    assert not any(result.any() for result in results.values())


def test_gradcheck_reference():
    inputs = make_inputs(2, 1, 7, head_dim=3)
    leaves = [x.detach().requires_grad_() for x in inputs.values()]

    def function(*tensors: Tensor) -> Tensor:
        window = {"chunk_size": 3, "left_context": 2, "right_context": 1, "lengths": torch.tensor([7, 4])}
        return ops.chunked_attention(**dict(zip(inputs, tensors)), **window)

    assert torch.autograd.gradcheck(function, leaves)
