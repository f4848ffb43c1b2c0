"""The separable form of sinusoidal positions against a table of the same positions."""

import functools

import pytest
import torch
from accuracy import assert_no_worse_than_torch, assert_term_matters, eager_attention, relative_error
from torch import Tensor

from bestrq2 import ops
from bestrq2.layers.conformer_attention import relative_sinusoids
from bestrq2.ops import ChunkLayout, chunked_attention_cpu
from bestrq2.ops.chunked_attention_sinusoidal_series import fourier_series

WINDOWS = {
    "chunk 16, left 32": {"chunk_size": 16, "left_context": 32},
    "chunk 7, left 10, right 3": {"chunk_size": 7, "left_context": 10, "right_context": 3},
    "chunk 25, all left": {"chunk_size": 25},
    "band": {"chunk_size": 1, "left_context": 9, "right_context": 4},
    "full": {},
}


def make_inputs(frames=70, keys=70, heads=2, head_dim=8, width=24) -> dict[str, Tensor]:
    shapes = {"query": (2, heads, frames, head_dim), "key": (2, heads, keys, head_dim)}
    shapes |= {"value": shapes["key"], "projection": (heads, head_dim, width)}
    shapes |= {"content_bias": (heads, head_dim), "position_bias": (heads, head_dim)}
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    inputs["projection"] /= (width / 2) ** 0.5
    return inputs


def by_table(query, key, value, *, projection, query_offset=0, attend=ops.chunked_attention, **options) -> Tensor:
    window = {name: options[name] for name in ("chunk_size", "left_context", "right_context") if name in options}
    lowest, highest = ChunkLayout(**window).offsets(query.shape[2], key.shape[2], query_offset=query_offset)
    table = _sinusoids(lowest, highest, projection.shape[2]).to(projection)
    position = table @ projection.mT
    return attend(query, key, value, position=position, position_zero=-lowest, query_offset=query_offset, **options)


def _sinusoids(lowest: int, highest: int, width: int) -> Tensor:
    offsets = torch.arange(lowest, highest + 1, dtype=torch.float64)
    angles = offsets[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def with_gradients(function, inputs: dict[str, Tensor], upstream: Tensor, dtype: torch.dtype, **options):
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(dtype))
    return {"out": out.detach(), **{f"grad of {name}": x for name, x in zip(leaves, gradients)}}


def test_the_channels_are_those_of_the_conformer():
    """Same order of sines and cosines as the layer that the projection comes from."""
    torch.testing.assert_close(_sinusoids(-5, 9, 24).float(), relative_sinusoids(-5, 9, 24, False, torch.device("cpu")))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_equals_the_table(window):
    inputs, upstream = make_inputs(), torch.randn(2, 2, 70, 8, dtype=torch.float64)
    options = {"lengths": torch.tensor([70, 41]), "starts": torch.tensor([0, 3]), **window, "backend": "reference"}
    options["key_mask"] = torch.rand(2, 70) < 0.8
    expected = with_gradients(by_table, inputs, upstream, torch.float64, **options)
    results = with_gradients(ops.chunked_attention_sinusoidal, inputs, upstream, torch.float64, **options)
    for name, result in results.items():
        error = relative_error(result, expected[name])
        print(f"{name}: {error:.1e}")
        assert error < 2e-7, name
    without = by_table(**{**inputs, "projection": torch.zeros_like(inputs["projection"])}, **options)
    assert_term_matters("positions", expected["out"], without, torch.float32)


@pytest.mark.skipif(bool(chunked_attention_cpu.obstacle(torch.empty(1))), reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype):
    inputs = {name: x.to(dtype) for name, x in make_inputs(150, 150, head_dim=32, width=128).items()}
    upstream, options = torch.randn(2, 2, 150, 32).to(dtype), {"chunk_size": 16, "left_context": 64}
    gold = with_gradients(by_table, inputs, upstream, torch.float64, **options)
    plain = with_gradients(by_table, inputs, upstream, dtype, attend=eager_attention, **options)
    results = with_gradients(ops.chunked_attention_sinusoidal, inputs, upstream, dtype, backend="cpu", **options)
    for name, result in results.items():
        assert_no_worse_than_torch(name, result, plain[name], gold[name])


