"""Every shipped configuration of the masked cross-entropy kernel compiles for every supported GPU, without spills."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from bestrq2.kernels.aot import SHARED_LIMIT, compile_for, spill_limit  # noqa: E402
from bestrq2.kernels.masked_cross_entropy.compile_cases import candidate_cases, compile_cases  # noqa: E402


def repeats_bf16(case):
    """fp16 has the tiles and registers of bf16: with all inputs alone."""
    inputs = ("HAS_INDEX", "HAS_WEIGHTS", "HAS_BIAS", "SMOOTH")
    return "-fp16" in case.name and not all(case.constexprs.get(name, True) for name in inputs)


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        pytest.param(case, sm, id=f"{case.name}-sm_{sm}")
        for case in compile_cases()
        for sm in case.architectures
        if not repeats_bf16(case)
    ],
)
def test_compiles_without_spills(case, architecture):
    report = compile_for(case, architecture)
    print(f"{case.name} sm_{architecture}: {report.registers} registers, {report.shared_bytes} B shared")
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("case", candidate_cases(), ids=lambda case: case.name)
def test_candidates_of_the_tuner_compile_without_spills(case):
    report = compile_for(case, 90)
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[90]
