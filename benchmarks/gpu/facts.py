"""Properties and rates of the device: versions, free memory, copy bandwidth and matrix rates."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.gpu.plan import Request, cores, read_request
from benchmarks.machine import Machine, describe_machine, environment

PACKAGES = ("torch", "triton", "numpy", "omegaconf", "soundfile", "pytest")
PEERS = ("cut_cross_entropy", "faiss", "flash_kmeans", "liger_kernel", "quack", "vector_quantize_pytorch")
"""Import names of the peers of all benchmarks: without the package, its rows are empty."""


def main(request: Request) -> int:
    commit = environment("", request.commit)["commit"]
    lines = [f"commit {commit}, {platform.platform()}, Python {platform.python_version()}, {cores()} cores"]
    lines.append(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    lines.append("peers: " + ", ".join(f"{name} {_version(name)}" for name in PEERS))
    if missing := missing_for_triton():
        lines.append(f"**Triton cannot launch a kernel without {' and '.join(missing)}**")
    device = torch.device(request.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(device)
        lines.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"multiprocessors, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda}"
        )
        lines += _smi()
    request.note({"lines": lines})  # before the ceilings: facts are not lost where those fail
    machine = _machine(request, device)
    request.note({"lines": [*lines, machine.describe()], "machine": asdict(machine), "line": machine.device})
    print("\n".join([*lines, machine.describe()]))
    return 0


def missing_for_triton() -> list[str]:
    """Tools with which Triton compiles a C module at its first launch, and that are not there."""
    found = {
        "gcc or clang": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "the headers of Python": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
    }
    return [name for name, there in found.items() if not there]


def _machine(request: Request, device: torch.device) -> Machine:
    if request.rehearse:
        rates = dict.fromkeys(("float32", "float16", "bfloat16", "int8"), 1e11)
        return Machine("rehearsal", "cpu", torch.get_num_threads(), rates, 1e10, "invented for a rehearsal")
    return describe_machine(device)


def _version(module: str) -> str:
    """Version of the package that provides a module, which may have another name: faiss is in faiss-cpu."""
    packages = metadata.packages_distributions().get(module)
    return metadata.version(packages[0]) if packages else "absent"


def _smi() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ["nvidia-smi did not answer"]
    return [f"nvidia-smi ({query}): {line}" for line in result.stdout.splitlines()[:1]]


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
