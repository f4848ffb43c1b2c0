"""Every Triton kernel of chunked attention at every shipped configuration, compiled for GPUs that are not here."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from bestrq2.kernels import tuning
from bestrq2.kernels.chunked_attention import (
    backward,
    forward,
    launch,
    sinusoidal,
    sinusoidal_backward,
    sinusoidal_forward,
)

sys.path.insert(0, str(Path(__file__).parent))
from aot import ARCHITECTURES, SHARED_LIMIT, CompileCase, compile_for, spill_limit

KERNELS = {
    "forward": forward.chunked_attention_forward_kernel,
    "backward_query": backward.chunked_attention_backward_query_kernel,
    "backward_key": backward.chunked_attention_backward_key_kernel,
    "sinusoidal_forward": sinusoidal_forward.chunked_attention_sinusoidal_forward_kernel,
    "sinusoidal_backward_query": sinusoidal_backward.chunked_attention_sinusoidal_backward_query_kernel,
    "sinusoidal_backward_key": sinusoidal_backward.chunked_attention_sinusoidal_backward_key_kernel,
}
FP32_POINTERS = ("lse_ptr", "delta_ptr", "turns_ptr", "partial_ptr")
INTEGER_POINTERS = {"lengths_ptr": "*i64", "starts_ptr": "*i64", "key_mask_ptr": "*u8"}
CASES = [
    (f"{file}-{key}{'-key_mask' if key_mask else ''}", key, key_mask, launch.choose_config(configs, key, key_mask))
    for file, configs in tuning.all_configs("chunked_attention").items()
    for key in configs
    if not key.endswith("key_mask")
    for key_mask in (False, True)
]


def compile_case(key: str, key_mask: bool, config: dict[str, int]) -> CompileCase:
    """Everything a call can have: positions, both biases, lengths and starts."""
    kernel, dtype = KERNELS[key.split("/")[0]], "fp32" if key.endswith("fp32") else "bf16"
    head_dim, _, frequencies = key.split("/")[1].partition("x")
    config = dict(config)
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    constexprs = {
        "HAS_BAND": True,
        "HAS_CONTENT": True,
        "HAS_LENGTHS": True,
        "HAS_STARTS": True,
        "HAS_KEY_MASK": key_mask,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "BD": int(head_dim),
        "HAS_POSITION": True,
        "NB": int(frequencies) // config["BK"] if frequencies else None,
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
            fp32 = name in FP32_POINTERS or (name == "dq_ptr" and not frequencies)
            kind = "*fp32" if fp32 else INTEGER_POINTERS.get(name, f"*{dtype}")
        else:
            kind = "fp32" if name == "scale" else "i32"
        signature[name] = kind
    # What the launcher's specialisation sees: allocations, strides of whole heads, and the band's row stride.
    runtime = {*forward.RUNTIME, *sinusoidal.RUNTIME, "scale", "B"}
    divisible = tuple(name for name in signature if name not in runtime)
    return CompileCase(key, kernel, signature, constexprs, divisible_by_16=divisible, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda n: f"sm_{n}")
@pytest.mark.parametrize(
    ("name", "key", "key_mask", "config"),
    [
        pytest.param(
            *case,
            id=case[0],
            marks=() if case[1].endswith(("/64", "/64x96")) else pytest.mark.slow,
        )
        for case in CASES
    ],
)
def test_compiles_without_spills(name, key, key_mask, config, architecture):
    report = compile_for(compile_case(key, key_mask, config), architecture)
    print(f"{name} sm_{architecture}: {report}")
    assert report.spill_bytes <= spill_limit()
    assert report.shared_bytes <= SHARED_LIMIT[architecture]
    assert report.matrix_instructions or config.get("PRECISION") == "ieee"
