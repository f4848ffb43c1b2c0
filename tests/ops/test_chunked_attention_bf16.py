"""The attention kernels with bf16 products (csrc/chunked_attention/bf16.cpp), with every instruction there is."""

import pytest
import torch
from accuracy import assert_no_worse_than_torch, eager_attention, relative_error
from attention_cases import WINDOWS, make_inputs, make_key_mask, run

from bestrq2 import ops
from bestrq2.ops.chunked_attention import cpu as chunked_attention_cpu
from bestrq2.ops.common import native

BF16 = torch.bfloat16


@pytest.fixture(params=["amx", "avx512_bf16", "none"], autouse=True)
def dot(request, monkeypatch):
    """Also instructions that are not the fastest of this processor, and those of the kernels without bf16 products."""
    if native.extension_obstacle() is not None:
        pytest.skip("needs the C++ extension")
    native.extension().limit_bf16_dot(request.param)
    if native.extension().bf16_dot() != request.param:
        pytest.skip(f"this processor, system or compiler lacks {request.param}")
    monkeypatch.setattr(
        chunked_attention_cpu, "multiplies_bf16", lambda dtype: dtype == BF16 and request.param != "none"
    )
    yield request.param
    native.extension().limit_bf16_dot("amx")


def compare(inputs, **options) -> None:
    """Output and gradients, under a non-constant upstream gradient, at most twice as far off as plain PyTorch's."""
    upstream = torch.randn_like(inputs["query"].double()).to(BF16)
    gold = run(inputs, torch.float64, upstream=upstream, **options)
    plain = run(inputs, BF16, eager_attention, upstream, **options)
    kernel = run(inputs, BF16, ops.chunked_attention, upstream, backend="cpu", **options)
    for name, value in kernel.items():
        assert value.dtype == BF16
        assert_no_worse_than_torch(name, value, plain[name], gold[name], slack_ulps=0.01)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(window):
    """130 queries are two tiles and two rows; 77 end inside a block of 32."""
    compare(make_inputs(head_dim=40, dtype=BF16), lengths=torch.tensor([130, 77]), **window)


