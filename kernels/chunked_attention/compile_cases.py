"""Every kernel of every shipped configuration for an ahead-of-time compilation, with all inputs of a call and without.

An absent input is compiled away. That usually frees registers, but some tiles have spilled only without one.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..aot import CompileCase, leaves
from ..tuning import ARCHITECTURES, FOLDER, Shipped, merged, shipped
from . import backward, forward, position
from .launch import checked_config, config_name, padded_dim
from .records import Frames, Given, KeyGradients, Positions, QueryGradients, Rows, Strides

OP = "chunked_attention"
KERNELS = {
    "forward": forward.chunked_attention_forward_kernel,
    "backward_query": backward.chunked_attention_backward_query_kernel,
    "backward_key": backward.chunked_attention_backward_key_kernel,
    "band": position.chunked_attention_band_kernel,
    "table_gradient": position.chunked_attention_table_gradient_kernel,
}
OF_POSITIONS = ("band", "table_gradient")  # launched only with positions, and without the key mask


@dataclass(frozen=True)
class Inputs:
    """Inputs that a call has beside query, key and value."""

    positions: bool = True
    biases: bool = True
    lengths: bool = True
    starts: bool = True
    key_mask: bool = False
    segments: bool = False  # so many positions that the band is processed in segments

    def __str__(self) -> str:
        absent = (name for name in ("positions", "biases", "lengths", "starts") if not getattr(self, name))
        present = (name for name in ("key_mask", "segments") if getattr(self, name))
        return "".join((*(f"-no_{name}" for name in absent), *(f"-{name}" for name in present)))


ALL = Inputs()
BARE = Inputs(positions=False, biases=False, lengths=False, starts=False)
WITHOUT_POSITIONS = {80: BARE, 90: replace(BARE, lengths=True), 100: replace(BARE, lengths=True)}


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration with all inputs, and a part of them with a key mask as well, without positions and in
    segments. docs/kernels/chunked_attention.md says what else was compiled once."""
    return [case for file in shipped(OP) for entry in file.keys for case in _cases_of(file, entry)]


def _cases_of(file: Shipped, entry: str) -> Iterator[CompileCase]:
    """A configuration with those inputs and for those architectures with which a call takes it."""
    kernel, head_dim, fp32 = parts_of(entry)
    inputs: list[tuple[Inputs, tuple[int, ...]]] = [(ALL, ARCHITECTURES)]
    own = entry.endswith("/no_positions")
    if kernel not in OF_POSITIONS:
        chosen = ARCHITECTURES if own else _some(ARCHITECTURES, kernel, head_dim, fp32)
        # A tile that a mask does not share, and one of a single architecture, are compiled with it wherever they serve.
        shared = file.name == "default.json" and not entry.endswith("/key_mask")
        masked = _some(file.serves(entry), kernel, head_dim, fp32) if shared else ARCHITECTURES
        inputs += [(replace(ALL, key_mask=True), masked), *((WITHOUT_POSITIONS[sm], (sm,)) for sm in chosen)]
    if own:
        inputs += [(replace(ALL, positions=False, key_mask=True), file.serves(entry)[-1:])]
    if entry == "forward/64":
        inputs += [(replace(BARE, positions=True), (80,)), (replace(BARE, positions=True, key_mask=True), (80,))]
    if kernel == "table_gradient" and head_dim == 64:
        inputs += [(replace(BARE, positions=True), (100,))]
    if kernel == "backward_key" and head_dim == 64:
        inputs += [(replace(ALL, segments=True), (80 if fp32 else 90,))]
    for given, architectures in inputs:
        served = tuple(
            architecture
            for architecture in file.serves(entry)
            if architecture in architectures
            and entry == _name(merged(FOLDER, OP, None, architecture) | file.configs, kernel, head_dim, fp32, given)
        )
        if served:
            case = compile_case(f"{file.name}-{entry}{given}", kernel, head_dim, fp32, given, file.configs)
            yield replace(case, architectures=served)


