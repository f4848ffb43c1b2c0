"""The separable form through :func:`chunked_attention` itself: its channels appended to query, key and value."""

from typing import Any

import torch
from torch import Tensor

from .chunked_attention_sinusoidal_series import fourier_series

_TENSORS = ("query", "key", "value", "projection", "content_bias", "position_bias")


def forward(tensors: dict[str, Any], options: dict[str, Any], backend: str) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores. ``tensors``: those of _TENSORS; ``options``: all others."""
    out, logsumexp = torch.ops.bestrq2.chunked_attention.default(*_append(tensors, options), *_rest(options, backend))
    head_dim = tensors["query"].shape[-1]
    return torch.empty_like(tensors["query"]).copy_(out[..., :head_dim]), logsumexp


def backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, tensors: dict[str, Any], options: dict[str, Any], backend: str
) -> list[Tensor | None]:
    """Gradients of the tensors: those of the appended ones, then through the appending."""
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}
    with torch.enable_grad():
        appended = _append(leaves, options)
    channels = appended[0].shape[-1] - grad.shape[-1]
    padded = (torch.nn.functional.pad(x, (0, channels)) for x in (grad, out))
    detached = (x.detach() for x in appended)
    gradients = torch.ops.bestrq2.chunked_attention_backward.default(
        *padded, logsumexp, *detached, *_rest(options, backend)
    )
    wanted = [x for x in leaves.values() if x is not None]
    results = iter(torch.autograd.grad(appended, wanted, gradients[:3], allow_unused=True, materialize_grads=True))
    return [None if x is None else next(results) for x in leaves.values()]


def _rest(options: dict[str, Any], backend: str) -> tuple[Any, ...]:
    names = ("lengths", "starts", "key_mask", "chunk_size", "left_context", "right_context", "query_offset")
    given = (options[name] for name in names)
    return (None, None, None, *given, 0, options["scale"], backend)


def _append(tensors: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, projection, content_bias, position_bias = (tensors[name] for name in _TENSORS)
    lowest, highest = options["offsets"]
    period, coefficients, _ = fourier_series(projection.shape[2], lowest, highest, options["base"])
    channels = len(coefficients)
    rows = torch.arange(query.shape[2], device=query.device) + options["query_offset"]
    with_position = query if position_bias is None else query + position_bias[:, None]
    # Padding may hold NaN, and the gradient of the projection sums over it.
    for bound, outside in ((options["lengths"], torch.ge), (options["starts"], torch.lt)):
        if bound is not None:
            with_position = with_position.masked_fill(outside(rows, bound[:, None])[:, None, :, None], 0)
    onto_series = projection @ torch.from_numpy(coefficients).to(projection).mT  # (H, d, channels)
    precise = torch.promote_types(query.dtype, torch.float32)
    series = (with_position @ onto_series.to(query.dtype)).to(precise)  # cosines, then sines
    cosine, sine = series.split((channels // 2 + 1, channels // 2), dim=-1)
    # cos(i - j) = cos i cos j + sin i sin j and sin(i - j) = sin i cos j - cos i sin j; frequency 0 has no sine.
    cos_i, sin_i = turns(rows, period, channels // 2, precise)
    sine = torch.nn.functional.pad(sine, (1, 0))
    features = torch.cat((cosine * cos_i + sine * sin_i, (cosine * sin_i - sine * cos_i)[..., 1:]), dim=-1)
    columns = torch.arange(key.shape[2], device=key.device)
    cos_j, sin_j = turns(columns, period, channels // 2, precise)
    key_features = torch.cat((cos_j, sin_j[:, 1:]), dim=-1).to(key.dtype).expand(*key.shape[:3], channels)

    content = query if content_bias is None else query + content_bias[:, None]
    return (
        torch.cat((content, features.to(query.dtype)), dim=-1),
        torch.cat((key, key_features), dim=-1),
        torch.nn.functional.pad(value, (0, channels)),
    )


def turns(position: Tensor, period: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of ``2 pi k position / period`` for k = 0..count, (T, count + 1), at any position."""
    k = torch.arange(count + 1, device=position.device)
    angle = (position[:, None] % period * k % period).double() * (2 * torch.pi / period)
    return angle.cos().to(dtype), angle.sin().to(dtype)
