"""Every kernel of every shipped configuration, for an ahead-of-time compilation: all that a call can have."""

from dataclasses import replace
from typing import Any

from ..aot import CompileCase, leaves
from ..tuning import shipped
from . import backward, forward, position
from .launch import choose_config
from .records import Frames, Given, KeyGradients, Positions, QueryGradients, Rows, Strides

KERNELS = {
    "forward": forward.chunked_attention_forward_kernel,
    "backward_query": backward.chunked_attention_backward_query_kernel,
    "backward_key": backward.chunked_attention_backward_key_kernel,
    "band": position.chunked_attention_band_kernel,
    "table_gradient": position.chunked_attention_table_gradient_kernel,
}
MASKED = ("forward", "backward_query", "backward_key")  # that read a key mask


def compile_cases() -> list[CompileCase]:
    return [
        replace(
            compile_case(f"{file.name}-{key}{'-key_mask' if key_mask else ''}", key, key_mask, file.configs),
            architectures=file.serves(key),
        )
        for file in shipped("chunked_attention")
        for key in file.keys
        if not key.endswith("key_mask")
        for key_mask in ((False, True) if key.split("/")[0] in MASKED else (False,))
    ]


def compile_case(
    name: str, key: str, key_mask: bool, configs: dict[str, dict[str, Any]], head_dim: int | None = None
) -> CompileCase:
    """Positions, both biases, lengths and starts, with or without a key mask; ``head_dim``: other than the key's."""
    name_of_kernel = key.split("/")[0]
    kernel = KERNELS[name_of_kernel]
    dtype, padded = "fp32" if key.endswith("fp32") else "bf16", int(key.split("/")[1])
    config = dict(choose_config(configs, key, key_mask))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    options["maxnreg"] = config.pop("maxnreg", None)
    size = head_dim or padded
    constexprs = {
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "UNIT": 1 if size % 16 == 0 else 8,
        "D": size,
        "BD": padded,
        "ACCUMULATE": False,
        **config,
    }
    constexprs = {argument: value for argument, value in constexprs.items() if argument in kernel.arg_names}
    known = _types(name_of_kernel, f"*{dtype}", key_mask)
    signature = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
    # What the launcher's specialisation sees: allocations, and strides of whole heads where they are multiples of 16.
    divisible = tuple(
        member
        for member, _, kind in leaves(signature)
        if kind
        # The first row of the table is whole rows behind an allocation: at 16 bytes for heads of multiples of 8.
        and not (member.endswith(("table", "table_ptr")) and size % 8)
        and (kind.startswith("*") or (constexprs["UNIT"] == 1 and ("strides" in member or "table_head" in member)))
    )
    return CompileCase(name, kernel, signature, constexprs, divisible_by_16=divisible, **options)


def _types(kernel: str, frame: str, key_mask: bool) -> dict[str, Any]:
    """Types of the arguments that are not int32; ``frame``: of queries, keys, values and what is like them."""
    strides = Strides("i32", "i32", "i32")
    gradients: tuple[str, ...] = KeyGradients(frame, frame, frame)
    if kernel == "backward_query":
        gradients = QueryGradients(frame, frame, "*fp32", "*fp32")
    return {
        "frames": Frames(frame, frame, frame, frame),
        "strides": Frames(strides, strides, strides, strides, strides if kernel.startswith("backward") else None),
        **dict.fromkeys(("q_strides", "gradient_strides"), strides),
        "given": Given(frame, "*i64", "*i64", "*u8" if key_mask else None),
        "rows": Rows("*fp32", "*fp32"),
        "gradients": gradients,
        "positions": Positions(frame, frame, frame, "i32"),
        **dict.fromkeys(("q_ptr", "table_ptr", "band_ptr", "dscores_ptr"), frame),
        **dict.fromkeys(("lse_ptr", "partial_ptr"), "*fp32"),
        "scale": "fp32",
    }