@pytest.mark.parametrize(
    ("queries", "keys", "offset"),
    [(1, 1, 0), (5, 70, 65), (40, 131, 61), (90, 40, 0), (64, 65, 1), (3, 200, 70), (31, 97, 33), (129, 193, 64)],
)
@pytest.mark.parametrize("window", [{}, {"chunk_size": 8, "left_context": 20, "right_context": 1}], ids=str)
def test_streaming_and_other_lengths(queries: int, keys: int, offset: int, window):
    """Tq != Tk, offsets that are not multiples of a block, caches that are not yet full, lengths of all kinds."""
    inputs = make_inputs(3, 2, queries, keys, head_dim=12, dtype=BF16)
    inputs["position"] = torch.randn(2, 2 * (queries + keys + offset) + 1, 12).to(BF16)
    starts, lengths = torch.tensor([0, keys // 3, keys]), torch.tensor([keys, keys - 1, keys])
    compare(inputs, query_offset=offset, starts=starts, lengths=lengths, **window)
    compare(inputs, query_offset=offset, **window)


@pytest.mark.parametrize("head_dim", [1, 7, 31, 32, 33, 64, 100, 128, 256])
def test_head_sizes(head_dim: int):
    compare(make_inputs(1, 2, 70, head_dim=head_dim, dtype=BF16), chunk_size=16, left_context=16)


@pytest.mark.parametrize("without", [("position", "position_bias"), ("content_bias",), ("position_bias",)])
@pytest.mark.parametrize("scale", [None, 0.3, -0.2])
def test_optional_terms(without, scale):
    inputs = {name: x for name, x in make_inputs(dtype=BF16).items() if name not in without}
    compare(inputs, chunk_size=16, left_context=16, **({} if scale is None else {"scale": scale}))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_key_mask(window):
    inputs, key_mask = make_inputs(3, queries=150, dtype=BF16), make_key_mask()
    padding = {"lengths": torch.tensor([150, 150, 101]), "starts": torch.tensor([0, 2, 30])}
    compare(inputs, key_mask=key_mask, **padding, **window)


@pytest.mark.parametrize("term", ["position", "content_bias", "position_bias", "key", "value", "shear", "lookback"])
def test_would_notice_a_missing_term(term: str):
    """Each term, dropped from the definition, moves results by far more than test_windows lets pass."""
    options = {"chunk_size": 16, "left_context": 32}
    inputs = make_inputs(head_dim=40, dtype=BF16)
    upstream = torch.randn_like(inputs["query"].double()).to(BF16)
    gold = run(inputs, torch.float64, upstream=upstream, **options)
    plain = run(inputs, BF16, eager_attention, upstream, **options)
    if term == "lookback":
        broken = run(inputs, torch.float64, upstream=upstream, **(options | {"left_context": 31}))
    else:
        name = "position" if term == "shear" else term
        changed = inputs["position"].roll(1, 1) if term == "shear" else torch.zeros_like(inputs[name])
        broken = run({**inputs, name: changed}, torch.float64, upstream=upstream, **options)
    for name, value in broken.items():
        moved, tolerance = relative_error(value, gold[name]), 2 * relative_error(plain[name], gold[name])
        print(f"{name} without {term}: moved by {moved / tolerance:.0f} tolerances")
        linear = term == "value" and name == "grad of value"  # does not depend on the values
        assert linear or moved > 5 * tolerance, name


def test_several_segments_of_the_backward():
    """Key gradients of neighbouring segments overlap; sums of the position gradient come from all of them."""
    inputs = make_inputs(1, 1, 2300, head_dim=24, dtype=BF16)
    compare(inputs, chunk_size=16, left_context=40, right_context=5)


def test_masked_and_padded_keys_are_never_read():
    inputs, key_mask = make_inputs(3, 2, 150, dtype=BF16), make_key_mask()
    options = {"chunk_size": 8, "left_context": 4, "key_mask": key_mask, "lengths": torch.tensor([150, 140, 131])}
    upstream = torch.randn(3, 2, 150, 16)
    expected = run(inputs, BF16, ops.chunked_attention, upstream, backend="cpu", **options)
    padded = torch.arange(150) >= options["lengths"][:, None]
    for name in ("key", "value"):
        inputs[name] = inputs[name].masked_fill((~key_mask | padded)[:, None, :, None], float("nan"))
    inputs["query"] = inputs["query"].masked_fill(padded[:, None, :, None], float("nan"))
    results = run(inputs, BF16, ops.chunked_attention, upstream, backend="cpu", **options)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name
    sees = (ops.ChunkLayout(8, 4).mask(150) & (key_mask & ~padded)[:, None]).any(-1) & ~padded
    assert torch.equal(results["out"].any(-1), sees[:, None].expand(-1, 2, -1))
    assert not results["grad of query"].transpose(1, 2)[~sees].any()
    for name in ("grad of key", "grad of value"):
        assert not results[name].transpose(1, 2)[~key_mask | padded].any()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_reaches_the_rows_that_see_it(value: float):
    """As in PyTorch: +inf and NaN scores make a row NaN, a score of -inf only removes its key."""
    inputs = make_inputs(1, 1, 70, head_dim=8, dtype=BF16)
    inputs["query"], inputs["key"] = inputs["query"].abs(), inputs["key"].contiguous()
    inputs["key"][0, 0, 20, 3] = value
    without = ("position", "content_bias", "position_bias")
    inputs = {name: x for name, x in inputs.items() if name not in without}
    results = run(inputs, BF16, ops.chunked_attention, backend="cpu", chunk_size=70)["out"]
    plain = run(inputs, BF16, chunk_size=70)["out"]
    assert torch.equal(results.isnan(), plain.isnan())
    torch.testing.assert_close(results, plain, equal_nan=True, atol=0.03, rtol=0.03)


def test_large_scores_and_a_late_maximum():
    """Scores that grow along the keys rescale the sums again and again; those of both signs reach 2^8 and more."""
    inputs = make_inputs(1, 2, 260, head_dim=32, dtype=BF16)
    inputs["query"] = inputs["query"].abs()
    inputs["key"] = inputs["key"].abs() * torch.linspace(0, 8, 260)[:, None].to(BF16)
    compare(inputs, lengths=torch.tensor([251]))
    inputs["key"] = -inputs["key"]
    compare(inputs)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty(queries: int, keys: int):
    inputs = make_inputs(2, 2, queries, keys, dtype=BF16)
    inputs["position"] = torch.randn(2, 21, 16)
    results = run(inputs, BF16, ops.chunked_attention, torch.ones(2, 2, queries, 16), backend="cpu")
    assert not any(result.any() for result in results.values())


@pytest.mark.parametrize("layout", ["batch first", "strided", "expanded", "unaligned"])
def test_any_memory_order(layout: str):
    inputs = make_inputs(2, 2, 70, head_dim=20, dtype=BF16)
    change = {
        "batch first": lambda x: x.contiguous(),
        "strided": lambda x: torch.stack([x, x], -1)[..., 0],
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
        "unaligned": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
    }[layout]
    changed = {name: change(x) if x.dim() == 4 else x for name, x in inputs.items()}
    options = {"chunk_size": 16, "left_context": 20, "backend": "cpu"}
    upstream = torch.randn(2, 2, 70, 20).transpose(0, 1).contiguous().transpose(0, 1)
    ours = run(changed, BF16, ops.chunked_attention, upstream, **options)
    same = run({name: x.contiguous() for name, x in changed.items()}, BF16, ops.chunked_attention, upstream, **options)
    for name, result in ours.items():
        assert torch.equal(result, same[name]), name


def test_deterministic_for_any_number_of_threads():
    inputs = make_inputs(2, 2, 1500, dtype=BF16)
    upstream, threads, results = torch.randn(2, 2, 1500, 16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            options = {"chunk_size": 16, "left_context": 40, "lengths": torch.tensor([1500, 1333])}
            results.append(run(inputs, BF16, ops.chunked_attention, upstream, backend="cpu", **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


def test_processor_decides(dot, monkeypatch):
    """Instructions that lose to fp32 FMAs are not chosen: the choice of this processor, undone by no test."""
    monkeypatch.undo()
    chosen = chunked_attention_cpu.multiplies_bf16(BF16)
    assert chosen or dot != "amx"
    assert not (chosen and dot == "none")
    assert not chunked_attention_cpu.multiplies_bf16(torch.float32)
