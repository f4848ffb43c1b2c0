"""Tests of the operations that need a GPU: every GPU backend and dtype, rows of every size, graphs, compilation."""

import pytest
import torch
from cross_entropy_cases import grads_of
from cross_entropy_cases import make as make_cross_entropy
from quantize_cases import cosines, count_wrong, problem, rows_of_extreme_size
from short_attention_cases import SHAPES, compare_self, compare_separate, packed

from bestrq2 import ops
from bestrq2.layers import attention
from bestrq2.layers.attention import self_attend
from bestrq2.layers.short_attention import short_attention, short_self_attention

pytestmark = pytest.mark.gpu
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if request.param not in ops.available_backends():
        pytest.skip(f"backend {request.param} is not available")
    return request.param


def on_gpu(*tensors):
    return [tensor.cuda() for tensor in tensors]


@by_dtype
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize(
    ("rows", "features", "dims", "codes", "books"), [(1000, 80, 16, 1000, 3), (333, 37, 13, 131, 1)]
)
def test_codes_are_exact(backend, dtype, normalize, rows, features, dims, codes, books):
    x, projection, codebook = on_gpu(*problem(rows, features, dims, codes, books, offset=-5.0, scale=3.0))
    x = x.to(dtype)
    found = ops.quantize(x, projection, codebook, normalize=normalize, backend=backend)
    for book in range(books):
        wrong, _ = count_wrong(found[:, book], x, projection[book], codebook[book], normalize == "layer_norm")
        assert wrong == 0


@by_dtype
def test_rows_at_the_ends_of_the_range(backend, dtype):
    _, projection, codebook = problem(2, 64)
    for extreme, ordinary in rows_of_extreme_size(70):
        if extreme.dtype == dtype:
            codes = ops.quantize(*on_gpu(extreme, projection, codebook), backend=backend)
            assert count_wrong(codes.cpu(), ordinary, projection, codebook)[0] == 0


def test_rows_do_not_depend_on_the_batch(backend):
    """Also across the number of rows at which other tiles are used, where another matrix instruction may be."""
    x, projection, codebook = on_gpu(*problem(70_001, 64, 16, 1024))
    whole = ops.quantize(x, projection, codebook, backend=backend)
    for part in (x[:1], x[5:300], x[60_000:]):
        begin = (part.data_ptr() - x.data_ptr()) // (4 * 64)
        found = ops.quantize(part, projection, codebook, backend=backend)
        assert torch.equal(found, whole[begin : begin + len(part)])
    assert count_wrong(whole.cpu(), x.cpu(), projection.cpu(), codebook.cpu())[0] == 0


def test_rows_that_are_not_finite_get_no_code(backend):
    x, projection, codebook = on_gpu(*problem(9))
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    codes = ops.quantize(x, projection, codebook, backend=backend)
    assert (codes < 0).nonzero().flatten().tolist() == [3, 4]
    mask = torch.ones(9, dtype=torch.bool, device="cuda")
    mask[3:5] = False
    ops.check_codes(ops.quantize(x, projection, codebook, mask=mask, backend=backend), mask)


def test_ties_go_to_the_lowest_index(backend):
    x, projection, codebook = problem(500)
    doubled = codebook.repeat_interleave(3, 0)
    once = ops.quantize(*on_gpu(x, projection, codebook), backend=backend)
    assert torch.equal(ops.quantize(*on_gpu(x, projection, doubled), backend=backend), 3 * once)
    assert cosines(x, projection, codebook).argmax(1).eq(once.cpu()).float().mean() > 0.99


