"""The Triton kernel of quantize: compiled for GPUs that are not here, and run in the interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bestrq2.kernels.aot import SHARED_LIMIT, compile_for, spill_limit
from bestrq2.kernels.quantize import CANDIDATES, compile_case, compile_cases
from bestrq2.kernels.tuning import ARCHITECTURES


def chosen():
    """With everything for every architecture; of its bare form and that of bf16 rows one, in turns."""
    for index, case in enumerate(compile_cases()):
        turn = index // 3 + (case.signature["x_ptr"] == "*bf16")
        for sm in case.architectures:
            if case.constexprs["LAYER_NORM"] or (turn + ARCHITECTURES.index(sm)) % 2 == 0:
                yield pytest.param(case, sm, id=f"{case.name}-sm_{sm}")


@pytest.mark.parametrize(("case", "architecture"), list(chosen()))
def test_compiles_without_spills(case, architecture):
    report = compile_for(case, architecture)
    print(
        f"sm_{architecture} {case.name}: {report.registers} registers, {report.spill_bytes} spilled, "
        f"{report.shared_bytes} bytes shared, {', '.join(report.matrix_instructions)}"
    )
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]
    assert report.matrix_instructions, "the search must run on the matrix units"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "config"),
    # The number of stages hardly changes the registers, and a peeled first step only adds to the code.
    [
        (key, config)
        for key, configs in CANDIDATES.items()
        for config in configs
        if config["num_stages"] == 3 and (config["PEEL"] or {**config, "PEEL": 1} not in configs)
    ][::3],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_candidates_of_the_tuner_compile_without_spills(key, config):
    report = compile_for(compile_case(key, config, "fp32", int(key.split("/")[1]), True, True), 90)
    assert report.spill_bytes <= 16  # outside the loops: a register stored once and read once
    assert report.shared_bytes <= SHARED_LIMIT[90]


INTERPRETED = """
import interpreter_arithmetic
import torch
from quantize_cases import count_wrong, rows_of_extreme_size
from untouched import spread
from bestrq2 import ops
from bestrq2.kernels import tuning
from bestrq2.kernels.quantize import CANDIDATES

def check(rows, features, dims, codes, books=1, offset=0.0, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows)
    x = (torch.randn(rows, features, generator=g) * scale + offset).to(dtype)
    p = torch.randn(books, features, dims, generator=g) * (6 / (features + dims)) ** 0.5
    c = torch.nn.functional.normalize(torch.randn(books, codes, dims, generator=g), dim=-1)
    mask = torch.rand(rows, generator=g) < 0.5
    for normalize in ("none", "layer_norm"):
        gold = ops.quantize(x, p, c, normalize=normalize, backend="reference")
        ours = ops.quantize(x, p, c, normalize=normalize, backend="triton")
        assert torch.equal(gold, ours), (rows, features, dims, codes, normalize, int((gold != ours).sum()))
        some = ops.quantize(x, p, c, normalize=normalize, mask=mask, backend="triton")
        assert torch.equal(some, torch.where(mask[:, None], gold, -1))
    turned = x.T.contiguous().T
    assert torch.equal(ops.quantize(turned, p, c, backend="triton"), ops.quantize(x, p, c, backend="triton"))
    return x, p, c

check(130, 256, 16, 600, offset=-50.0, scale=15.0)
check(70, 80, 16, 500, books=3)
check(5, 1280, 16, 100, offset=-50.0, scale=15.0)
check(70, 37, 13, 131, dtype=torch.float16)
check(70, 37, 13, 131, dtype=torch.bfloat16)
check(5, 40, 64, 257)
check(3, 9, 50, 3)
check(1, 1, 1, 1)
assert ops.quantize(torch.zeros(0, 8), torch.zeros(8, 4), torch.zeros(5, 4), backend="triton").shape == (0,)

x, p, c = check(120, 40, 16, 97)
whole = ops.quantize(x, p, c, backend="triton")
few = x[:4]  # equal codes make every row take the slow way
for times in (2, 9):  # every code again at distances that share a lane, a tile, a pair of tiles
    assert torch.equal(ops.quantize(few, p, c.repeat(1, times, 1), backend="triton"), whole[:4])
assert torch.equal(ops.quantize(few, p, c.repeat_interleave(3, 1), backend="triton"), 3 * whole[:4])
assert (ops.quantize(few, p, c[:, :1].expand(-1, 300, -1), backend="triton") == 0).all()

assert torch.equal(torch.cat([ops.quantize(part, p, c, backend="triton") for part in x.split(23)]), whole)
for rows, columns, peel in ((32, 128, 0), (256, 64, 1), (16, 256, 1)):
    tiles = {"BM": rows, "BN": columns, "BK": 16, "PEEL": peel, "num_warps": 4, "num_stages": 2}
    with tuning.override("quantize", {"quantize/16/few": tiles}) as used:
        assert torch.equal(ops.quantize(x, p, c, backend="triton"), whole)
        # many equal codes, also across groups, tiles and the filling
        for repeated in (c.repeat(1, 9, 1), c.repeat_interleave(11, 1)[:, :1000]):
            assert torch.equal(
                ops.quantize(few, p, repeated, backend="triton"), ops.quantize(few, p, repeated, backend="reference")
            )
    assert used.lookups

x[3], x[5, 3], x[6, 2] = 0.0, float("nan"), float("inf")
codes = ops.quantize(x, p, c, backend="triton")[:, 0]
assert codes[3] == 0 and codes[5] == codes[6] == -1 and (codes >= 0).sum() == 118
mask = torch.ones(120, dtype=torch.bool)
mask[5] = mask[6] = False
ops.check_codes(ops.quantize(x, p, c, mask=mask, backend="triton"), mask)
for scale in (2.0**-120, 2.0**100):
    assert torch.equal(ops.quantize(x[7:16] * scale, p, c, backend="triton")[:, 0], codes[7:16])
for extreme, ordinary in rows_of_extreme_size(3, 40):
    for normalize in ("none", "layer_norm") if extreme.dtype != torch.float64 else ():
        codes = ops.quantize(extreme, p[0], c[0], normalize=normalize, backend="triton")
        assert count_wrong(codes, ordinary, p[0], c[0], normalize == "layer_norm")[0] == 0
constant = torch.full((4, 40), -61.7)
assert (ops.quantize(constant, p, c, normalize="layer_norm", backend="triton") == 0).all()

op = torch.ops.bestrq2.quantize.default
torch.library.opcheck(op, (x[7:12], p, c, None, "none", "triton"))
mask = torch.tensor([[True, False, True], [False, False, True]])
inputs = torch.randn(2, 3, 40).half(), p.expand(2, -1, -1), torch.cat([c, c.flip(1)]), mask
torch.library.opcheck(op, (*inputs, "layer_norm", "triton"))

for dim in (0, 1):  # rows, then features further apart than 2^31 elements
    near = torch.randn(5, 40).half()
    for normalize in ("none", "layer_norm"):
        far = ops.quantize(spread(near, dim), p, c, normalize=normalize, backend="triton")
        assert torch.equal(far, ops.quantize(near, p, c, normalize=normalize, backend="triton"))
print("checked")
"""


def test_interpreted_kernel_gives_the_reference_codes():
    """In its own process: TRITON_INTERPRET must be set before triton is imported."""
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "checked", result.stdout + result.stderr
