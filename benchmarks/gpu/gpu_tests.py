"""The tests marked ``gpu``, on several processes: compilation, not memory, is what they take."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.plan import ROOT, Request, cores, read_request

# Where GPU tests are: collecting everything takes every process half a minute.
FOLDERS = (
    "tests/ops",
    "tests/kernels",
    "tests/models",
    "tests/training/test_on_gpu.py",
    "tests/training/test_compilation.py",
)


def main(request: Request) -> int:
    chosen = ["tests/test_gpu_run.py", "-k", "left_over"] if request.rehearse else ["-m", "gpu", *FOLDERS]
    parallel = ["-n", str(min(8, max(1, cores() // 2)))]
    if request.rehearse or importlib.util.find_spec("xdist") is None:
        parallel = []
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=30", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.gpu.failures"]
    # A file whose packages are missing here may not keep the others from running, nor may a missing plugin.
    command += ["--continue-on-collection-errors", "-o", "addopts=-ra --import-mode=importlib"]
    command += [*chosen, *parallel, f"--device={request.device}"]
    target, last = request.out / "tests.txt", ""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with target.open("w") as file:
        for line in process.stdout:
            print(line, end="", file=file, flush=True)
            print(line, end="", flush=True)
            if line.strip():
                last = line.strip()
                request.note({"line": last})
    return process.wait()


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
