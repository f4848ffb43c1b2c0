"""The notation of shapes, and that every operation has the same files and no other public names."""

import re

import pytest
import torch

from bestrq2 import ops
from bestrq2.ops.common.shapes import check_devices, check_shapes


def zeros(*shape):
    return torch.zeros(shape)


def test_sizes_are_bound_by_name():
    sizes = check_shapes("op", x=(zeros(2, 3, 8), "... D"), weight=(zeros(5, 8), "G? V D"), bias=(None, "V"))
    assert sizes == {"...": (2, 3), "D": 8, "V": 5}
    assert check_shapes("op", weight=(zeros(4, 5, 8), "G? V D"))["G"] == 4
    assert check_shapes("op", x=(zeros(8), "... D"), mask=(zeros(), "..."))["..."] == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (zeros(2), "B T")}, "op: x must be (B, T), got (2,)"),
        ({"x": (zeros(2, 3), "B T"), "y": (zeros(4, 3), "B T")}, "op: y must be (B, T) = (2, 3), got (4, 3)"),
        ({"x": (zeros(2, 3), "B T"), "y": (zeros(4, 5), "B d")}, "op: y must be (B, d) = (2, d), got (4, 5)"),
        ({"x": (zeros(2, 2), "n n"), "y": (zeros(3), "n")}, "op: y must be (n,) = (2,), got (3,)"),
        ({"x": (zeros(2, 3), "n n")}, "op: x must be (n, n), got (2, 3)"),
        ({"x": (zeros(), "... D")}, "op: x must be (..., D), got ()"),
        (
            {"x": (zeros(2, 3, 8), "... D"), "mask": (zeros(3, 2), "...")},
            "op: mask must be (...) = (2, 3), got (3, 2)",
        ),
        (
            {"x": (zeros(7, 8), "... D"), "weight": (zeros(5, 9), "G? V D")},
            "op: weight must be (V, D) = (V, 8) or (G, V, D) = (G, V, 8), got (5, 9)",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_messages_name_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_shapes("op", **arguments)


def test_devices_are_those_of_the_first():
    check_devices("op", x=zeros(2), y=None, z=zeros(3))
    with pytest.raises(ValueError, match=r"^op: z is on meta but x is on cpu$"):
        check_devices("op", x=zeros(2), y=None, z=torch.zeros(3, device="meta"))


def test_only_public_names_are_listed():
    assert dir(ops) == sorted(ops.__all__)
    assert {"quantize", "masked_cross_entropy", "chunked_attention"} <= set(dir(ops.reference))
