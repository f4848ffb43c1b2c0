"""Every Triton kernel of chunked attention at every shipped configuration, compiled for GPUs that are not here."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bestrq2.kernels import tuning
from bestrq2.kernels.chunked_attention import backward, forward

sys.path.insert(0, str(Path(__file__).parent))
from aot import ARCHITECTURES, SHARED_LIMIT, CompileCase, compile_for

KERNELS = {
    "forward": forward.chunked_attention_forward_kernel,
    "backward_query": backward.chunked_attention_backward_query_kernel,
    "backward_key": backward.chunked_attention_backward_key_kernel,
}
FP32_POINTERS = ("lse_ptr", "delta_ptr", "dq_ptr")
CASES = [
    (f"{file}-{key}", key, config, KERNELS[key.split("/")[0]])
    for file, configs in tuning.all_configs("chunked_attention").items()
    for key, config in configs.items()
]


def compile_case(key, config, kernel, dtype: str, positions: bool = True, padded: bool = True) -> CompileCase:
    config = dict(config)
    launch = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    constexprs = {
        "HAS_BAND": positions,
        "HAS_CONTENT": positions,
        "HAS_LENGTHS": padded,
        "HAS_STARTS": padded,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "BD": int(key.split("/")[1]),
        "ACCUMULATE": False,
        **config,
    }
    names = kernel.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {}
    for name in names:
        if name in constexprs:
            continue
        if name.endswith("_ptr"):
            kind = (
                "*i64" if name in ("lengths_ptr", "starts_ptr") else "*fp32" if name in FP32_POINTERS else f"*{dtype}"
            )
        else:
            kind = "fp32" if name == "scale" else "i32"
        signature[name] = kind
    # What the launcher's specialisation sees: allocations, strides of whole heads, and the band's row stride.
    runtime = {*forward.RUNTIME, "scale", "B"}
    divisible = tuple(name for name in signature if name not in runtime)
    return CompileCase(key, kernel, signature, constexprs, divisible_by_16=divisible, **launch)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda n: f"sm_{n}")
@pytest.mark.parametrize(
    ("name", "key", "config", "kernel"),
    [
        pytest.param(
            *case,
            id=case[0],
            marks=() if case[1].endswith("/64") else pytest.mark.slow,
        )
        for case in CASES
    ],
)
def test_compiles_without_spills(name, key, config, kernel, architecture):
    dtype = "fp32" if key.endswith("fp32") else "bf16"
    report = compile_for(compile_case(key, config, kernel, dtype), architecture)
    print(f"{name} sm_{architecture}: {report}")
    assert report.spill_bytes == 0
    assert report.shared_bytes <= SHARED_LIMIT[architecture]
    assert report.matrix_instructions
