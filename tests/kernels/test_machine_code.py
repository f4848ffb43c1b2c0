"""benchmarks/machine_code/report.py: the reading of machine code, on lines written here and on one compiled kernel."""

import csv
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import benchmark_cases  # noqa: F401  (makes benchmarks importable)
from bestrq2.kernels import quantize

from benchmarks.machine_code import rates, report, sass, workloads

NESTED = """
.text.kernel:
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   LDSM.16.M88.4 R24, [R180+UR6] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   HGMMA.64x64x16.F32 R56, R24, gdesc[UR8], R56, gsb0 ;
        /*0050*/                   FMNMX R96, R85, R53, !PT ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64], R5 ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_loops_and_what_they_hold():
    code = sass.parse(NESTED)
    outer, inner = code.loops  # the branch to itself behind the kernel is none
    assert (outer.innermost, inner.innermost) == (False, True)
    assert inner.counts.classes == {"ldsm": 1, "lds": 1, "mma": 1, "compare": 1, "branch": 1}
    assert outer.counts.classes == {"ldg": 1, "stg": 1, "branch": 1}, "without those of the inner loop"
    assert code.outside.classes == {"integer": 1, "branch": 2}
    assert inner.counts.fmas == 64 * 64 * 16 // 4
    assert inner.counts.shared_bytes == 512 + 64 * 16 * 2 // 4, "four matrices and B; the load that never runs is free"
    assert (outer.counts.read_bytes, outer.counts.global_bytes) == (32 * 16, 32 * 16 + 32 * 2)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("@P0 FSETP.GT.AND P0, PT, R24, R141, PT", "compare"),
        ("IMAD.X R27, R25, 0x1, R5, P0", "imad"),
        ("HADD2.F32 R4, -RZ, R4.H0_H0", "convert"),
        ("HADD2 R4, R4, R5", "half"),
        ("LDGSTS.E.BYPASS.128 [R92], desc[UR16][R6.64], P5", "ldgsts"),
        ("UIADD3 UR4, UR4, 0x1, URZ", "uniform"),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "sync"),
        ("HMMA.16816.F32 R4, R8, R12, R4", "mma"),
        ("LOP3.LUT R26, R175, 0x400, R90, 0xfe, !PT", "integer"),
    ],
)
def test_classes(text, kind):
    assert sass.Instruction(text).kind == kind


def test_operands_of_a_warpgroup_instruction_in_shared_memory():
    in_registers = sass.Instruction("HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR20], R24")
    both_shared = sass.Instruction("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0")
    assert sass.shared_bytes(both_shared) - sass.shared_bytes(in_registers) == 64 * 16 * 2 // 4
    assert sass.mma_fmas("HMMA.1688.F32.TF32") == 2 * 16 * 8 * 8, "half rate"


def test_text_without_instructions_is_refused():
    with pytest.raises(ValueError, match="nvdisasm"):
        sass.parse("Fatbin elf code:\n")


def test_occupancy():
    assert rates.occupancy(90, 128, 1024, 4) == rates.Occupancy(4, 16, "registers")
    assert rates.occupancy(90, 129, 1024, 4).blocks == 3, "136 registers a thread are given"
    assert rates.occupancy(80, 32, 80 * 1024, 4) == rates.Occupancy(2, 8, "shared memory")


def test_quantize(tmp_path):
    """The search loop of the compiled kernel: its products are those of the reference shape, three a score."""
    case = next(case for case in quantize.compile_cases() if case.name == "default.json-quantize/16-fp32")
    row, result, shape = report.inspect("quantize", case, 90)
    assert result.hot == "search"
    assert not result.missing
    assert result.trips in (8192 / case.constexprs["BN"], 8192 / case.constexprs["BN"] / 2), "one tile or a pair"
    assert result.milliseconds == 1e3 * max(result.busy.values())
    # 786 GFLOP at 800 TFLOP/s and a warp-wide maximum per score at least, whatever the tile.
    assert result.busy["mma"] == pytest.approx(0.983e-3, rel=0.01)
    assert result.per_unit["compare"] >= 1
    assert any("not measured" in line for line in report.describe(row, result, shape))
    report.save([row], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        (read,) = csv.DictReader(file)
    assert read["label"] == report.LABEL
    assert float(read["bound_ms"]) == pytest.approx(row["bound_ms"], rel=1e-3)


def test_a_phase_without_its_loop_is_named():
    kernel = workloads.Workload(
        "", "", "", 1, 4, 1, (workloads.Phase("absent", lambda loop: False, lambda counts: 1.0),), 0.0
    )
    assert workloads.bound(sass.parse(NESTED), kernel).missing == ("absent",)
