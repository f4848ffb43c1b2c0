"""A call as CUDA graphs: what the GPU needs for it when no launch is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, first

WARM_CALLS = 3


@dataclass
class _Graphs:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph | None
    output: Tensor
    gradients: tuple[Tensor, ...]


class _Replay(torch.autograd.Function):
    """Forward and backward each replay their graph, on the buffers of the capture."""

    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, *leaves: Tensor) -> Tensor:
        ctx.graphs = graphs
        graphs.forward.replay()
        return graphs.output.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # the upstream gradient of the capture
        assert ctx.graphs.backward is not None
        ctx.graphs.backward.replay()
        return None, *(gradient.detach() for gradient in ctx.graphs.gradients)


def captured(case: Case, call: Callable[[], Any]) -> Callable[[], Tensor]:
    """``call`` and its backward captured as CUDA graphs, replayed by what is returned.

    Inputs, upstream gradient and results stay where they were at the capture.
    """
    stream = torch.cuda.Stream(case.device)
    stream.wait_stream(torch.cuda.current_stream(case.device))
    with torch.cuda.stream(stream):  # compilation, library handles and caches may not fall into the capture
        for _ in range(WARM_CALLS):
            output = first(call())
            if case.differentiable:
                case.backward(output)
    torch.cuda.current_stream(case.device).wait_stream(stream)
    forward = torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward):
        output = first(call())
    if not case.differentiable:
        graphs = _Graphs(forward, None, output, ())
        return lambda: _Replay.apply(graphs)
    backward = torch.cuda.CUDAGraph()
    with torch.cuda.graph(backward, pool=forward.pool()):
        gradients = case.backward(output)
    graphs = _Graphs(forward, backward, output.detach(), tuple(gradients))
    return lambda: _Replay.apply(graphs, *case.leaves())
