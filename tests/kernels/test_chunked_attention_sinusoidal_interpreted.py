"""The Triton kernels of chunked_attention_sinusoidal in Triton's interpreter, against a table in float64."""

import re

import pytest
import torch
from accuracy import assert_no_worse_than_torch, eager_attention, relative_error
from interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels already run in this process")
def test_in_the_interpreter():
    counts = run_interpreted(__file__)
    assert re.search(r"\d+ passed, 1 skipped", counts), "more was skipped than this test itself"


needs_kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or interpreter")

PADDED = {"lengths": torch.tensor([67, 33]), "starts": torch.tensor([0, 5])}
HOLES = torch.rand(2, 67, generator=torch.Generator().manual_seed(0)) < 0.6
HOLES[0, 20:60] = False  # whole windows
BAND = {"chunk_size": 1, "left_context": 9, "right_context": 4}
# Shape: batch, heads, queries, keys, head size. Tiles of fp32 in the interpreter: see small_tiles.
CASES = {
    "chunk 16, fp16": ((1, 2, 67, 67, 16), torch.float16, {"chunk_size": 16, "left_context": 32}),
    "chunk 7, padding": (
        (2, 2, 67, 67, 16),
        torch.float32,
        {"chunk_size": 7, "left_context": 10, "right_context": 3, **PADDED},
    ),
    "two blocks of frequencies, fp16": ((1, 2, 150, 150, 16), torch.float16, {"chunk_size": 50, "left_context": 100}),
    "three blocks, fp16": ((1, 1, 230, 230, 16), torch.float16, {"chunk_size": 75, "left_context": 225}),
    "bounds beyond int32": (
        (2, 1, 30, 30, 16),
        torch.float32,
        {"lengths": torch.tensor([2**40, 2**63 - 1]), "starts": torch.tensor([-(2**40), 2**33])},
    ),
    "full, head size 12": ((1, 2, 35, 35, 12), torch.float32, {}),
    "full, four blocks, fp16": ((1, 1, 201, 201, 20), torch.float16, {}),
    "streaming": (
        (1, 2, 9, 50, 16),
        torch.float32,
        {"chunk_size": 8, "left_context": 20, "right_context": 1, "query_offset": 41},
    ),
    "more queries than keys": ((1, 1, 80, 40, 16), torch.float32, {"chunk_size": 25, "left_context": 50}),
    "band": ((1, 2, 91, 91, 16), torch.float32, BAND),
    "head size 128, fp16": ((1, 1, 70, 70, 128), torch.float16, {"chunk_size": 32, "left_context": 32}),
    "key mask": ((2, 1, 67, 67, 16), torch.float32, {"chunk_size": 7, "left_context": 10, "key_mask": HOLES}),
    "key mask, padding, fp16": (
        (2, 2, 40, 67, 16),
        torch.float16,
        {"chunk_size": 25, "left_context": 30, "right_context": 4, "query_offset": 30, "key_mask": HOLES, **PADDED},
    ),
}


@pytest.fixture(autouse=True)
def small_tiles(request):
    """Tiles that no shape fits, for fp32: one block of frequencies and two."""
    from bestrq2.kernels import tuning

    tile = {"BM": 32, "BN": 16, "BK": 32, "num_warps": 4, "num_stages": 1, "PRECISION": "ieee"}
    kernels = ("forward", "backward_query", "backward_key")
    configs = {f"sinusoidal_{kernel}/64x{count}/fp32": tile for kernel in kernels for count in (32, 64)}
    with tuning.override("chunked_attention", configs):
        yield


def compare(shape, dtype, device, **options):
    """Output and gradients against a table in fp64; also that the kernels ran and that the positions matter."""
    from bestrq2 import ops
    from bestrq2.ops import ChunkLayout

    batch, heads, queries, keys, dim = shape
    sizes = {
        "query": (batch, queries, heads, dim),
        "key": (batch, keys, heads, dim),
        "value": (batch, keys, heads, dim),
    }
    sizes |= {"projection": (heads, dim, 24), "content_bias": (heads, dim), "position_bias": (heads, dim)}
    inputs = {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}
    inputs = {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in inputs.items()}
    inputs["projection"] = inputs["projection"] / 12**0.5
    upstream = torch.randn(batch, heads, queries, dim, device=device).to(dtype)
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    window = {name: options[name] for name in ("chunk_size", "left_context", "right_context") if name in options}
    lowest, highest = ChunkLayout(**window).offsets(queries, keys, query_offset=options.get("query_offset", 0))

    def by_table(projection, attend=ops.reference.chunked_attention, **tensors):
        offsets = torch.arange(lowest, highest + 1, dtype=torch.float64, device=device)
        angles = offsets[:, None] * 10000.0 ** (-torch.arange(0, 24, 2, device=device).double() / 24)
        position = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).to(projection) @ projection.mT
        return attend(**tensors, position=position, position_zero=-lowest, **options)

    def separable(**tensors):
        return ops.chunked_attention_sinusoidal(**tensors, backend="triton", **options)

    def plain(**tensors):
        # In fp32 the series itself costs rounding, about 2.5 times the table's, in plain PyTorch too.
        if dtype != torch.float32:
            return by_table(**tensors, attend=eager_attention)
        return ops.chunked_attention_sinusoidal(**tensors, backend="reference", **options)

    results = {}
    for name, kind, function in (
        ("gold", torch.float64, by_table),
        ("torch", dtype, plain),
        ("ours", dtype, separable),
    ):
        leaves = {key: x.detach().to(kind).requires_grad_() for key, x in inputs.items()}
        out = function(**leaves)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream.to(kind))
        results[name] = (out.detach(), *gradients)
    for name, ours, baseline, gold in zip(("out", *inputs), results["ours"], results["torch"], results["gold"]):
        assert_no_worse_than_torch(name, ours, baseline, gold)
    flat = {name: x.double() for name, x in inputs.items()} | {"projection": 0 * inputs["projection"].double()}
    moved = relative_error(by_table(**flat), results["gold"][0])
    tolerance = 2 * relative_error(results["torch"][0], results["gold"][0]) + 4 * torch.finfo(dtype).eps
    print(f"without positions: moves by {moved / tolerance:.0f} tolerances")
    assert moved > 5 * tolerance
    return results["ours"]


