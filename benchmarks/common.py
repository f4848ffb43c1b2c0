"""Parts of a benchmark of an operation: a case, its providers, and one row for each provider.

One file per operation, ``benchmarks/ops/<op>.py``, listed in :data:`OPS`, offers seven names:

| name | meaning |
|---|---|
| ``OP`` | the operation's name, as in ``bestrq2.ops`` |
| ``BASELINE`` | the provider that ``speedup`` is relative to: the published eager way |
| ``SHAPES`` | ``{"cpu": (...), "cuda": (...)}``: the shape labels of a full run |
| ``QUICK_SHAPES`` | labels of ``--quick`` (two cores: a few seconds each for the slowest peer) |
| ``DTYPES`` | ``{"cpu": (...), "cuda": (...)}``: names of the input dtypes of a full run |
| ``make_case(shape, dtype, device)`` | a :class:`Case`; must also parse labels that are not in ``SHAPES`` |
| ``PROVIDERS`` | a list of :class:`Provider`, ours first |

A complete operation (``y = x ** 2``, differentiable) looks like this; :func:`bestrq2_providers` makes ours::

    OP, BASELINE = "square", "eager"
    SHAPES, QUICK_SHAPES = {"cpu": ("4096",), "cuda": ("1000000",)}, ("4096",)
    DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}

    def make_case(shape, dtype, device):
        n = int(shape)
        x = seeded(n, dtype=dtype, device=device).requires_grad_()
        return Case(
            op=OP, shape=shape, dtype=dtype, device=device,
            inputs={"x": x}, differentiable=("x",), upstream=seeded(n, dtype=dtype, device=device, seed=1),
            work=Work(flops=n, bytes=2 * n * x.element_size()),
            backward_work=Work(flops=2 * n, bytes=3 * n * x.element_size()),
            gold=lambda case: gold_of(case, lambda x: x**2),
        )

    PROVIDERS = [
        *bestrq2_providers(OP),
        Provider("eager", lambda case: lambda: case.inputs["x"] * case.inputs["x"]),
        Provider("torch.compile", lambda case: compiled(lambda: case.inputs["x"] * case.inputs["x"])),
        Provider("some peer", build_some_peer, needs="some_peer"),  # skipped, by name, where it is not installed
    ]

``Provider.build(case)`` does what a user does once (construct modules, compile); the function it returns is timed. It
returns the output, or a tuple whose first item is the output; gradients are taken with respect to the tensors
``case.inputs[name]`` for ``name in case.differentiable``. It raises :class:`Skip` where it does not apply. Compare only
equals: a provider that needs another layout does the conversion inside the timed call, or states it in ``note``.

:func:`measure` (measure.py) turns a case and providers into rows: peak memory first, then errors, then interleaved
timings.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import Work

__all__ = [
    "FIELDS",
    "OPS",
    "Case",
    "Provider",
    "Skip",
    "Work",
    "bestrq2_providers",
    "compiled",
    "evaluate",
    "gold_of",
    "load_operation",
    "relative_errors",
    "seeded",
]

OPS = ("quantize", "masked_cross_entropy", "chunked_attention", "short_attention", "encode", "step")
"""Everything that has a benchmark, in the order of a full run."""

FIELDS = (
    *("op", "shape", "dtype", "provider", "fwd_ms", "bwd_ms", "peak_mb", "pct_of_limit", "max_error"),
    *("speedup", "status", "note", "cache", "fwd_p20", "fwd_p80", "bwd_p20", "bwd_p80", "repeats", "limit_ms"),
    *("ceiling_tflops", "ceiling_gb_per_s", "ceiling_source"),
    *("device", "threads", "load", "python", "torch", "triton", "bestrq2", "commit", "date", "command"),
)
"""Columns of every result file. docs/benchmarks.md says what each means."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float64: 1e-10}
"""``max_error`` above this flags a row as wrong: far above honest rounding, far below a wrong formula."""

Results = Mapping[str, Tensor]  # "out", then "grad <input>" for every differentiable input


def load_operation(op: str) -> Any:
    """The module of an operation's benchmark: ``benchmarks/ops/<op>.py``, or ``benchmarks/<op>.py``."""
    name = f"benchmarks.ops.{op}"
    return importlib.import_module(name if importlib.util.find_spec(name) else f"benchmarks.{op}")


class Skip(Exception):
    """Raised by ``Provider.build`` or its call: the provider does not apply here; the text is the reason shown."""


