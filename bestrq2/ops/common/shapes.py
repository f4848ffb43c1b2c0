"""Check the shapes and devices of tensor arguments against a notation like ``"B H Tq d"``."""

from typing import Any

from torch import Tensor

__all__ = ["check_devices", "check_shapes"]


def check_shapes(op: str, **arguments: tuple[Tensor | None, str]) -> dict[str, Any]:
    """Raise ValueError for the first tensor whose shape does not fit; return the size of every name.

    Each argument is a tensor, or None (skipped), and its dimensions by name. The same name is the same size everywhere.
    ``...`` stands for any leading dimensions, ``G?`` for a first dimension that may be missing::

        sizes = check_shapes("quantize", x=(x, "... D"), projection=(projection, "G? D d"))

    The message names the argument, the expected dimensions, the sizes that earlier arguments fix, and what was given.
    """
    sizes: dict[str, Any] = {}
    for name, (tensor, dimensions) in arguments.items():
        if tensor is not None:
            known = dict(sizes)
            if not _match(tuple(tensor.shape), dimensions.split(), sizes):
                raise ValueError(f"{op}: {name} must be {_expected(dimensions, known)}, got {tuple(tensor.shape)}")
    return sizes


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for the first tensor that is not on the device of the first one."""
    first = next(iter(tensors))
    home = tensors[first]
    assert home is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != home.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {home.device}")


def _match(shape: tuple[Any, ...], names: list[str], sizes: dict[str, Any]) -> bool:
    """Return True if ``shape`` fits; adds the sizes of new names."""
    if names[0] == "...":
        names, leading = names[1:], len(shape) - len(names) + 1
        if leading < 0 or not _bind("...", shape[:leading], sizes):
            return False
        shape = shape[leading:]
    elif names[0].endswith("?"):
        names = names[1:] if len(shape) < len(names) else [names[0][:-1], *names[1:]]
    if len(shape) != len(names):
        return False
    for name, size in zip(names, shape):  # noqa: SIM110 (a loop, which torch.compile of 2.4 traces)
        if not _bind(name, size, sizes):
            return False
    return True


def _bind(name: str, size: Any, sizes: dict[str, Any]) -> bool:
    """Return True if ``name`` is new or has this size. No ``dict.setdefault``: torch.compile of 2.4 cannot trace it."""
    if name in sizes:
        return sizes[name] == size
    sizes[name] = size
    return True


def _expected(dimensions: str, known: dict[str, Any]) -> str:
    """Like ``(H, R, d) = (2, R, 16)``; without the second half where no size is known."""
    names = dimensions.split()
    if names[0].endswith("?"):
        rest, first = " ".join(names[1:]), names[0][:-1]
        return f"{_expected(rest, known)} or {_expected(f'{first} {rest}', known)}"
    sizes = [str(size) for name in names for size in _values(name, known)]
    return f"{_tuple(names)} = {_tuple(sizes)}" if any(name in known for name in names) else _tuple(names)


def _values(name: str, known: dict[str, Any]) -> tuple[Any, ...]:
    value = known.get(name, name)
    return value if isinstance(value, tuple) else (value,)


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 and parts != ['...'] else ''})"
