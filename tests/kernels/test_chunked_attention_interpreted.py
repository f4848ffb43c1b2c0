"""The Triton kernels of chunked attention in Triton's interpreter, against the float64 definition."""

import re
from functools import partial

import pytest
import torch
from interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels already run in this process")
def test_in_the_interpreter():
    counts = run_interpreted(__file__)
    assert re.search(r"\d+ passed, 1 skipped", counts), "more was skipped than this test itself"


needs_kernels = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or interpreter")

PADDED = {"lengths": torch.tensor([70, 33]), "starts": torch.tensor([0, 5])}
HOLES = torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.6
HOLES[0, 20:60] = False  # whole windows
CASES = {
    "chunk 16": ((1, 2, 70, 70, 16), torch.float32, {"chunk_size": 16, "left_context": 32}),
    "several chunks a tile, padding": (
        (2, 1, 70, 70, 16),
        torch.float32,
        {"chunk_size": 7, "left_context": 10, "right_context": 3, **PADDED},
    ),
    "nothing to see": ((2, 1, 30, 30, 16), torch.float32, {"lengths": torch.tensor([0, 30])}),
    "bounds beyond int32": (
        (2, 1, 30, 30, 16),
        torch.float32,
        {"lengths": torch.tensor([2**40, 2**63 - 1]), "starts": torch.tensor([-(2**40), 2**33])},
    ),
    "full, head size 12": ((1, 1, 70, 70, 12), torch.float32, {}),
    "streaming": (
        (1, 2, 9, 50, 16),
        torch.float32,
        {"chunk_size": 8, "left_context": 20, "right_context": 1, "query_offset": 41},
    ),
    "more queries than keys": ((1, 1, 80, 40, 16), torch.float32, {"chunk_size": 25, "left_context": 50}),
    "band": ((1, 1, 90, 90, 16), torch.float32, {"chunk_size": 1, "left_context": 9, "right_context": 4}),
    "fp16": ((1, 2, 70, 70, 32), torch.float16, {"chunk_size": 25, "left_context": 25}),
    "head size 96": ((1, 1, 40, 70, 96), torch.float32, {"chunk_size": 32, "left_context": 32, "query_offset": 30}),
    "head size 128": ((1, 1, 50, 50, 128), torch.float32, {"chunk_size": 16, "left_context": 16}),
    "head size 200": ((1, 1, 20, 40, 200), torch.float32, {"chunk_size": 16, "left_context": 16, "query_offset": 20}),
    "fp16, head size 128": ((1, 1, 70, 70, 128), torch.float16, {"chunk_size": 32, "left_context": 32}),
}


CASES |= {
    "bf16": ((1, 2, 70, 70, 32), torch.bfloat16, {"chunk_size": 25, "left_context": 25}),
    "bf16, head size 72": ((2, 1, 40, 70, 72), torch.bfloat16, {"chunk_size": 16, "left_context": 20, **PADDED}),
    "bf16, head size 128": ((1, 1, 70, 70, 128), torch.bfloat16, {"chunk_size": 32, "left_context": 32}),
}
CASES["key mask"] = ((2, 1, 70, 70, 16), torch.float32, {"chunk_size": 7, "left_context": 10, "key_mask": HOLES})
CASES["key mask, padding, fp16"] = (
    (2, 2, 40, 70, 16),
    torch.float16,
    {"chunk_size": 25, "left_context": 30, "right_context": 4, "query_offset": 30, "key_mask": HOLES, **PADDED},
)


def compare(shape, dtype, device, positions=True, **options):
    from accuracy import assert_no_worse_than_torch, eager_attention

    from bestrq2 import ops

    batch, heads, queries, keys, dim = shape
    reach = queries + keys + options.get("query_offset", 0)
    sizes = {
        "query": (batch, queries, heads, dim),
        "key": (batch, keys, heads, dim),
        "value": (batch, keys, heads, dim),
    }
    if positions:
        sizes |= {"position": (heads, 2 * reach + 1, dim), "content_bias": (heads, dim), "position_bias": (heads, dim)}
    inputs = {name: torch.randn(size, device=device).to(dtype) for name, size in sizes.items()}
    inputs = {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in inputs.items()}
    upstream = torch.randn(batch, heads, queries, dim, device=device).to(dtype)
    options = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    results = {}
    for name, kind, function in (
        ("gold", torch.float64, ops.reference.chunked_attention),
        ("torch", dtype, eager_attention),
        ("triton", dtype, partial(ops.chunked_attention, backend="triton")),
    ):
        leaves = {key: x.to(kind).requires_grad_() for key, x in inputs.items()}
        out = function(**leaves, **options)
        results[name] = (out, *torch.autograd.grad(out, list(leaves.values()), upstream.to(kind)))
    for name, ours, plain, gold in zip(("out", *inputs), results["triton"], results["torch"], results["gold"]):
        assert_no_worse_than_torch(name, ours, plain, gold)
    return results["triton"]


@needs_kernels
@pytest.mark.parametrize(("shape", "dtype", "options"), CASES.values(), ids=CASES.keys())
def test_matches_reference(shape, dtype, options, device):
    compare(shape, dtype, device, **options)


