"""Read machine code (SASS) as nvdisasm prints it: its loops, and the instructions of an iteration.

Only counting happens here: no instruction is simulated, so latencies, dependencies and bank conflicts are not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

LANES = 32

CLASSES = {
    "mma": r"[HIQDO]?G?MMA|UTC\w*MMA",
    "fp32": r"FFMA2?|FMUL2?|FADD2?|FFMA32I|FSWZADD",
    "compare": r"FMNMX3?|FSETP?|FSEL|FCMP|SEL|V?IMNMX3?|HMNMX2|HSETP2",
    "convert": r"F2FP?|F2F|F2I|I2FP?|I2F|FRND|I2IP",
    "half": r"HFMA2|HADD2|HMUL2|HADD2_32I|HFMA2_MMA",
    "special": r"MUFU|FCHK",
    "shuffle": r"SHFL|REDUX|VOTE|MATCH",
    "ldsm": r"LDSM",
    "lds": r"LDS",
    "sts": r"STS|STSM|ATOMS",
    "ldg": r"LDG|LD|LDL",
    "ldgsts": r"LDGSTS",
    "tma": r"UTMA\w+|UBLK\w+|LDTM|STTM",
    "stg": r"STG|ST|STL|RED|REDG|ATOMG?",
    "sync": r"BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|FENCE|ARRIVES|BSSY|BSYNC|NANOSLEEP|ERRBAR|CCTL",
    "branch": r"BRA|BRX|JMP|CALL|RET|EXIT|NOP|BREAK|YIELD|BPT",
    "uniform": r"U\w+|R2UR|S2UR|ULDC",
    "imad": r"IMAD|IMUL|IDP|IMAD32I",
    "integer": r"\w+",  # the rest: IADD3, LOP3, LEA, SHF, ISETP, PRMT, MOV, predicates
}
"""Class of an opcode: the first pattern that matches all of it. HADD2.F32 is a conversion, see :func:`classify`."""

_PATTERNS = {name: re.compile(f"(?:{pattern})$") for name, pattern in CLASSES.items()}
_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?P<text>[^;]*?)\s*;", re.MULTILINE)
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"\bBRA\b.*\((\.L_\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


@dataclass(frozen=True)
class Instruction:
    text: str

    @cached_property
    def operation(self) -> str:
        """Opcode with its modifiers: ``HGMMA.64x64x16.F32``."""
        return _PREDICATE.sub("", self.text).split()[0]

    @cached_property
    def kind(self) -> str:
        return classify(self.operation)

    @property
    def never(self) -> bool:
        """Predicated off for good: ``@!PT LDS RZ, [RZ]`` takes an issue slot and touches nothing."""
        return self.text.startswith("@!PT")


def classify(operation: str) -> str:
    if operation.startswith("HADD2.F32"):
        return "convert"
    base = operation.split(".")[0]
    return next(name for name, pattern in _PATTERNS.items() if pattern.match(base))


def mma_fmas(operation: str) -> int:
    """Multiply-adds of one warp in a matrix instruction, counted at the 16-bit rate (tf32 is half as fast: twice)."""
    warpgroup = re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", operation)
    if warpgroup:
        m, n, k = (int(size) for size in warpgroup.groups())
        fmas = m * n * k // 4
    else:
        warp = re.match(r"HMMA\.(16)(8)(\d+)", operation)
        if not warp:
            return 0
        m, n, k = (int(size) for size in warp.groups())
        fmas = m * n * k
    return fmas * (2 if "TF32" in operation else 1)


def global_bytes(instruction: Instruction) -> int:
    """Bytes that a warp loads from or stores to global memory, every lane active."""
    return LANES * _width(instruction.operation) if instruction.kind in ("ldg", "ldgsts", "stg") else 0


def shared_bytes(instruction: Instruction) -> int:
    """Bytes that a warp moves to or from shared memory; broadcasts are not credited.

    A warpgroup's matrix instruction reads its second operand, and its first where that is no register, once for all
    four warps.
    """
    operation, kind = instruction.operation, instruction.kind
    if instruction.never:
        return 0
    if kind == "ldsm" or operation.startswith("STSM"):
        matrices = re.search(r"\.(\d)(?=\.|$)", operation.replace(".16.", "."))
        return 128 * (int(matrices[1]) if matrices else 1)
    if kind in ("lds", "sts", "ldgsts"):
        return LANES * _width(operation)
    shape = re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", operation)
    if not shape:
        return 0
    m, n, k = (int(size) for size in shape.groups())
    size = 4 if "TF32" in operation else 2
    first = 0 if re.search(r"\sR\d+\S*,\s*R\d+\S*,\s*gdesc", instruction.text) else m * k
    return (first + n * k) * size // 4


def _width(operation: str) -> int:
    """Bytes a lane: the modifier of a load or store, 4 where it has none."""
    for modifier, size in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if modifier in operation:
            return size
    return 4


@dataclass(frozen=True)
class Counts:
    """Instruction counts of a piece of code, per warp."""

    classes: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)  # matrix instructions by shape
    fmas: int = 0
    shared_bytes: int = 0
    global_bytes: int = 0
    read_bytes: int = 0  # the loads among global_bytes

    @property
    def instructions(self) -> int:
        return sum(self.classes.values())


def count(instructions: Iterable[Instruction]) -> Counts:
    code = list(instructions)
    matrix = Counter(_shape(i.operation) for i in code if i.kind == "mma")
    return Counts(
        Counter(i.kind for i in code),
        matrix,
        sum(mma_fmas(i.operation) for i in code if i.kind == "mma"),
        sum(map(shared_bytes, code)),
        sum(map(global_bytes, code)),
        sum(global_bytes(i) for i in code if i.kind != "stg"),
    )


def _shape(operation: str) -> str:
    return ".".join(operation.split(".")[:2])


@dataclass
class Loop:
    """Instructions ``begin`` to ``end`` (its backward branch); ``counts`` leaves out the loops inside it."""

    begin: int
    end: int
    counts: Counts = field(default_factory=Counts)
    innermost: bool = True


@dataclass
class Code:
    instructions: list[Instruction]
    loops: list[Loop]
    outside: Counts  # in no loop


def parse(text: str) -> Code:
    """Instructions and loops of a disassembly. Backward branches to one label are one loop.

    Raises:
        ValueError: if the text holds no instruction: nvdisasm changed its output.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label, found = _LABEL.match(line), _LINE.match(line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append(Instruction(found["text"]))
    if not instructions:
        raise ValueError("no instruction found: is this the output of `nvdisasm -c`?")
    ends: dict[int, int] = {}
    for place, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.text)
        begin = labels.get(target[1], place + 1) if target else place + 1
        if begin < place:  # a branch to itself is padding behind the kernel
            ends[begin] = place
    loops = [Loop(begin, end) for begin, end in sorted(ends.items())]
    owner: list[Loop | None] = [None] * len(instructions)
    for loop in sorted(loops, key=lambda loop: loop.begin - loop.end):  # the longest first, inner ones overwrite
        owner[loop.begin : loop.end + 1] = [loop] * (loop.end + 1 - loop.begin)
    for loop in loops:
        loop.counts = count(i for i, held in zip(instructions, owner) if held is loop)
        loop.innermost = not any(loop.begin <= o.begin and o.end <= loop.end for o in loops if o is not loop)
    return Code(instructions, loops, count(i for i, held in zip(instructions, owner) if held is None))
