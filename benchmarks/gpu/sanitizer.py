"""compute-sanitizer's memcheck over the smoke checks of attention and quantize, every allocation its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import smoke
from benchmarks.gpu.plan import Request, read_request


def main(request: Request) -> int:
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not tool and not request.rehearse:
        request.note({"line": "compute-sanitizer is not installed"})
        return 1
    request.write(request.work / "smoke.request.json")
    # The caching allocator would hide an access behind a tensor's end.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, found = 0, []
    with (request.out / "sanitizer.txt").open("w") as file:
        for op in ("quantize",) if request.rehearse else ("chunked_attention", "quantize"):
            command = [*smoke.command(request, op), "bestrq2[triton]"]
            if tool and not request.rehearse:
                command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20", *command]
            try:
                result = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=max(request.left() - 1, 1)
                )
            except subprocess.TimeoutExpired:
                found.append(f"{op}: not finished")
                break
            found.append(f"{op}: {'clean' if result.returncode == 0 else f'exit status {result.returncode}'}")
            status = status or result.returncode
            request.note({"line": "; ".join(found)})
    return status


if __name__ == "__main__":
    sys.exit(main(read_request(Path(sys.argv[1]))))
