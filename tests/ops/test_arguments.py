"""Arguments of the wrong kind, in every operation alike: the message names the argument and what was received."""

import math

import numpy as np
import pytest
import torch

from bestrq2 import ops

ARRAY = np.zeros((2, 3), dtype=np.float32)


def quantize(**changes):
    arguments = {"x": torch.zeros(3, 8), "projection": torch.zeros(8, 4), "codebook": torch.zeros(5, 4)}
    return ops.quantize(**(arguments | changes))


def masked_cross_entropy(**changes):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    return ops.masked_cross_entropy(**(arguments | changes))


def _attention_inputs():
    query, key, value = torch.arange(3 * 20 * 4.0).view(3, 1, 1, 20, 4).sin()
    return {"query": query, "key": key, "value": value, "chunk_size": 4, "left_context": 4}


def chunked_attention(**changes):
    return ops.chunked_attention(**(_attention_inputs() | {"position": torch.ones(1, 59, 4)} | changes))


REQUIRED = {
    quantize: ("x", "projection", "codebook"),
    masked_cross_entropy: ("hidden", "weight", "targets"),
    chunked_attention: ("query", "key", "value"),
}
OPTIONAL = {
    quantize: ("mask",),
    masked_cross_entropy: ("mask", "bias"),
    chunked_attention: ("lengths", "starts", "key_mask", "position", "content_bias", "position_bias"),
}
CALLS = pytest.mark.parametrize("call", REQUIRED, ids=lambda call: call.__name__)


@CALLS
def test_what_is_no_tensor_is_named(call):
    for name in REQUIRED[call] + OPTIONAL[call]:
        expected = rf"{call.__name__}: {name} must be a torch.Tensor"
        for value, received in (([[1.0]], "a list"), (ARRAY, "a numpy.ndarray"), (3, "3"), ("x", "'x'")):
            with pytest.raises(TypeError, match=rf"{expected}( or None)?, got {received}$"):
                call(**{name: value})
    for name in REQUIRED[call]:
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got None"):
            call(**{name: None})
    with pytest.raises(TypeError, match=r"must be a dense tensor, got one of layout torch.sparse_coo"):
        call(**{REQUIRED[call][0]: torch.zeros(3, 8).to_sparse()})


@CALLS
@pytest.mark.parametrize("backend", [3, ["cpu"], torch.device("cpu"), ""], ids=str)
def test_what_is_no_backend_is_named(call, backend):
    with pytest.raises(ValueError, match=r"unknown backend .*: expected one of triton"):
        call(backend=backend)


@pytest.mark.parametrize("value", [4.0, True, "4", torch.tensor(4), [4], 4.5], ids=str)
@pytest.mark.parametrize("name", ["chunk_size", "left_context", "right_context", "query_offset", "position_zero"])
def test_what_is_no_integer_is_named(name, value):
    received = "a torch.Tensor" if torch.is_tensor(value) else "a list" if isinstance(value, list) else repr(value)
    with pytest.raises(TypeError, match=rf"{name} must be an integer.*, got {received}$"):
        chunked_attention(**{name: value})
    if name in ("chunk_size", "left_context", "right_context"):
        with pytest.raises(TypeError, match=rf"{name} must be an integer or None \(.*\), got {received}$"):
            ops.ChunkLayout(**{name: value})
    with pytest.raises(TypeError, match=rf"max_rows must be an integer or None, got {received}$"):
        masked_cross_entropy(mask=torch.ones(3, dtype=torch.bool), max_rows=value)


def test_numpy_integers_are_integers():
    for kind in (np.int64, np.int32, np.uint8):
        sizes = {name: kind(4) for name in ("chunk_size", "left_context", "right_context", "query_offset")}
        same = {name: int(size) for name, size in sizes.items()}
        assert torch.equal(chunked_attention(**sizes), chunked_attention(**same))
        assert torch.equal(chunked_attention(position_zero=kind(30)), chunked_attention(position_zero=30))
        layout = ops.ChunkLayout(kind(4), kind(8))
        assert layout == ops.ChunkLayout(4, 8)
        assert {type(size) for size in layout.window.values()} == {int}
        mask = torch.ones(3, dtype=torch.bool)
        assert masked_cross_entropy(mask=mask, max_rows=kind(3)) == masked_cross_entropy(mask=mask)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (chunked_attention, "scale"),
        (masked_cross_entropy, "label_smoothing"),
        (masked_cross_entropy, "z_loss"),
    ],
)
def test_what_is_no_number_is_named(call, name):
    for value in ("0.1", None, True, torch.tensor(0.1), [0.1]):
        if not (name == "scale" and value is None):
            with pytest.raises(TypeError, match=f"{call.__name__}: {name} must be a number, got "):
                call(**{name: value})
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"{call.__name__}: {name} must be finite, got {value}"):
            call(**{name: value})
    for value in (1, np.float32(1), np.int64(1)):
        assert torch.equal(call(**{name: value}), call(**{name: 1.0}))