def test_codes_on_a_stream_that_did_not_prepare_the_codebook(backend):
    x, projection, codebook = on_gpu(*problem(300))
    expected = ops.quantize(x, projection, codebook, backend=backend)
    unknown, first, second = codebook.clone(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(200_000_000)
        ops.quantize(x, projection, unknown, backend=backend)
    with torch.cuda.stream(second):
        codes = ops.quantize(x, projection, unknown, backend=backend)
    torch.cuda.synchronize()
    assert torch.equal(codes, expected)


def test_codes_replay_in_a_cuda_graph(backend):
    """Also of a codebook that was changed, or pushed out of what is kept, since the capture."""
    x, projection, codebook = on_gpu(*problem(300))
    other = codebook.flip(0)
    ops.quantize(x, projection, codebook, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = ops.quantize(x, projection, codebook, backend=backend)
    codebook.copy_(other)
    for number in range(20):
        ops.quantize(x, projection, other * (number + 1), backend=backend)
    graph.replay()
    assert torch.equal(codes, ops.quantize(x, projection, other, backend=backend))


@by_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_cross_entropy_at_sizes_of_several_chunks(dtype, masked, recompute):
    from accuracy import assert_no_worse_than_torch
    from cross_entropy_cases import plain

    hidden, weight, targets, bias, mask, _ = make_cross_entropy((3000,), 72, 10_000, dtype, "cuda")
    mask = mask if masked else torch.ones_like(mask)

    def ours(h, w, b):
        return ops.masked_cross_entropy(
            h, w, targets, bias=b, mask=mask if masked else None, recompute=recompute, backend="triton"
        )

    def eager(h, w, b):
        return plain(h, w, targets, b, mask.to(h.dtype), "mean")

    value, gradients = grads_of(ours, (hidden, weight, bias))
    base, base_gradients = grads_of(eager, (hidden, weight, bias))
    gold, gold_gradients = grads_of(eager, (hidden.double(), weight.double(), bias.double()))
    assert_no_worse_than_torch("loss", value, base, gold)
    for name, a, b, c in zip(("hidden", "weight", "bias"), gradients, base_gradients, gold_gradients):
        assert_no_worse_than_torch(name, a, b, c)


def attention_inputs(dtype, frames=150, dim=64):
    shapes = [(2, frames, 3, dim)] * 3 + [(3, 2 * frames - 1, dim), (3, dim), (3, dim)]
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    return [(x.transpose(1, 2) if x.dim() == 4 else x).requires_grad_() for x in tensors]


def attend(query, key, value, position, content_bias, position_bias):
    biases = {"position": position, "content_bias": content_bias, "position_bias": position_bias}
    return ops.chunked_attention(query, key, value, chunk_size=16, left_context=48, backend="triton", **biases)


def test_attention_replays_in_a_cuda_graph():
    inputs = attention_inputs(torch.bfloat16)
    upstream = torch.randn_like(attend(*inputs))

    def step():
        out = attend(*inputs)
        return out, *torch.autograd.grad(out, inputs, upstream)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


@by_dtype
def test_attention_under_torch_compile(dtype):
    inputs = attention_inputs(dtype)
    plain, compiled = attend(*inputs), torch.compile(attend, fullgraph=True)(*inputs)
    assert torch.equal(plain, compiled)
    upstream = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(plain, inputs, upstream), torch.autograd.grad(compiled, inputs, upstream)):
        assert torch.equal(a, b)


@by_dtype
def test_attention_and_quantize_are_deterministic(dtype):
    inputs = attention_inputs(dtype, frames=700)
    upstream = torch.randn_like(attend(*inputs))
    first, second = (torch.autograd.grad(attend(*inputs), inputs, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


by_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@by_half
@pytest.mark.parametrize(("tokens", "dim", "padded", "first"), SHAPES)
def test_short_attention(tokens, dim, padded, first, dtype):
    if tokens > attention.GPU_KEYS and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no tile of more than 128 keys on this GPU")
    compare_self(short_self_attention, tokens, dim, padded, first, dtype, "cuda", heads=12)


@by_half
@pytest.mark.parametrize(("queries", "keys"), [(40, 70), (90, 20), (33, 33), (128, 128)])
def test_short_attention_of_separate_inputs(queries, keys, dtype):
    compare_separate(short_attention, queries, keys, 64, dtype, "cuda")


@by_half
def test_short_attention_under_torch_compile(dtype):
    """One graph for every number of tokens up to the limit of the kernel, one for those above it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(self_attend, backend=counter, fullgraph=True)
    for tokens in (20, 64, 65, 100, attention.GPU_KEYS, attention.GPU_KEYS + 40):
        qkv = packed(tokens, 64, dtype, "cuda")
        torch._dynamo.maybe_mark_dynamic(qkv, 1)
        plain, other = self_attend(qkv), compiled(qkv)
        upstream = torch.randn_like(plain)
        gradients = [torch.autograd.grad(out, qkv, upstream)[0] for out in (plain, other)]
        if tokens <= attention.GPU_KEYS:
            assert "bestrq2.short_attention" in str(counter.graphs[-1].code)
            assert counter.frame_count == 1
            assert torch.equal(plain, other)
            assert torch.equal(*gradients)
    assert counter.frame_count == 2
    assert "bestrq2.short_attention" not in str(counter.graphs[-1].code)


def test_short_attention_is_deterministic():
    qkv = packed(77, 64, torch.bfloat16, "cuda", heads=12, clips=64)
    upstream = torch.randn(64, 12, 77, 64, device="cuda", dtype=torch.bfloat16)
    first, second = (torch.autograd.grad(short_self_attention(qkv), qkv, upstream)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, projection, codebook = problem(100)
    first = ops.quantize(*on_gpu(x, projection, codebook), backend=backend)
    second = ops.quantize(*(tensor.to("cuda:1") for tensor in (x, projection, codebook)), backend=backend)
    assert torch.equal(first.cpu(), second.cpu())
