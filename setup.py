"""Build the C++/CUDA extension and map the folder ``kernels/`` to ``bestrq2.kernels``; the rest is in pyproject.toml.

``pip install .`` configures ``CMakeLists.txt`` with ninja and needs neither torch nor a GPU at build time.
Without a C++ compiler (or with ``BESTRQ2_EXTENSION=0``) the package still installs and runs its reference path.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Run CMake for the one extension; if it fails, print a notice and install without it."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if os.environ.get("BESTRQ2_EXTENSION", "1") == "0":
            self.warn_reference_only("BESTRQ2_EXTENSION=0")
            return
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DBESTRQ2_OUTPUT_DIR={target.parent}",
            f"-DBESTRQ2_OUTPUT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DBESTRQ2_CUDA={os.environ.get('BESTRQ2_CUDA', 'AUTO')}",
            *self.cuda_architectures(),
        ]
        steps = {
            "CMake could not configure the build: no usable C++ compiler, or as pip install -v shows": configure,
            "compilation failed": ["cmake", "--build", str(build_dir)],
        }
        for failure, command in steps.items():
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError):
                if os.environ.get("BESTRQ2_EXTENSION") == "required":
                    raise
                self.warn_reference_only(failure)
                return

    @staticmethod
    def cuda_architectures():
        """``BESTRQ2_CUDA_ARCHITECTURES``, or CMake's and PyTorch's variables: "90" or "80;90" ("9.0" is read as 90)."""
        names = ("BESTRQ2_CUDA_ARCHITECTURES", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST")
        name, given = next(((name, value) for name in names if (value := os.environ.get(name))), ("", ""))
        found = [
            re.sub(r"\+PTX$|-real$|-virtual$", "", part).replace(".", "") for part in re.split(r"[;, ]+", given) if part
        ]
        if not found:
            return []
        if not all(re.fullmatch(r"\d{2,3}[af]?", part) for part in found):
            if name == names[0]:
                raise ValueError(f"{name}: expected numbers like 80;90, got {given!r}")
            # CMake and PyTorch also take words, such as native or Hopper.
            print(f"bestrq2: {name}={given} is no list of numbers; building for the usual GPUs.", file=sys.stderr)
            return []
        return [f"-DBESTRQ2_CUDA_ARCHITECTURES={';'.join(found)}"]

    def warn_reference_only(self, reason):
        print(
            f"bestrq2: installed WITHOUT the C++ extension ({reason}); the slower PyTorch reference path is used.",
            file=sys.stderr,
        )


def packages():
    own = find_packages(include=["bestrq2", "bestrq2.*"])
    # The folder kernels/ installs as bestrq2.kernels: a top-level "kernels" would shadow Hugging Face's package.
    found = ["bestrq2.kernels", *(f"bestrq2.kernels.{p}" for p in find_packages("kernels"))]
    return own + found


setup(
    packages=packages(),
    package_dir={"bestrq2": "bestrq2", "bestrq2.kernels": "kernels"},
    ext_modules=[Extension("bestrq2._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