def test_numbers_out_of_range():
    for offset in (2**29, 2**62, 2**63 - 1):
        with pytest.raises(ValueError, match=rf"query_offset must be less than 2\^29, got {offset}"):
            chunked_attention(query_offset=offset)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2.0"):
        masked_cross_entropy(label_smoothing=2)


def test_sizes_may_be_dynamic():
    """Integers that torch.compile keeps symbolic: nothing is compiled again for other lengths and windows."""

    def attend(query, size, left, offset):
        window = {"chunk_size": size, "left_context": left, "query_offset": offset, "scale": 0.3}
        return ops.chunked_attention(query, query, query, position=torch.ones(1, 199, 4), **window)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, *sizes in ((20, 4, 8, 2), (33, 5, 3, 7), (47, 7, 9, 11)):
            query = torch.randn(2, 1, frames, 4)
            torch.testing.assert_close(compiled(query, *sizes), attend(query, *sizes))


def test_autocast_casts_only_floating_tensors():
    """An integer or complex query would otherwise be rounded, or lose its imaginary part, without a word."""
    wrong = (torch.int64, torch.complex64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in wrong:
            with pytest.raises(ValueError, match=f"query must be fp32, bf16, fp16 or fp64, got {dtype}"):
                chunked_attention(query=torch.zeros(1, 1, 20, 4, dtype=dtype))
        with pytest.raises(ValueError, match=r"must share a dtype, got .*bfloat16, .*float64, .*bfloat16"):
            chunked_attention(key=torch.zeros(1, 1, 20, 4, dtype=torch.float64))
    for dtype in wrong:
        with pytest.raises(ValueError, match=f"position must be floating, got {dtype}"):
            chunked_attention(position=torch.zeros(1, 59, 4, dtype=dtype))
        with pytest.raises(ValueError, match=f"content_bias must be floating, got {dtype}"):
            chunked_attention(content_bias=torch.zeros(1, 4, dtype=dtype))


@pytest.mark.filterwarnings("ignore::UserWarning")  # no batching rule: PyTorch runs the call once for each item
def test_transforms_of_torch_func(device):
    """Accepted arguments give the right result; rejected ones raise an error with the operation's name."""
    query, hidden = torch.randn(2, 1, 1, 20, 4), torch.randn(3, 4)
    batched = torch.func.vmap(lambda query: chunked_attention(query=query))(query)
    assert torch.equal(batched, torch.stack([chunked_attention(query=x) for x in query]))
    codes = torch.func.vmap(lambda x: quantize(x=x))(torch.randn(2, 3, 8))
    assert codes.shape == (2, 3)
    for call, argument in (
        (lambda x: chunked_attention(query=x).sum(), query[0]),
        (lambda x: masked_cross_entropy(hidden=x), hidden),
    ):
        for transform in (torch.func.grad, torch.func.hessian, torch.func.jacrev):
            with pytest.raises(RuntimeError, match=r"(attention|entropy) does not run inside .* torch.func"):
                transform(call)(argument)
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            torch.func.jvp(call, (argument,), (argument,))
    with pytest.raises(RuntimeError, match="masked_cross_entropy does not run inside"):
        torch.func.vmap(lambda x: masked_cross_entropy(hidden=x))(hidden[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_is_none_of_our_business(dtype):
    """The kernels write fp32 into what the host allocates, whatever torch.set_default_dtype says."""
    inputs = {name: x for name, x in _attention_inputs().items() if torch.is_tensor(x)}
    inputs |= {"position": torch.randn(1, 59, 4), "content_bias": torch.randn(1, 4)}
    head = {"hidden": torch.randn(9, 4), "weight": torch.randn(5, 4), "bias": torch.randn(5)}
    targets, mask = torch.arange(9) % 5, torch.rand(9) < 0.7

    def results():
        for function, tensors, options in (
            (ops.chunked_attention, inputs, {"chunk_size": 4, "left_context": 4}),
            (ops.masked_cross_entropy, head, {"targets": targets, "mask": mask, "reduction": "sum"}),
            (ops.masked_cross_entropy, head, {"targets": targets, "mask": mask}),
            (ops.masked_cross_entropy, head, {"targets": targets, "mask": torch.zeros(9, dtype=torch.bool)}),
        ):
            leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
            out = function(**leaves, **options)
            yield from (out, *torch.autograd.grad(out.sum(), list(leaves.values())))
            with torch.no_grad():
                yield function(**leaves, **options)

    expected = list(results())
    torch.set_default_dtype(torch.float64)
    try:
        ours = list(results())
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in ours] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_check_codes_takes_tensors():
    with pytest.raises(TypeError, match=r"check_codes: codes must be a torch.Tensor, got a list"):
        ops.check_codes([1, -1])
    with pytest.raises(TypeError, match=r"check_codes: mask must be a torch.Tensor or None, got a list"):
        ops.check_codes(torch.tensor([1, -1]), [True, False])


def test_a_removed_operation_names_its_replacement():
    with pytest.raises(AttributeError, match=r"was removed: .* chunked_attention\(..., position=table\)"):
        ops.chunked_attention_sinusoidal  # noqa: B018
