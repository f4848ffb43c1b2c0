"""A kept codebook, and the CUDA streams and graphs that use it. Streams are stand-ins: no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")


class Stream:
    def __init__(self, number):
        self.cuda_stream, self.waited = number, []

    def record_event(self):
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def gpu(monkeypatch):
    """``split(codebook)`` on the stream ``gpu.stream``; ``gpu.prepared`` counts computations."""
    from bestrq2.kernels import quantize

    state = SimpleNamespace(stream=Stream(1), capturing=False, prepared=0, used_by=[])

    def prepare(codebook, multiple):
        state.prepared += 1
        part = SimpleNamespace(record_stream=lambda stream: state.used_by.append(stream.cuda_stream))
        return quantize.SplitCodebook(part, part, part, part)

    monkeypatch.setattr(quantize, "_PREPARED", type(quantize._PREPARED)())
    monkeypatch.setattr(quantize, "prepare", prepare)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    state.split = lambda codebook: quantize.cached_split(codebook, 64)
    return state


def codebook(place=64, version=0):
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=torch.float32,
        shape=(1, 8, 4),
        _version=version,
        stride=lambda: (32, 4, 1),
        data_ptr=lambda: place,
        is_inference=lambda: False,
        detach=lambda: None,
    )


def test_another_stream_waits_once_for_the_computation(gpu):
    first = gpu.split(codebook())
    assert gpu.split(codebook()) is first
    assert gpu.stream.waited == []
    gpu.stream = Stream(2)
    assert gpu.split(codebook()) is first
    assert gpu.split(codebook()) is first
    assert gpu.stream.waited == ["event of 1"]
    assert set(gpu.used_by) == {2}
    assert gpu.prepared == 1


def test_a_graph_computes_its_own(gpu):
    """Neither memory that may be freed before a replay nor a codebook as it was when the graph was captured."""
    kept = gpu.split(codebook())
    gpu.capturing = True
    assert gpu.split(codebook()) is not kept
    assert gpu.split(codebook(place=128)) is not kept
    gpu.capturing = False
    gpu.split(codebook(place=128))
    assert gpu.split(codebook()) is kept
    assert gpu.prepared == 4


def test_a_codebook_that_changes_and_the_ninth(gpu):
    first = gpu.split(codebook())
    assert gpu.split(codebook(version=1)) is not first
    for place in range(64, 64 * 9, 64):
        gpu.split(codebook(place, version=2))
    assert gpu.split(codebook()) is not first