def test_streaming_far_into_a_recording():
    """Positions of a million frames lose nothing: angles are reduced in integers."""
    inputs, offset = make_inputs(9, 40), 31
    options = {"chunk_size": 8, "left_context": 16, "query_offset": offset, "backend": "reference"}
    out = ops.chunked_attention_sinusoidal(**inputs, **options)
    assert relative_error(out, by_table(**inputs, **options)) < 2e-7
    period, coefficients, _ = fourier_series(24, -7, 23)
    assert len(coefficients) % 2 == 1
    from bestrq2.ops.chunked_attention_sinusoidal_appended import turns

    near, far = (turns(torch.tensor([n]), period, 5, torch.float32) for n in (3, 3 + 10**6 * period))
    assert torch.equal(near[0], far[0])
    assert torch.equal(near[1], far[1])


def test_padding_may_hold_nan():
    inputs = {name: x.float() for name, x in make_inputs().items()}
    lengths = torch.tensor([70, 41])
    for name in ("query", "key", "value"):
        inputs[name][1, :, 41:] = float("nan")
    results = with_gradients(
        ops.chunked_attention_sinusoidal, inputs, torch.randn(2, 2, 70, 8), torch.float32,
        lengths=lengths, chunk_size=16, left_context=16,
    )  # fmt: skip
    for name, result in results.items():
        assert torch.isfinite(result).all(), name
    assert not results["out"][1, :, 41:].any()


@pytest.mark.parametrize(("lowest", "highest"), [(0, 0), (-1, 1), (-15, 79), (-63, 319), (-40, -30), (-499, 499)])
def test_series(lowest: int, highest: int):
    """Few channels, an error far below fp32's, coefficients that do not magnify rounding."""
    period, coefficients, error = fourier_series(576, lowest, highest)
    count = highest - lowest + 1
    print(f"{count} offsets: period {period}, {len(coefficients)} channels, error {error:.1e}")
    assert len(coefficients) <= 1.3 * count / torch.pi + 20
    assert error < 1e-7
    assert abs(coefficients).max() < 4


def test_rejects_bad_input():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"projection must be \(H, d, D\) = \(2, 8, even\), got \(2, 8, 23\)"):
        ops.chunked_attention_sinusoidal(**{**inputs, "projection": inputs["projection"][..., 1:]})
    if chunked_attention_cpu.obstacle(torch.empty(1)):
        return
    long = {name: x.float() for name, x in make_inputs(700, 700).items()}
    with pytest.raises(ValueError, match=r"1399 offsets need .* channels beside the 8 of a head, more than the 256"):
        ops.chunked_attention_sinusoidal(**long, backend="cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_once_for_every_length(backend: str):
    """The fit of the series is inside the operation, so the graph is whole, and of any length."""
    if backend == "cpu" and chunked_attention_cpu.obstacle(torch.empty(1)):
        pytest.skip("the C++ extension is not built")
    torch._dynamo.reset()  # the other backend's graph of the same lambda
    options = {"chunk_size": 16, "left_context": 32, "backend": backend}
    eager = functools.partial(ops.chunked_attention_sinusoidal, **options)
    compiled = torch.compile(
        lambda **tensors: ops.chunked_attention_sinusoidal(**tensors, **options),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames in (37, 64, 101):
            inputs, upstream = make_inputs(frames, frames), torch.randn(2, 2, frames, 8)
            expected = with_gradients(eager, inputs, upstream, torch.float32)
            for name, result in with_gradients(compiled, inputs, upstream, torch.float32).items():
                assert torch.equal(result, expected[name]), name