@dataclass
class Case:
    """One operation at one shape, dtype and device: what every provider of a group computes.

    ``upstream`` is the gradient of the output (None: the output is a scalar). ``work`` and ``backward_work`` state the
    FLOPs and bytes that no implementation can avoid. ``gold(case)`` gives the fp64 results; ``check(results, gold)``
    the error and a remark; an error above ``tolerance`` marks the row as wrong.
    """

    op: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    inputs: dict[str, Any]
    work: Work
    gold: Callable[[Case], Results]
    backward_work: Work | None = None
    differentiable: tuple[str, ...] = ()
    upstream: Tensor | None = None
    check: Callable[[Results, Results], tuple[float, str]] = field(default_factory=lambda: relative_errors)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if bool(self.differentiable) != (self.backward_work is not None):
            raise ValueError(f"{self.op}: a case with differentiable inputs states backward_work, one without does not")
        if self.tolerance is None:
            self.tolerance = TOLERANCES[self.dtype]

    @cached_property
    def gold_results(self) -> Results:
        return self.gold(self)

    def errors(self, results: Results) -> tuple[float, str]:
        """Error of a provider's results against fp64, and a remark for the row."""
        return self.check(results, self.gold_results)

    def leaves(self) -> list[Tensor]:
        return [self.inputs[name] for name in self.differentiable]

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the differentiable inputs; exactly what ``bwd_ms`` times."""
        return torch.autograd.grad(output, self.leaves(), self.upstream, allow_unused=True)


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation: ours, the specification, or a peer.

    ``needs`` is the import name of the package it takes; ``on`` the device types it is for; ``note`` is shown in its
    rows. ``floor``: it computes less than the operation, so its errors are not compared.
    """

    name: str
    build: Callable[[Case], Callable[[], Any]]
    needs: str | None = None
    on: tuple[str, ...] = ("cpu", "cuda")
    note: str = ""
    floor: bool = False

    def prepare(self, case: Case) -> Callable[[], Any]:
        """Build the call for a case, or raise :class:`Skip` with the reason."""
        if case.device.type not in self.on:
            raise Skip(f"only for {' and '.join(self.on)}")
        if self.needs and importlib.util.find_spec(self.needs) is None:
            raise Skip(f"not installed (no module {self.needs!r})")
        return self.build(case)


def first(output: Any) -> Tensor:
    """The differentiable output of a call that may return a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def evaluate(case: Case, call: Callable[[], Any]) -> dict[str, Tensor]:
    """Run a prepared call once, with its backward where the case has one."""
    output = first(call())
    results = {"out": output.detach()}
    if case.differentiable:
        for name, gradient in zip(case.differentiable, case.backward(output)):
            if gradient is None:
                raise RuntimeError(f"the output does not depend on {name}")
            results[f"grad {name}"] = gradient
    return results


def relative_errors(results: Results, gold: Results) -> tuple[float, str]:
    """Largest ``max|value - gold| / max|gold|`` over the output and all gradients, and which of them it is."""
    worst, where = 0.0, "out"
    for name, expected in gold.items():
        value, expected = results[name].double(), expected.double()
        if value.shape != expected.shape:
            return float("inf"), f"{name} has shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
        if expected.numel() == 0:
            continue
        scale = expected.abs().max().item()
        error = (value - expected).abs().max().item() / (scale if scale > 0 else 1.0)
        if not error <= worst:  # also true for NaN
            worst, where = (error if error == error else float("inf")), name
    return worst, f"worst: {where}" if len(gold) > 1 else ""


def gold_of(case: Case, function: Callable[..., Any]) -> dict[str, Tensor]:
    """Run ``function(**inputs)`` (a reference) in float64 with gradients; every floating input is converted.

    Inputs are detached copies of the *rounded* inputs, so the error of a bf16 provider is its own arithmetic alone.
    """
    inputs = {
        name: value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs.items()
    }
    leaves = [inputs[name].requires_grad_() for name in case.differentiable]
    output = first(function(**inputs))
    results = {"out": output.detach()}
    if leaves:
        upstream = None if case.upstream is None else case.upstream.double()
        for name, gradient in zip(case.differentiable, torch.autograd.grad(output, leaves, upstream)):
            results[f"grad {name}"] = gradient
    return results


def seeded(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Standard normal values, drawn on the CPU in fp32: the same on every device and in every process."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype=dtype, device=device)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` as a careful user would: whole graph, static shapes. Compilation counts as warm-up."""
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def bestrq2_providers(op: str, call: Callable[..., Any] | None = None) -> list[Provider]:
    """Our operation: ``bestrq2`` (the backend it chooses by itself), then each backend by name.

    ``call(case, backend)`` runs it; by default ``ops.<op>(**case.inputs, backend=backend)``. ``reference`` is the
    plain PyTorch specification. On a machine with one fast backend two rows time the same code: their difference is the
    noise of the measurement. ``bestrq2 graph`` replays CUDA graphs: GPU time without that of the launches.
    """
    from benchmarks.graphs import captured
    from bestrq2 import ops

    def run(case: Case, backend: str | None) -> Any:
        return getattr(ops, op)(**case.inputs, backend=backend)

    call = call or run

    def build(backend: str | None) -> Callable[[Case], Callable[[], Any]]:
        def prepare(case: Case) -> Callable[[], Any]:
            if not hasattr(ops, op):
                raise Skip(f"bestrq2.ops has no {op}")
            return lambda: _explained(op, lambda: call(case, backend))

        return prepare

    def graph(case: Case) -> Callable[[], Any]:
        return captured(case, build(None)(case))

    return [
        Provider("bestrq2", build(None)),
        Provider("bestrq2 graph", graph, on=("cuda",), note="CUDA graphs of forward and backward"),
        *(Provider(name, build(name.split("[")[1][:-1])) for name in ("bestrq2[triton]", "bestrq2[cuda]")),
        Provider("bestrq2[cpu]", build("cpu"), on=("cpu",)),
        Provider("reference", build("reference")),
    ]


def _explained(op: str, call: Callable[[], Any]) -> Any:
    # The dispatch rule's refusals are reasons to skip; any other error of ours is a failure to show.
    try:
        return call()
    except RuntimeError as error:
        text = str(error)
        if text.startswith(f"{op}: backend") or text.startswith(f"{op}: no "):
            raise Skip(text.removeprefix(f"{op}: ")) from error
        raise


def select(providers: Sequence[Provider], wanted: Sequence[str] | None) -> list[Provider]:
    """Providers whose name contains one of the wanted words; all without words."""
    if not wanted:
        return list(providers)
    return [provider for provider in providers if any(word in provider.name for word in wanted)]
