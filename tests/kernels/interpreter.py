"""Tests whose kernels run in Triton's interpreter, in a process of their own: Triton decides when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def run_interpreted(*arguments: object) -> str:
    """Run pytest with these arguments in the interpreter, require success, return the line that counts the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-1]
