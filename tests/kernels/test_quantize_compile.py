"""The Triton kernel of quantize: compiled for GPUs that are not here, and run in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bestrq2.kernels import tuning
from bestrq2.kernels.quantize import CANDIDATES

sys.path.insert(0, str(Path(__file__).parent))
from aot import ARCHITECTURES, SHARED_LIMIT, CompileCase, compile_for, spill_limit

CONFIGS = [(name, key, config) for name, keys in tuning.all_configs("quantize").items() for key, config in keys.items()]


def compile_case(config, dtype, dims, layer_norm, select, ragged):
    from bestrq2.kernels.quantize import quantize_kernel

    config = dict(config)
    launch = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    integers = ("x_row_stride", "projection_stride", "codebook_stride", "rows", "books", "D", "d", "V")
    return CompileCase(
        name=f"{dtype}-d{dims}",
        kernel=quantize_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "projection_ptr": "*fp32",
            "high_ptr": "*fp16",
            "low_ptr": "*fp16",
            "selected_ptr": "*i64",
            "count_ptr": "*i64",
            "out_ptr": "*i64",
            **dict.fromkeys(integers, "i32"),
        },
        constexprs={
            "x_feature_stride": 1,
            "LAYER_NORM": layer_norm,
            "SELECT": select,
            "RAGGED": ragged,
            "BD": dims,
            **config,
        },
        divisible_by_16=("x_ptr", "projection_ptr", "high_ptr", "low_ptr", "x_row_stride", "D", "d", "V"),
        **launch,
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda n: f"sm_{n}")
@pytest.mark.parametrize(("file", "key", "config"), CONFIGS, ids=lambda v: str(v) if isinstance(v, str) else "")
def test_compiles_without_spills(file, key, config, architecture):
    dims = int(key.rpartition("/")[2])
    variants = [
        ("fp32", dims, True, True, True),
        ("fp32", dims, False, False, False),
        ("bf16", dims, False, True, False),
    ]
    for variant in variants:
        report = compile_for(compile_case(config, *variant), architecture)
        print(
            f"sm_{architecture} {key} {variant}: {report.registers} registers, {report.spill_bytes} spilled, "
            f"{report.shared_bytes} bytes shared, {', '.join(report.matrix_instructions)}"
        )
        assert report.spill_bytes <= spill_limit()
        assert report.shared_bytes <= SHARED_LIMIT[architecture]
        assert report.matrix_instructions, "the search must run on the matrix units"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "config"),
    # The number of stages hardly changes the registers.
    [(key, config) for key, configs in CANDIDATES.items() for config in configs if config["num_stages"] == 3],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_candidates_of_the_tuner_compile_without_spills(key, config):
    report = compile_for(compile_case(config, "fp32", int(key.rpartition("/")[2]), True, True, True), 90)
    assert report.spill_bytes == 0
    assert report.shared_bytes <= SHARED_LIMIT[90]


INTERPRETED = """
import torch
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

check(300, 256, 16, 1024, offset=-50.0, scale=15.0)
check(129, 80, 16, 1000, books=3)
check(33, 1280, 16, 300, offset=-50.0, scale=15.0)
check(70, 37, 13, 131, dtype=torch.float16)
check(5, 40, 64, 257)
check(3, 9, 50, 3)
check(1, 1, 1, 1)
assert ops.quantize(torch.zeros(0, 8), torch.zeros(8, 4), torch.zeros(5, 4), backend="triton").shape == (0,)

x, p, c = check(200, 40, 16, 97)
whole = ops.quantize(x, p, c, backend="triton")
for times in (2, 9):  # every code again at distances that share a lane, a tile, a pair of tiles
    assert torch.equal(ops.quantize(x, p, c.repeat(1, times, 1), backend="triton"), whole)
assert torch.equal(ops.quantize(x, p, c.repeat_interleave(3, 1), backend="triton"), 3 * whole)
assert (ops.quantize(x, p, c[:, :1].expand(-1, 300, -1), backend="triton") == 0).all()

assert torch.equal(torch.cat([ops.quantize(part, p, c, backend="triton") for part in x.split(23)]), whole)
tiles = {"BM": 64, "BN": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
with tuning.override("quantize", {"quantize/16": tiles}):
    assert torch.equal(ops.quantize(x, p, c, backend="triton"), whole)

x[3], x[5, 3], x[6, 2] = 0.0, float("nan"), float("inf")
codes = ops.quantize(x, p, c, backend="triton")[:, 0]
assert codes[3] == 0 and codes[5] == codes[6] == -1 and (codes >= 0).sum() == 198
mask = torch.ones(200, dtype=torch.bool)
mask[5] = mask[6] = False
ops.check_codes(ops.quantize(x, p, c, mask=mask, backend="triton"), mask)
for scale in (2.0**-120, 2.0**100):
    assert torch.equal(ops.quantize(x[7:] * scale, p, c, backend="triton")[:, 0], codes[7:])
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