@needs_kernels
@pytest.mark.parametrize(("shape", "dtype", "options"), CASES.values(), ids=CASES.keys())
def test_matches_the_table(shape, dtype, options, device, monkeypatch):
    from bestrq2.kernels.chunked_attention import sinusoidal_launch

    launched = []
    launch = sinusoidal_launch.forward
    monkeypatch.setattr(sinusoidal_launch, "forward", lambda *inputs: launched.append(1) or launch(*inputs))
    compare(shape, dtype, device, **options)
    assert launched, "the kernels, not what they replace"


@needs_kernels
def test_is_deterministic(device):
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(compare((1, 2, 67, 67, 16), torch.float32, device, **BAND))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_kernels
def test_padding_may_hold_nan(device):
    from bestrq2 import ops

    tensors = [torch.randn(2, 2, 50, 16, device=device) for _ in "qkv"]
    for x in tensors:
        x[0, :, 31:] = x[1] = float("nan")
    tensors += [torch.randn(2, 16, 24, device=device), *torch.randn(2, 2, 16, device=device)]
    names = ("query", "key", "value", "projection", "content_bias", "position_bias")
    leaves = {name: x.requires_grad_() for name, x in zip(names, tensors)}
    lengths = torch.tensor([31, 0], device=device)
    out = ops.chunked_attention_sinusoidal(**leaves, lengths=lengths, chunk_size=8, left_context=8, backend="triton")
    gradients = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))
    for result in (out, *gradients):
        assert torch.isfinite(result).all()
    for result in (out, *gradients[:3]):
        assert not result[1].any()
        assert not result[0, :, 31:].any()
        assert result[0, :, :31].any()


@needs_kernels
def test_without_biases_and_empty(device):
    from bestrq2 import ops

    for frames in (0, 33):
        tensors = [torch.randn(1, 2, frames, 16, device=device, requires_grad=True) for _ in "qkv"]
        projection = torch.randn(2, 16, 24, device=device, requires_grad=True)
        results = []
        for backend in ("triton", "reference"):
            out = ops.chunked_attention_sinusoidal(*tensors, projection=projection, **BAND, backend=backend)
            results.append((out, *torch.autograd.grad(out.sin().sum(), [*tensors, projection])))
        for ours, expected in zip(*results):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_larger_than_the_kernels_are_built_for(device, monkeypatch):
    """Head size 160: the channels are appended."""
    from bestrq2.kernels.chunked_attention import sinusoidal_launch

    from bestrq2 import ops

    monkeypatch.setattr(sinusoidal_launch, "forward", None)
    tensors = [torch.randn(1, 1, 20, 160, device=device) for _ in "qkv"]
    projection = torch.randn(1, 160, 24, device=device) / 12**0.5
    ours, expected = (
        ops.chunked_attention_sinusoidal(*tensors, projection=projection, **BAND, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_opcheck(device):
    from bestrq2 import ops  # noqa: F401  registers them

    tensors = [torch.randn(2, 12, 2, 16, device=device).transpose(1, 2) for _ in "qkv"]
    tensors += [torch.randn(2, 16, 24, device=device), *torch.randn(2, 2, 16, device=device)]
    tensors = [x.detach().requires_grad_() for x in tensors]
    key_mask, lengths = torch.rand(2, 12, device=device) < 0.8, torch.tensor([12, 7], device=device)
    arguments = (*tensors, lengths, None, key_mask, 5, 7, 2, 0, 0.3, 10000.0, "triton")
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention_sinusoidal.default, arguments)
    out, lse = torch.ops.bestrq2.chunked_attention_sinusoidal.default(*arguments)
    detached = [x.detach() if torch.is_tensor(x) else x for x in (torch.randn_like(out), out, lse, *arguments)]
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention_sinusoidal_backward.default, tuple(detached))


@needs_kernels
def test_compiles_once_for_every_length(device):

    from bestrq2 import ops

    def attend(query, key, value, projection):
        window = {"chunk_size": 7, "left_context": 10}
        return ops.chunked_attention_sinusoidal(query, key, value, projection=projection, **window, backend="triton")

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    projection = torch.randn(2, 16, 24, device=device, requires_grad=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames in (37, 50, 65):
            inputs = [*(torch.randn(1, 2, frames, 16, device=device, requires_grad=True) for _ in "qkv"), projection]
            results = []
            for function in (attend, compiled):
                out = function(*inputs)
                results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
            assert all(torch.equal(a, b) for a, b in zip(*results))
