"""Every kernel of every shipped configuration, for an ahead-of-time compilation: all that a call can have."""

from dataclasses import replace
from typing import Any

from ..aot import CompileCase
from ..tuning import shipped
from . import backward, forward, position
from .launch import choose_config

KERNELS = {
    "forward": (forward.chunked_attention_forward_kernel, forward.RUNTIME),
    "backward_query": (backward.chunked_attention_backward_query_kernel, backward.RUNTIME),
    "backward_key": (backward.chunked_attention_backward_key_kernel, backward.RUNTIME),
    "band": (position.chunked_attention_band_kernel, position.RUNTIME),
    "table_gradient": (position.chunked_attention_table_gradient_kernel, position.RUNTIME),
}
FP32_POINTERS = ("lse_ptr", "delta_ptr", "content_sums_ptr", "position_sums_ptr", "partial_ptr")
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
        for key_mask in ((False, True) if "key_mask_ptr" in KERNELS[key.split("/")[0]][0].arg_names else (False,))
    ]


def compile_case(
    name: str, key: str, key_mask: bool, configs: dict[str, dict[str, Any]], head_dim: int | None = None
) -> CompileCase:
    """Positions, both biases, lengths and starts, with or without a key mask; ``head_dim``: other than the key's."""
    kernel, runtime = KERNELS[key.split("/")[0]]
    dtype, padded = "fp32" if key.endswith("fp32") else "bf16", int(key.split("/")[1])
    config = dict(choose_config(configs, key, key_mask))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    size = head_dim or padded
    constexprs = {
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "UNIT": 1 if size % 16 == 0 else 8,
        "D": size,
        "BD": padded,
        "ACCUMULATE": False,
        **({} if key_mask else {"key_mask_ptr": None}),
        **config,
    }
    names = kernel.arg_names
    constexprs = {argument: value for argument, value in constexprs.items() if argument in names}
    signature = {}
    for argument in names:
        if argument in constexprs:
            continue
        if argument.endswith("_ptr"):
            kind = "*fp32" if argument in FP32_POINTERS else INTEGER_POINTERS.get(argument, f"*{dtype}")
        else:
            kind = "fp32" if argument == "scale" else "i32"
        signature[argument] = kind
    # What the launcher's specialisation sees: allocations, and strides of whole heads where they are multiples of 16.
    strides = () if constexprs["UNIT"] != 1 else tuple(a for a in signature if a not in (*runtime, "scale"))
    pointers = tuple(argument for argument in signature if argument.endswith("_ptr") and argument != "table_ptr")
    divisible = tuple(dict.fromkeys((*pointers, *(a for a in strides if not a.endswith("_ptr")))))
    return CompileCase(name, kernel, signature, constexprs, divisible_by_16=divisible, **options)
