"""The Triton kernels of attention over few keys at every shipped configuration, compiled for GPUs that are not here."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bestrq2.kernels.aot import SHARED_LIMIT, compile_for, spill_limit
from bestrq2.kernels.short_attention import compile_cases

QUICK = ("/64/64", "/64/128")  # endings of the configurations that every run compiles


def chosen_cases():
    """Common sizes and tiles of a single chip everywhere, of the others two chips, in turns."""
    for turn, case in enumerate(compile_cases()):
        common = case.name.endswith(QUICK) or len(case.architectures) == 1
        left_out = None if common else case.architectures[turn % len(case.architectures)]
        yield from ((case, sm) for sm in case.architectures if sm != left_out)


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        pytest.param(case, sm, id=f"{case.name}-sm_{sm}", marks=() if case.name.endswith(QUICK) else pytest.mark.slow)
        for case, sm in chosen_cases()
    ],
)
def test_compiles_without_spills(case, architecture):
    report = compile_for(case, architecture)
    print(f"{case.name} sm_{architecture}: {report}")
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]
    assert report.matrix_instructions
