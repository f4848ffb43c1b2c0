"""One rule that chooses the implementation of every operation.

Order: the ``backend=`` argument, then :func:`use_backend`, then the environment variable ``BESTRQ2_BACKEND``, then the
first of :data:`BACKENDS` that can run the call. A choice that cannot run is an error that says why, never a silent
fallback.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

Backend = Literal["triton", "cuda", "cpu", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "cuda", "cpu", "reference")
"""Every backend, fastest first: Triton kernels, CUDA C++, CPU C++, plain PyTorch."""

# Process-wide, like torch.backends.*: torch.compile can guard on a module global but not on a context variable.
_forced: str | None = None


def _check(name: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run every operation of a block on one backend: ``with ops.use_backend("reference"): ...``.

    The setting is process-wide while the block runs. An explicit ``backend=`` argument still wins.

    Raises:
        ValueError: if ``name`` is not one of :data:`BACKENDS`.
    """
    global _forced
    previous, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = previous


def requested(backend: str | None) -> str:
    """The ``backend=`` argument as the registered operators take it: "" where there is none."""
    return "" if backend is None else _check(backend)


def forced_backend() -> str | None:
    """The backend that :func:`use_backend` or the environment variable asks for, or None."""
    name = _forced or os.environ.get("BESTRQ2_BACKEND")
    return _check(name) if name else None


def choose_backend(op: str, backend: str | None, obstacles: Mapping[str, Callable[[], str | None]]) -> str:
    """Return the backend that runs this call of ``op``.

    ``obstacles`` maps each backend the op implements to a function that returns why it cannot run this call (None: it
    can). ``"reference"`` must be among them.

    Raises:
        ValueError: for an unknown backend name.
        RuntimeError: if the requested backend cannot run the call, naming the reason.
    """
    requested = _check(backend) if backend else forced_backend()
    if requested:
        if requested not in obstacles:
            raise RuntimeError(f"{op}: no {requested!r} implementation; available: {', '.join(obstacles)}")
        reason = obstacles[requested]()
        if reason is not None:
            raise RuntimeError(f"{op}: backend {requested!r} cannot run this call: {reason}")
        return requested
    for name in BACKENDS:
        if name in obstacles and obstacles[name]() is None:
            return name
    raise AssertionError(f"{op}: the reference backend must accept every call")
