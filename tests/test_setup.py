"""setup.py: the GPU architectures that an installation is built for."""

import subprocess
import sys
from pathlib import Path

import pytest

from bestrq2.ops._impl import library

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


def test_library_from_a_path_that_the_locale_cannot_decode():
    """torch hands the file name of the caller to C++ in UTF-8: with LC_ALL=C and a path in UTF-8 the import failed."""
    source = Path(library.__file__).read_text(encoding="utf-8")
    names: dict = {}
    exec(compile(source, "/pfad mit \udcc3\udcbc/library.py", "exec"), names)
    assert names["fragment"]().ns == "bestrq2"
