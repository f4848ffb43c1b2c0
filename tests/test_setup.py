"""setup.py: the GPU architectures that an installation is built for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bestrq2.ops.common import library

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
        ("CUDAARCHS", "80-real;90-virtual", ["-DBESTRQ2_CUDA_ARCHITECTURES=80;90"]),
        ("CUDAARCHS", "native", []),
        ("TORCH_CUDA_ARCH_LIST", "Ampere Hopper+PTX", []),
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


OLD_NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\n'; exit ;;
  *_100*) echo "nvcc fatal   : Unsupported gpu architecture 'compute_100'" >&2; exit 1 ;;
esac
exec {nvcc} "$@"
"""


@pytest.mark.slow
def test_an_nvcc_that_does_not_know_every_architecture(tmp_path):
    """As that of CUDA 12.4: without CUDA's kernel for sm_100, but not without all compiled code."""
    pybind11 = pytest.importorskip("pybind11")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if not (nvcc and shutil.which("cmake") and shutil.which("ninja")):
        pytest.skip("needs cmake, ninja and nvcc")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(OLD_NVCC.format(nvcc=nvcc))
    wrapper.chmod(0o755)
    environment = os.environ | {"PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("CUDACXX", "CUDAARCHS"):
        environment.pop(name, None)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "CUDA sources are built for sm_80;90\n" in result.stdout


def test_library_from_a_path_that_the_locale_cannot_decode():
    """torch hands the file name of the caller to C++ in UTF-8: with LC_ALL=C and a path in UTF-8 the import failed."""
    source = Path(library.__file__).read_text(encoding="utf-8")
    names: dict = {}
    exec(compile(source, "/pfad mit \udcc3\udcbc/library.py", "exec"), names)
    assert names["fragment"]().ns == "bestrq2"
