"""Compile Triton kernels for other GPUs, and read registers, spills and machine code from the result.

Each operation lists its kernels at every shipped configuration in ``compile_cases()``: in ``kernels/<op>.py``, or in
``kernels/<op>/compile_cases.py``. The compile tests and ``benchmarks/machine_code/report.py`` read the same lists.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .tuning import ARCHITECTURES

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def spill_limit() -> int:
    """Bytes a thread may spill: none by the tested Triton, 3.7; others assemble some cases with a few (README.md)."""
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return 16 if version < (3, 7) else 0 if version == (3, 7) else 128


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shipped configuration."""

    name: str
    kernel: Any
    # Argument -> Triton type: "*bf16", "i32", "i64", "fp32"; for a record a named tuple of them, None where a member is
    # absent. Constexprs are added for you.
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    # Pointers and sizes that the launcher specialises on; "record.member" for those of a record.
    divisible_by_16: tuple[str, ...] = field(default=())
    maxnreg: int | None = None  # registers that a thread may take at most
    architectures: tuple[int, ...] = ARCHITECTURES  # whose GPUs launch it


@dataclass(frozen=True)
class Report:
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    report: Report
    cubin: bytes


def compile_for(case: CompileCase, architecture: int) -> Report:
    """Compile to a cubin for sm_<architecture> and return its resource use (no GPU needed)."""
    return compile_cubin(case, architecture).report


def leaves(value: Any, name: str = "", path: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """Dotted name, path and type of every member of an argument that is a record, or of a dict of arguments."""
    if isinstance(value, dict):
        members: Iterable[tuple[str, Any]] = value.items()
    elif isinstance(value, tuple):
        members = zip(value._fields, value)  # type: ignore[attr-defined]
    else:
        yield name, path, value
        return
    for index, (member, inner) in enumerate(members):
        yield from leaves(inner, f"{name}.{member}" if name else member, (*path, index))


def _absent_as_constants(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_absent_as_constants, value))
    return "constexpr" if value is None else value


def source_of(case: CompileCase) -> Any:
    """The kernel with the types, constants and alignments of a case, as Triton compiles it."""
    from triton.compiler import ASTSource

    signature = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    signature = {name: signature[name] for name in case.kernel.arg_names}
    members = {name: (path, kind) for name, path, kind in leaves(signature)}
    constants: dict[Any, Any] = dict(case.constexprs)
    constants |= dict.fromkeys(path for path, kind in members.values() if kind is None)
    attributes = {members[name][0]: [["tt.divisibility", 16]] for name in case.divisible_by_16}
    types = {name: _absent_as_constants(kind) for name, kind in signature.items()}
    return ASTSource(case.kernel, types, constexprs=constants, attrs=attributes)


def compile_cubin(case: CompileCase, architecture: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    options: dict[str, Any] = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg:
        options["maxnreg"] = case.maxnreg
    compiled = triton.compile(source_of(case), target=GPUTarget("cuda", architecture, 32), options=options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _read_cubin(cubin, "cuobjdump", "-res-usage"))
    assert usage, f"cuobjdump printed no resource usage of {case.kernel.__name__}"
    registers, stack, local = (int(number) for number in usage.groups())
    instructions = tuple(sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", ptx))))
    return Compiled(Report(registers, stack + local, compiled.metadata.shared, instructions), cubin)


def disassemble(cubin: bytes) -> str:
    """The machine code (SASS) as text, branch targets as labels."""
    return _read_cubin(cubin, "nvdisasm", "-c")


def _read_cubin(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True).stdout


@cache
def _tool(name: str) -> str:
    """Path of a CUDA tool: Triton brings its own, else one on the PATH."""
    import triton

    found = next((str(path) for path in Path(triton.__file__).parent.rglob(f"{name}*")), None) or shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on the PATH; the CUDA toolkit has it")
    return found
