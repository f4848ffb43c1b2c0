"""Build the C++ and CUDA extension in place, for the present architecture alone, beside the other stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.plan import ROOT, Request, read_request


def main(request: Request) -> int:
    missing = [tool for tool in ("cmake", "ninja", "nvcc") if not shutil.which(tool)]
    request.note({"line": f"not on the PATH: {', '.join(missing)}" if missing else "building"})
    if request.rehearse:  # the tree is not touched
        return subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT).returncode
    import torch

    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {"BESTRQ2_EXTENSION": "required", "BESTRQ2_CUDA_ARCHITECTURES": f"{major}{minor}"}
    environment |= {"BESTRQ2_CUDA": "0" if "nvcc" in missing else "1"}
    status = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, env=environment
    ).returncode
    if status == 0:
        request.note({"line": f"extension for sm_{major}{minor}" + (", without CUDA" if "nvcc" in missing else "")})
    return status


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
