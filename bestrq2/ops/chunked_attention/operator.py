"""The operators ``torch.ops.bestrq2.chunked_attention`` and its backward: backends, shapes for tracing, autograd."""

from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import choose_backend
from ..common.library import fragment
from ..common.native import triton_obstacle
from ..common.transforms import refuse_second_derivative
from . import cpu, reference
from .checks import check_table
from .layout import ChunkLayout


class Options(NamedTuple):
    """Arguments of the operators after query, key and value, in the order of their schema. Kernels read this record."""

    position: Tensor | None  # (H, R, d)
    content_bias: Tensor | None  # (H, d)
    position_bias: Tensor | None  # (H, d)
    lengths: Tensor | None  # (B,)
    starts: Tensor | None  # (B,)
    key_mask: Tensor | None  # (B, Tk)
    chunk_size: int | None
    left_context: int | None
    right_context: int | None
    query_offset: int
    position_zero: int
    scale: float
    backend: str

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        """The three that have a gradient."""
        return self.position, self.content_bias, self.position_bias

    @property
    def layout(self) -> ChunkLayout:
        return ChunkLayout(self.chunk_size, self.left_context, self.right_context)

    def keywords(self) -> dict[str, Any]:
        """As the keywords of the reference."""
        return {name: value for name, value in self._asdict().items() if name != "backend"}


_library = fragment()
_SCHEMA = (
    "Tensor? position, Tensor? content_bias, Tensor? position_bias, Tensor? lengths, Tensor? starts, "
    "Tensor? key_mask, SymInt? chunk_size, SymInt? left_context, SymInt? right_context, SymInt query_offset, "
    "SymInt position_zero, float scale, str backend"
)
_library.define(
    f"chunked_attention(Tensor query, Tensor key, Tensor value, {_SCHEMA}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "chunked_attention_backward(Tensor grad, Tensor out, Tensor logsumexp, Tensor query, Tensor key, Tensor value, "
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _choose(query: Tensor, backend: str) -> str:
    """The choice is made when the call runs, so that use_backend() also governs graphs that are already compiled."""
    obstacles = {
        "triton": lambda: _triton_obstacle(query),
        "cpu": lambda: cpu.obstacle(query),
        "reference": lambda: None,
    }
    return choose_backend("chunked_attention", backend or None, obstacles)


def _triton_obstacle(query: Tensor) -> str | None:
    if query.dtype == torch.float64:
        return "float64 runs on the reference backend only"
    if query.shape[-1] > cpu.MAX_HEAD_DIM:
        return f"head size {query.shape[-1]} exceeds {cpu.MAX_HEAD_DIM}"
    return triton_obstacle(query.device)


def _compiled(name: str) -> Any:
    """The module whose forward() and backward() run a compiled backend; triton is imported at the first call."""
    return cpu if name == "cpu" else import_module("bestrq2.kernels.chunked_attention.launch")


@torch.library.impl("bestrq2::chunked_attention", "CompositeExplicitAutograd", lib=_library)
def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    options = Options(*rest)
    if options.position is not None:
        check_table(
            options.position, options.position_zero, options.layout, query.shape[2], key.shape[2], options.query_offset
        )
    chosen = _choose(query, options.backend)
    if chosen != "reference" and len(query):  # nothing to launch for no items
        return _compiled(chosen).forward(query, key, value, options)
    with torch.autocast(query.device.type, enabled=False):  # else the products of what it computes in fp32 are not
        out, logsumexp = reference.forward(query, key, value, **options.keywords())
    return torch.empty_like(query).copy_(out), logsumexp.float()


@torch.library.impl("bestrq2::chunked_attention_backward", "CompositeExplicitAutograd", lib=_library)
def _backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    options = Options(*rest)
    chosen = _choose(query, options.backend)
    if chosen == "reference" or not len(query):
        return _reference_backward(grad, query, key, value, options)
    gradients = _compiled(chosen).backward(grad, out, logsumexp, query, key, value, options)
    inputs = (query, key, value, *options.tables)
    return tuple(grad.new_empty((0,)) if like is None else _laid_out(x, like) for x, like in zip(gradients, inputs))


def _laid_out(gradient: Tensor, like: Tensor) -> Tensor:
    """``gradient`` with the strides that torch.compile was promised: those of ``empty_like(like)``."""
    promised = torch.empty_like(like, device="meta").stride()
    return gradient if gradient.stride() == promised else torch.empty_like(like).copy_(gradient)


def _reference_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, ...]:
    leaves: list[Any] = [x if x is None else x.detach().requires_grad_() for x in (query, key, value, *options.tables)]
    query, key, value, position, content_bias, position_bias = leaves
    options = options._replace(position=position, content_bias=content_bias, position_bias=position_bias)
    wanted = [x for x in leaves if x is not None]
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        out = reference.chunked_attention(query, key, value, **options.keywords())
        gradients = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True))
    return tuple(grad.new_empty((0,)) if x is None else torch.empty_like(x).copy_(next(gradients)) for x in leaves)


@torch.library.register_fake("bestrq2::chunked_attention", lib=_library)
def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("bestrq2::chunked_attention_backward", lib=_library)
def _fake_backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = (query, key, value, *Options(*rest).tables)
    return tuple(grad.new_empty((0,)) if x is None else torch.empty_like(x) for x in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    tensors, ctx.settings = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.save_for_backward(out, logsumexp, *tensors)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("chunked_attention")
    out, logsumexp, *tensors = ctx.saved_tensors
    gradients = torch.ops.bestrq2.chunked_attention_backward.default(grad, out, logsumexp, *tensors, *ctx.settings)
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad)]
    return (*wanted, *(None,) * (len(tensors) + len(ctx.settings) - len(wanted)))


_TENSORS = 3 + Options._fields.index("chunk_size")
"""Query, key, value and the tensors of the options, which come before the numbers."""

torch.library.register_autograd("bestrq2::chunked_attention", _autograd, setup_context=_setup_context, lib=_library)
