"""Check what must be a tensor, an integer or a number, in all operations alike."""

from operator import index
from typing import Any

import torch
from torch import Tensor

__all__ = ["integer", "number", "require_tensors"]


def require_tensors(op: str, required: dict[str, Any], optional: dict[str, Any]) -> None:
    """Raise TypeError for what is not a dense, local tensor (of ``optional``: nor None)."""
    for name, x in {**required, **optional}.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            none = " or None" if name in optional else ""
            raise TypeError(f"{op}: {name} must be a torch.Tensor{none}, got {_received(x)}")
        if x.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got one of layout {x.layout}")
        if type(x).__name__ == "DTensor":
            raise TypeError(f"{op}: {name} is a DTensor; pass local tensors (nothing is sharded here)")


def integer(name: str, value: Any, least: int | None = None, also: str = "", bits: int = 63) -> int:
    """``value`` as an int (while tracing also a SymInt) from ``least`` to less than ``2**bits``.

    ``also``: what else fits, for the messages.
    """
    if type(value) is not int and not isinstance(value, torch.SymInt):
        # Tensors have an index, but reading it would wait for a GPU. True is rejected: almost certainly a mistake.
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer{also}, got {_received(value)}")
        value = index(value)
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}{also}, got {value}")
    if type(value) is int and value >= 2**bits:
        raise ValueError(f"{name} must be less than 2^{bits}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """``value`` as a finite float. A tensor is none: reading it would wait, and no gradient would reach it."""
    if type(value) is not float and not isinstance(value, torch.SymFloat):
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {_received(value)}")
        value = float(value)
    if not -torch.inf < value < torch.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def _received(value: Any) -> str:
    """A scalar by its value, everything else by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return f"a {type(value).__module__}.{type(value).__name__}".replace("builtins.", "")
