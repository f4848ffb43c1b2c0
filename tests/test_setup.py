"""setup.py: the GPU architectures that an installation is built for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import os, setuptools
setuptools.setup = lambda **options: None
import setup
print(setup.CMakeBuild.cuda_architectures())
"""


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("BESTRQ2_CUDA_ARCHITECTURES", "90", ["-DBESTRQ2_CUDA_ARCHITECTURES=90"]),
        ("BESTRQ2_CUDA_ARCHITECTURES", "80; 90a", ["-DBESTRQ2_CUDA_ARCHITECTURES=80;90a"]),
        ("CUDAARCHS", "86", ["-DBESTRQ2_CUDA_ARCHITECTURES=86"]),
        ("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX", ["-DBESTRQ2_CUDA_ARCHITECTURES=80;90"]),
        ("UNRELATED", "1", []),
        ("BESTRQ2_CUDA_ARCHITECTURES", "hopper", "expected numbers like 80;90, got 'hopper'"),
    ],
)
def test_architectures_come_from_the_environment(variable, value, expected):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"PATH": "/usr/bin:/bin", variable: value},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if isinstance(expected, str):
        assert expected in result.stderr
    else:
        assert result.stdout.strip() == str(expected), result.stderr
