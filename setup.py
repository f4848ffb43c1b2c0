"""Build and install bestrq2: the Python layer, the Triton kernels and, where a compiler exists, the C++/CUDA extension.

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
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "bestrq2/version.py").read_text()).group(1)

EXTRAS = {
    "hdf5": ["h5py>=3.8"],
    "datasets": ["pyarrow>=15"],  # folders of save_to_disk and .parquet files need no more
    "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    "parquet": ["pyarrow>=15"],
    "probe": ["scikit-learn>=1.4"],
    "transformers": ["transformers>=4.57"],
    "wandb": ["wandb>=0.17"],
    "test": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-xdist>=3.7",
        "hypothesis>=6.100",
        "scipy>=1.11",
        "pyarrow>=15",
        "h5py>=3.8",
        "scikit-learn>=1.4",
        "onnx>=1.18",
        "onnxscript>=0.5",
        "onnxruntime>=1.22",
        "triton>=3.6; platform_system == 'Linux'",
    ],
}
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.11", "mypy>=1.15", "clang-format>=18", "types-PyYAML", "types-tqdm"]


class CMakeBuild(build_ext):
    """Run CMake for the one extension; a failure leaves a working pure-Python install and says so in one line."""

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
        ]
        steps = {
            "CMake found no usable C++ compiler": configure,
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
    name="bestrq2",
    version=VERSION,
    description="BEST-RQ-2 pretraining of audio encoders, with fused quantize, masked cross-entropy and attention.",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=packages(),
    package_dir={"bestrq2": "bestrq2", "bestrq2.kernels": "kernels"},
    package_data={
        "bestrq2": ["py.typed"],
        "bestrq2.recipes": ["*.yaml"],
        "bestrq2.data": ["tiny/*"],
        "bestrq2.kernels": ["configs/*.json", "configs/*/*.json", "README.md"],
    },
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "soundfile>=0.12.1",
        "soxr>=0.4",
        "safetensors>=0.4.5",
        "omegaconf>=2.3",
        "tqdm>=4.66",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    ext_modules=[Extension("bestrq2._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
