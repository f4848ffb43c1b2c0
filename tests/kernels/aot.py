"""Compile Triton kernels for GPUs that are not here, and read what the compiler and assembler say of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def spill_limit() -> int:
    """Bytes a thread may spill: none, except that Triton 3.6 assembles four of our cases with 16 to 32."""
    import triton

    return 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 32


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shipped configuration. Each ``kernels/<op>`` module lists its own in ``compile_cases()``."""

    name: str
    kernel: Any
    signature: dict[str, str]  # argument -> Triton type: "*bf16", "i32", "i64", "fp32"; constexprs are added for you
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = field(default=())  # pointers and sizes that the launcher specialises on


@dataclass(frozen=True)
class Report:
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


def compile_for(case: CompileCase, architecture: int) -> Report:
    """Compile to a cubin for sm_<architecture> and return its resource use (no GPU needed)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    names = list(case.kernel.arg_names)
    signature = {name: signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16}
    source = ASTSource(case.kernel, signature, constexprs=case.constexprs, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, stack, spilled = _resources(compiled.asm["cubin"], case.kernel.__name__)
    ptx = compiled.asm["ptx"]
    instructions = tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))))
    return Report(registers, stack + spilled, compiled.metadata.shared, instructions)


def _resources(cubin: bytes, kernel_name: str) -> tuple[int, int, int]:
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, f"no resource usage for {kernel_name} in: {text}"
    return int(usage[1]), int(usage[2]), int(usage[3])
