"""Every kernel variant of every shipped configuration, for an ahead-of-time compilation."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..aot import CompileCase
from ..tuning import shipped
from . import CANDIDATES
from .launch import MERGE_ROWS, OP, hidden_gradient_tile, precision
from .loss import loss_kernel, merge_kernel
from .products import hidden_gradient_kernel, logits_kernel, weight_gradient_kernel
from .scale import BLOCK, scale_kernel
from .softmax_gradient import softmax_gradient_kernel

FLAGS = (False, True)
SELECTIONS = ((False, False), (False, True), (True, True))  # a list of rows and row weights: a list has always weights
SIZES = {
    "row_stride": "i32",
    "rows": "i32",
    "start": "i32",
    "chunk": "i32",
    "N": "i32",
    "D": "i32",
    "V": "i32",
    "share": "i32",
}
OPTIONS = {"scale": "fp32", "label_smoothing": "fp32", "z_loss": "fp32"}
ROWS = {"p_targets": "*i64", "p_weights": "*fp32", "p_index": "*i64", "p_count": "*i64"}
RESULTS = {"p_losses": "*fp32", "p_correct": "*fp32"}
PARTS = {"p_parts": "*fp32", "p_first": "*i32"}


def compile_cases() -> list[CompileCase]:
    """Of ``default.json`` all, of the other files those that differ from it, each for the architectures it serves."""
    files = shipped(OP)
    default = next(file.configs for file in files if file.name == "default.json")
    usual = {case.name: _launched(case) for case in _cases("", default)}
    found = []
    for file in files:
        for case, same in zip(_cases(file.name, file.configs), _cases("", file.configs)):
            if file.name == "default.json" or usual.get(same.name) != _launched(same):
                found.append(replace(case, architectures=file.architectures))
    return found


def _launched(case: CompileCase) -> tuple[object, ...]:
    return case.constexprs, case.num_warps, case.num_stages


def candidate_cases() -> list[CompileCase]:
    """Every candidate of benchmarks/tune.py, in the variant of its kernel that takes most registers."""
    default, found = next(file.configs for file in shipped(OP) if file.name == "default.json"), []
    for key, configs in CANDIDATES.items():
        for config in configs if key != "chunk" else ():
            tile = "-".join(str(value) for value in config.values())
            prefix = f"{key.partition('/')[0]}-{tile}-{'fp32' if key.endswith('/32') else 'bf16'}"
            cases = (case for case in _cases(tile, default | {key: config}) if case.name.startswith(prefix))
            whole, summed = key.endswith(("/whole", "/summed")), key.endswith("/summed")
            wanted = {"WHOLE": whole, "SUM": summed}
            matching = [
                c for c in cases if all(c.constexprs.get(flag, value) == value for flag, value in wanted.items())
            ]
            # The one with all options; adding, the gradient of the rows takes the tile of the weight gradient.
            found.append(next(case for case in reversed(matching) if not case.constexprs.get("ADD")))
            if key.startswith("weight_gradient"):
                adding = f"hidden_gradient-{prefix.partition('-')[2]}-add"
                found += [case for case in _cases(tile, default | {key: config}) if case.name == adding]
    return found


def _cases(file: str, configs: dict[str, Any]) -> Iterator[CompileCase]:
    flags: dict[str, Any]
    for dtype in ("bf16", "fp16", "fp32"):
        rows = {"p_logits": f"*{dtype}", "p_sums": "*fp32", **dict.fromkeys(("rows", "start", "num_classes"), "i32")}
        rows |= ROWS | RESULTS | OPTIONS
        for index, weights in SELECTIONS:
            for key, whole in (("softmax_gradient", False), ("softmax_gradient/whole", True)):
                flags = {"HAS_INDEX": index, "HAS_WEIGHTS": weights, "GRADIENT": True, "SUM": False, "WHOLE": whole}
                if key in configs:
                    yield _case(softmax_gradient_kernel, f"{file}-{dtype}", rows, flags, configs[key])

            if "softmax_gradient/summed" in configs:
                flags |= {"SUM": True}
                yield _case(softmax_gradient_kernel, f"{file}-{dtype}", rows, flags, configs["softmax_gradient/summed"])

        bits = 32 if dtype == "fp32" else 16
        pointers = dict.fromkeys(("p_hidden", "p_weight", "p_logits", "p_dz", "p_out"), f"*{dtype}")
        pointers["p_total"] = "*fp32"
        for biased in FLAGS:
            name = f"{file}-{dtype}{'-bias' if biased else ''}"
            bias = {"p_bias": f"*{dtype}" if biased else "*fp32"}
            exact = {"PRECISION": precision(bits)}
            signature = pointers | bias | ROWS | SIZES | PARTS
            yield _case(logits_kernel, name, signature, {"HAS_BIAS": biased, **exact}, configs[f"logits/{bits}"])
            for index, smooth in ((i, s) for i in FLAGS for s in FLAGS):
                flags = {"HAS_INDEX": index, "HAS_BIAS": biased, "SMOOTH": smooth, **exact}
                yield _case(loss_kernel, name, signature, flags, configs[f"loss/{bits}"])
        signature = pointers | ROWS | SIZES
        for add in FLAGS:  # over codebooks, in fp32
            out = {"p_out": "*fp32" if add else f"*{dtype}"}
            flags = {"ADD": add, **exact}
            tile = configs[f"{hidden_gradient_tile(add)}/{bits}"]
            yield _case(hidden_gradient_kernel, f"{file}-{dtype}", signature | out, flags, tile)
        yield _case(weight_gradient_kernel, f"{file}-{dtype}", signature, exact, configs[f"weight_gradient/{bits}"])
        grad = {"p_grad": f"*{dtype}", "p_factor": "*fp32", "size": "i32"}
        yield _case(scale_kernel, f"{file}-{dtype}", grad, {}, {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3})
    # Under autocast the rows are fp32 and the products 16-bit.
    mixed = {"p_hidden": "*fp32", "p_weight": "*bf16", "p_bias": "*bf16", "p_logits": "*bf16", "p_dz": "*bf16"}
    mixed |= {"p_total": "*fp32", **ROWS, **SIZES, **PARTS}
    flags = {"HAS_BIAS": True, "PRECISION": precision(16)}
    yield _case(logits_kernel, f"{file}-mixed", mixed, flags, configs["logits/16"])
    flags |= {"HAS_INDEX": True, "SMOOTH": True}
    yield _case(loss_kernel, f"{file}-mixed", mixed, flags, configs["loss/16"])
    exact = {"PRECISION": precision(16)}
    yield _case(weight_gradient_kernel, f"{file}-mixed", mixed, exact, configs["weight_gradient/16"])

    merge = {**PARTS, **ROWS, **RESULTS, **OPTIONS, "N": "i32", "V": "i32", "shares": "i32"}
    for index, weights in SELECTIONS:
        flags = {"HAS_INDEX": index, "HAS_WEIGHTS": weights}
        yield _case(merge_kernel, file, merge, flags, {"BM": MERGE_ROWS, "num_warps": 4, "num_stages": 3})


def _case(kernel: Any, name: str, types: dict[str, str], flags: dict[str, Any], config: dict[str, Any]) -> CompileCase:
    constants = {key: value for key, value in {**flags, **config}.items() if key not in ("num_warps", "num_stages")}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constants}
    set_flags = [key.lower() for key, value in flags.items() if value is True]
    aligned = ("p_", "row_stride", "D", "V", "num_classes", "share")
    free = {parameter.name for parameter in kernel.params if _is_free(parameter)}
    return CompileCase(
        "-".join([kernel.__name__.removesuffix("_kernel"), name, *set_flags]),
        kernel,
        signature,
        constants,
        config["num_warps"],
        config["num_stages"],
        tuple(argument for argument in signature if argument.startswith(aligned) and argument not in free),
    )


def _is_free(parameter: Any) -> bool:
    """Return True for an argument of whose value the launcher makes no variant of its kernel."""
    return parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
