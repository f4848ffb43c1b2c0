"""Every Triton kernel of chunked attention at every shipped configuration, compiled for GPUs that are not here."""

import os
from itertools import count

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bestrq2.kernels.aot import SHARED_LIMIT, compile_for, spill_limit
from bestrq2.kernels.chunked_attention.compile_cases import compile_cases


def quick(case):
    """Return True for 16-bit heads of up to 64 channels, which every run compiles."""
    entry = case.name.split("-")[1]
    return "/64" in entry and "fp32" not in entry


def chosen_cases():
    """Every configuration on every chip, with all inputs that it is for.

    On one chip in turn: fp32 heads of more than 72 channels, which take the longest, and forms with fewer inputs, or a
    key mask as well; of these forms, those of more than 72 channels every third.
    """
    turns, partial = count(), count(1)
    for case in compile_cases():
        entry, *others = case.name.split("-")[1:]
        whole = not others or entry.endswith(("/key_mask", "/no_positions"))
        large = int(entry.split("/")[1]) > 72
        if not whole and large and next(partial) % 3:
            continue
        if whole and not (large and "fp32" in entry):
            yield from ((case, sm) for sm in case.architectures)
        else:
            yield case, case.architectures[next(turns) % len(case.architectures)]


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        pytest.param(
            *(case, sm),
            id=f"{case.name}-sm_{sm}",
            marks=() if quick(case) else pytest.mark.slow,
        )
        for case, sm in chosen_cases()
    ],
)
def test_compiles_without_spills(case, architecture):
    report = compile_for(case, architecture)
    print(f"{case.name} sm_{architecture}: {report}")
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]
    assert report.matrix_instructions or case.constexprs.get("PRECISION") == "ieee"