def _some(architectures: tuple[int, ...], kernel: str, head_dim: int, fp32: bool) -> tuple[int, ...]:
    """All of them for the common heads, else one, another for every kernel, size and dtype."""
    if not fp32 and head_dim < 128:
        return architectures
    return (architectures[(list(KERNELS).index(kernel) + head_dim // 64 + fp32) % len(architectures)],)


def parts_of(entry: str) -> tuple[str, int, bool]:
    """Kernel, head size, and whether it is for fp32, of the name of a configuration."""
    kernel, size, *rest = entry.split("/")
    return kernel, int(size), "fp32" in rest


def _name(names: Container[str], kernel: str, head_dim: int, fp32: bool, inputs: Inputs) -> str:
    return config_name(names, kernel, head_dim, fp32, key_mask=inputs.key_mask, positions=inputs.positions)


def compile_case(
    name: str, kernel_name: str, head_dim: int, fp32: bool, inputs: Inputs, configs: Mapping[str, Mapping[str, Any]]
) -> CompileCase:
    """One kernel with the given inputs."""
    kernel, dtype = KERNELS[kernel_name], "fp32" if fp32 else "bf16"
    config = checked_config(configs, _name(configs, kernel_name, head_dim, fp32, inputs))
    options = {"num_warps": config.pop("num_warps"), "num_stages": config.pop("num_stages")}
    options["maxnreg"] = config.pop("maxnreg", None)
    constexprs = {
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
        "UNIT": 8 if head_dim % 16 == 8 else 1,
        "D": head_dim,
        "BD": padded_dim(head_dim),
        "ACCUMULATE": inputs.segments,
        **config,
    }
    known = _types(kernel_name, f"*{dtype}", inputs)
    absent = [name for name, kind in known.items() if kind is None]
    constexprs = {argument: value for argument, value in constexprs.items() if argument in kernel.arg_names}
    constexprs |= {name: None for name in absent if name in kernel.arg_names}
    signature = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constexprs}
    # What the launcher's specialisation sees: allocations, and strides of whole heads where they are multiples of 16.
    divisible = tuple(
        member
        for member, _, kind in leaves(signature)
        if kind
        # The first row of the table is whole rows behind an allocation: at 16 bytes for heads of multiples of 8.
        and not (member.endswith(("table", "table_ptr")) and head_dim % 8)
        and (kind.startswith("*") or (head_dim % 16 == 0 and ("strides" in member or "table_head" in member)))
    )
    return CompileCase(name, kernel, signature, constexprs, divisible_by_16=divisible, **options)


def _types(kernel: str, frame: str, inputs: Inputs) -> dict[str, Any]:
    """Types of the arguments that are not int32; ``frame``: of queries, keys, values and what is like them."""
    strides = Strides("i32", "i32", "i32")
    bias, of_bias = (frame, "*fp32") if inputs.biases else (None, None)
    position = frame if inputs.positions else None
    gradients: tuple[Any, ...] = KeyGradients(frame, *(("*fp32",) * 2 if inputs.segments else (frame,) * 2))
    if kernel == "backward_query":
        gradients = QueryGradients(frame, frame, of_bias, of_bias if inputs.positions else None)
    return {
        "frames": Frames(frame, frame, frame, frame),
        "strides": Frames(strides, strides, strides, strides, strides if kernel.startswith("backward") else None),
        **dict.fromkeys(("q_strides", "gradient_strides"), strides),
        "given": Given(
            bias,
            "*i64" if inputs.lengths else None,
            "*i64" if inputs.starts else None,
            "*u8" if inputs.key_mask and kernel not in OF_POSITIONS else None,
        ),
        "rows": Rows("*fp32", "*fp32"),
        "gradients": gradients,
        "positions": Positions(position, position, position, "i32" if inputs.positions else None),
        "band_ptr": position,
        **dict.fromkeys(("q_ptr", "table_ptr", "dscores_ptr"), frame),
        **dict.fromkeys(("lse_ptr", "partial_ptr"), "*fp32"),
        "scale": "fp32",
    }
