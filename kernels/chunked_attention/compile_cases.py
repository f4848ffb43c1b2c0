"""Every kernel of every shipped configuration, for an ahead-of-time compilation: all that a call can have."""

from dataclasses import replace

from ..aot import CompileCase
from ..tuning import shipped
from . import backward, forward
from .launch import choose_config

KERNELS = {
    "forward": forward.chunked_attention_forward_kernel,
    "backward_query": backward.chunked_attention_backward_query_kernel,
    "backward_key": backward.chunked_attention_backward_key_kernel,
}
FP32_POINTERS = ("lse_ptr", "delta_ptr", "dq_ptr")
INTEGER_POINTERS = {"lengths_ptr": "*i64", "starts_ptr": "*i64", "key_mask_ptr": "*u8"}


def compile_cases() -> list[CompileCase]:
    return [
        replace(
            compile_case(f"{file.name}-{key}{'-key_mask' if key_mask else ''}", key, key_mask, file.configs),
            architectures=file.serves(key),
        )
        for file in shipped("chunked_attention")
        for key in file.keys
        if not key.endswith("key_mask")
        for key_mask in (False, True)
    ]


def compile_case(name: str, key: str, key_mask: bool, configs: dict[str, dict[str, int]]) -> CompileCase:
    """Positions, both biases, lengths and starts, with or without a key mask."""
    kernel, dtype = KERNELS[key.split("/")[0]], "fp32" if key.endswith("fp32") else "bf16"
    config = dict(choose_config(configs, key, key_mask))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    constexprs = {
        "HAS_BAND": True,
        "HAS_CONTENT": True,
        "HAS_LENGTHS": True,
        "HAS_STARTS": True,
        "HAS_KEY_MASK": key_mask,
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "BD": int(key.split("/")[1]),
        "ACCUMULATE": False,
        **config,
    }
    names = kernel.arg_names
    constexprs = {name: value for name, value in constexprs.items() if name in names}
    signature = {}
    for argument in names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            kind = "*fp32" if argument in FP32_POINTERS else INTEGER_POINTERS.get(argument, f"*{dtype}")
        else:
            kind = "fp32" if argument == "scale" else "i32"
        signature[argument] = kind
    # What the launcher's specialisation sees: allocations, strides of whole heads, and the band's row stride.
    runtime = {*forward.RUNTIME, "scale", "B"}
    divisible = tuple(argument for argument in signature if argument not in runtime)
    return CompileCase(name, kernel, signature, constexprs, divisible_by_16=divisible, **options)
