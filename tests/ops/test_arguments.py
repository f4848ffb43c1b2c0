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


def chunked_attention_sinusoidal(**changes):
    return ops.chunked_attention_sinusoidal(**(_attention_inputs() | {"projection": torch.ones(1, 4, 8)} | changes))


REQUIRED = {
    quantize: ("x", "projection", "codebook"),
    masked_cross_entropy: ("hidden", "weight", "targets"),
    chunked_attention: ("query", "key", "value"),
    chunked_attention_sinusoidal: ("query", "key", "value", "projection"),
}
OPTIONAL = {
    quantize: ("mask",),
    masked_cross_entropy: ("mask", "bias"),
    chunked_attention: ("lengths", "starts", "key_mask", "position", "content_bias", "position_bias"),
    chunked_attention_sinusoidal: ("lengths", "starts", "key_mask", "content_bias", "position_bias"),
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
    for call in (chunked_attention, chunked_attention_sinusoidal)[: 1 if name == "position_zero" else 2]:
        with pytest.raises(TypeError, match=rf"{name} must be an integer.*, got {received}$"):
            call(**{name: value})
    if name in ("chunk_size", "left_context", "right_context"):
        with pytest.raises(TypeError, match=rf"{name} must be an integer or None \(.*\), got {received}$"):
            ops.ChunkLayout(**{name: value})
    with pytest.raises(TypeError, match=rf"max_rows must be an integer or None, got {received}$"):
        masked_cross_entropy(mask=torch.ones(3, dtype=torch.bool), max_rows=value)


def test_numpy_integers_are_integers():
    for kind in (np.int64, np.int32, np.uint8):
        sizes = {name: kind(4) for name in ("chunk_size", "left_context", "right_context", "query_offset")}
        for call in (chunked_attention, chunked_attention_sinusoidal):
            assert torch.equal(call(**sizes), call(**{name: int(size) for name, size in sizes.items()}))
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
        (chunked_attention_sinusoidal, "scale"),
        (chunked_attention_sinusoidal, "base"),
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
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 2.0"):
        masked_cross_entropy(label_smoothing=2)
    with pytest.raises(ValueError, match=r"base must be positive, got 0.0"):
        chunked_attention_sinusoidal(base=0)


@pytest.mark.parametrize("form", ["table", "sinusoidal"])
def test_sizes_may_be_dynamic(form):
    """Integers that torch.compile keeps symbolic: nothing is compiled again for other lengths and windows."""

    def attend(query, size, left, offset):
        window = {"chunk_size": size, "left_context": left, "query_offset": offset, "scale": 0.3}
        if form == "table":
            return ops.chunked_attention(query, query, query, position=torch.ones(1, 199, 4), **window)
        return ops.chunked_attention_sinusoidal(query, query, query, projection=torch.ones(1, 4, 8), **window)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, *sizes in ((20, 4, 8, 2), (33, 5, 3, 7), (47, 7, 9, 11)):
            query = torch.randn(2, 1, frames, 4)
            torch.testing.assert_close(compiled(query, *sizes), attend(query, *sizes))
