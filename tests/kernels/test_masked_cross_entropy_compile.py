"""Every shipped configuration of the masked cross-entropy kernel compiles for every supported GPU, without spills."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)

from bestrq2.kernels.aot import SHARED_LIMIT, compile_for, spill_limit  # noqa: E402
from bestrq2.kernels.masked_cross_entropy.compile_cases import candidate_cases, compile_cases  # noqa: E402

INPUTS = ("HAS_INDEX", "HAS_WEIGHTS", "HAS_BIAS", "SMOOTH")


def chosen_cases():
    """With all inputs every case on every chip. With fewer inputs, which take fewer registers, chips in turns; fp16,
    which has the tiles and registers of bf16, not at all."""
    turn = 0
    for case in compile_cases():
        if all(case.constexprs.get(name, True) for name in INPUTS):
            yield from ((case, sm) for sm in case.architectures)
        elif "-fp16" not in case.name:
            yield case, case.architectures[turn % len(case.architectures)]
            turn += 1


@pytest.mark.parametrize(
    ("case", "architecture"), [pytest.param(case, sm, id=f"{case.name}-sm_{sm}") for case, sm in chosen_cases()]
)
def test_compiles_without_spills(case, architecture):
    report = compile_for(case, architecture)
    print(f"{case.name} sm_{architecture}: {report.registers} registers, {report.shared_bytes} B shared")
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.slow
@pytest.mark.parametrize("case", candidate_cases()[::3], ids=lambda case: case.name)
def test_candidates_of_the_tuner_compile_without_spills(case):
    report = compile_for(case, 90)
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[90]