@needs_kernels
@pytest.mark.parametrize(("dim", "dtype"), [(16, torch.float32), (72, torch.bfloat16), (128, torch.float32)])
def test_without_positions(dim, dtype, device):
    """Heads of 72 channels have a tile of their own for this, fp32 heads of 128 a barrier."""
    shape, window = (2, 1, 40, 70, dim), {"chunk_size": 16, "left_context": 20}
    compare(shape, dtype, device, positions=False, **window, lengths=PADDED["lengths"])


@needs_kernels
def test_segments_of_the_band(device, monkeypatch):
    """The band in several segments, as a small budget forces it: key gradients are added up."""
    from bestrq2.kernels.chunked_attention import launch

    options = {"chunk_size": 7, "left_context": 10, "right_context": 3, "lengths": torch.tensor([50, 17])}
    monkeypatch.setattr(launch, "BAND_BYTES", 1)
    monkeypatch.setattr(launch, "SEGMENT_ROWS", 16)
    compare((2, 1, 50, 50, 16), torch.float32, device, **options)
    compare((1, 1, 40, 40, 16), torch.float32, device)  # full context, whose band is as wide as the sequence


@needs_kernels
def test_more_items_than_one_launch_takes(device, monkeypatch):
    """A grid has at most 65535 programs in its second dimension, one for an item and a head."""
    from bestrq2.kernels.chunked_attention import launch

    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.8
    bounds = {"lengths": torch.tensor([40, 3, 33]), "starts": torch.tensor([0, 0, 7]), "key_mask": mask}
    monkeypatch.setattr(launch, "MOST_PAIRS", 5)  # two items of two heads, then the last
    compare((3, 2, 40, 40, 16), torch.float32, device, chunk_size=8, left_context=16, **bounds)
    with pytest.raises(ValueError, match="at most 5 heads in a Triton call, got 6"):
        compare((1, 6, 20, 20, 16), torch.float32, device)


@needs_kernels
@pytest.mark.parametrize("offset", [0, 24, 5000])
def test_table_of_the_window_alone(offset, device, monkeypatch):
    """Segments whose windows end before the first key or begin behind the last one have no row of such a table."""
    from bestrq2.kernels.chunked_attention import launch

    from bestrq2 import ops

    monkeypatch.setattr(launch, "BAND_BYTES", 1)
    monkeypatch.setattr(launch, "SEGMENT_ROWS", 16)
    window = {"chunk_size": 4, "left_context": 3, "right_context": 2, "query_offset": offset, "position_zero": 5}
    inputs = [torch.randn(1, 2, frames, 16, device=device, requires_grad=True) for frames in (40, 30, 30)]
    table = torch.randn(2, 12, 16, device=device, requires_grad=True)  # offsets -5 to 6
    results = []
    for backend in ("reference", "triton"):
        out = ops.chunked_attention(*inputs, position=table, backend=backend, **window)
        results.append((out, *torch.autograd.grad(out.square().sum(), [*inputs, table])))
    assert results[0][0].any() == (offset < 30)
    for reference, ours in zip(*results):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("positions", [True, False])
def test_opcheck(positions, device):
    """Of forward and backward: schemas, fakes with their strides, autograd registration, tracing."""
    from bestrq2 import ops  # registers them

    assert "triton" in ops.available_backends()
    clips = 1 if positions else 2
    shapes = [(clips, 12, 2, 16)] * 3 + [(2, 23, 16), (2, 16), (2, 16)]
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    tensors = [(x.transpose(1, 2) if x.dim() == 4 else x).requires_grad_() for x in tensors]
    key_mask, lengths = torch.rand(clips, 12, device=device) < 0.8, torch.tensor([7], device=device)
    if not positions:
        tensors[3:], key_mask, lengths = [None] * 3, None, None
    arguments = (*tensors, lengths, None, key_mask, 5, 7, 2, 0, 11, 0.3, "triton")
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention.default, arguments)
    out, lse = torch.ops.bestrq2.chunked_attention.default(*arguments)
    detached = [x.detach() if torch.is_tensor(x) else x for x in (torch.randn_like(out), out, lse, *arguments)]
    torch.library.opcheck(torch.ops.bestrq2.chunked_attention_backward.default, tuple(detached))


@pytest.mark.skipif(not INTERPRETED, reason="lays tensors out in address space that a GPU would have to fill")
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "frame"])
def test_offsets_past_2_to_the_31(dim):
    """Strides that fit an int32, but whose products with an index do not."""
    from untouched import spread

    from bestrq2 import ops

    batch, heads = (3 if dim == axis else 1 for axis in (0, 1))  # an index of 2 takes such a stride past 2^31
    *tensors, upstream = torch.randn(4, batch, heads, 5, 16).half().unbind()
    tables = {"position": torch.randn(heads, 9, 16).half(), "key_mask": torch.rand(batch, 5) < 0.8}

    def run(make):
        inputs = [make(x).requires_grad_() for x in tensors]
        out = ops.chunked_attention(*inputs, **tables, chunk_size=2, left_context=2, backend="triton")
        return out, *torch.autograd.grad(out, inputs, make(upstream))

    for far, packed in zip(run(lambda x: spread(x, dim)), run(torch.clone)):
        assert packed.any()
        assert torch.equal(far, packed)


@needs_kernels
def test_is_deterministic(device):
    torch.manual_seed(4)
    first = compare((1, 1, 70, 70, 16), torch.float32, device, chunk_size=16, left_context=16)
    torch.manual_seed(4)
    second = compare((1, 1, 70, 70, 16), torch.float32, device, chunk_size=16, left_context=16)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
