"""The CUDA kernels compile for every supported GPU without spilled registers, where nvcc is installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from bestrq2.kernels.tuning import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantize_has_no_spills(architecture, tmp_path):
    source = ROOT / "csrc" / "quantize" / "quantize.cu"
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-O3", "-std=c++17", "-fmad=false", target, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run([*command, "-c", str(source), "-o", str(tmp_path / "o")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) == 4, "one kernel for each padded number of dimensions"
    assert set(spills) == {("0", "0")}, result.stderr
