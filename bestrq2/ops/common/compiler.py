"""Marks for ``torch.compile`` that do not import the compiler.

``torch.compiler.disable`` and ``assume_constant_result`` import ``torch._dynamo``, and with it sympy and Triton. That
takes as long as importing torch itself, also for programs that never compile. torch marks its own functions this way.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Imports the compiler at the first call. torch has no public form of it.
never_compiled = getattr(torch._compile, "_disable_dynamo", torch.compiler.disable)


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Put its result into graphs as a constant, as ``torch.compiler.assume_constant_result`` does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
