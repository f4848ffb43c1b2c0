"""Loading of the C++ extension: one that was built from other sources is refused, aloud."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bestrq2.ops.common import native

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = (ROOT / "csrc" / "bindings.cpp").exists() and native.extension_obstacle() is None


@pytest.mark.skipif(not CHECKOUT, reason="needs the C++ extension and its sources")
def test_extension_of_other_sources_is_refused(tmp_path):
    """A checkout whose sources have changed since the build, even by one line of a kernel."""
    for folder in ("bestrq2", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    shutil.copy(native.extension().__file__, tmp_path / "bestrq2")
    code = "from bestrq2.ops.common import native; print(native.__file__); print(native.extension_obstacle())"

    def obstacle():
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        path, reason = result.stdout.splitlines()
        assert path.startswith(str(tmp_path))
        return reason, result.stderr

    assert obstacle() == ("None", "")
    changed = tmp_path / "csrc" / "masked_cross_entropy" / "softmax_gradient_kernel.cpp"
    changed.write_text(changed.read_text().replace("0.0f", "1.0f", 1))
    reason, warning = obstacle()
    assert "was built from other sources" in reason
    assert "build_ext --inplace" in reason
    assert "RuntimeWarning: bestrq2: the C++ extension" in warning


@pytest.mark.skipif(not CHECKOUT, reason="needs the C++ extension and its sources")
def test_extension_of_a_build_before_this_check_is_refused():
    class Old:
        __file__ = "_C.so"

    assert native.stale(native.extension(), ROOT / "csrc") is None
    assert "was built from other sources" in native.stale(Old, ROOT / "csrc")


def test_an_installed_package_has_no_sources_to_compare(tmp_path):
    class Old:
        __file__ = "_C.so"

    assert native.stale(Old, tmp_path) is None


@pytest.mark.skipif(not CHECKOUT, reason="needs the C++ extension")
def test_instruction_sets_can_be_limited():
    """BESTRQ2_ISA is a limit: what is above it is not used, and what the processor lacks is not asked for."""
    code = f"""
from importlib import util
spec = util.spec_from_file_location("_C", {native.extension().__file__!r})  # without the package, which imports torch
e = util.module_from_spec(spec)
spec.loader.exec_module(e)
print(e.isa(), e.bf16_dot())
e.limit_bf16_dot("amx")  # "forbid nothing": not what the variable forbids
print(e.bf16_dot(), *(isa for isa in ("portable", "avx2", "avx512", "avx512_vnni") if e.force_isa(isa)))
"""
    through_the_package = "from bestrq2.ops.common.native import extension as e; print(e().isa(), e().bf16_dot())"

    def run(limit, code=code):
        environment = {name: value for name, value in os.environ.items() if name != "BESTRQ2_ISA"}
        environment |= {} if limit is None else {"BESTRQ2_ISA": limit}
        return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)

    unlimited = run(None).stdout
    best, dot, *_ = unlimited.split()
    assert unlimited == run("amx").stdout == run("").stdout
    sets, dots = ["portable", "avx2", "avx512", "avx512_vnni"], ["none", "avx512_bf16", "amx"]
    for limit in sets:
        isa, allowed, again, *forced = run(limit).stdout.split()
        assert sets.index(isa) == min(sets.index(limit), sets.index(best))
        assert allowed == again == "none"
        assert forced == sets[: sets.index(isa) + 1]
    dot = dots[min(1, dots.index(dot))]
    assert run("avx512_bf16").stdout.split() == [best, dot, dot, *sets[: sets.index(best) + 1]]
    assert run("avx2", through_the_package).stdout.split() == run("avx2").stdout.split()[:2]
    wrong = run("avx3", through_the_package)
    assert wrong.returncode == 1
    assert "BESTRQ2_ISA: expected portable, avx2, avx512, avx512_vnni, avx512_bf16 or amx, got avx3" in wrong.stderr
    assert "RuntimeWarning: bestrq2: the C++ extension does not load" in wrong.stderr


@pytest.mark.skipif(not CHECKOUT, reason="needs the C++ extension")
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_work_is_done_where_threads_cannot_start():
    """Without torch there is no OpenMP pool; 16 threads want 8 MB of stack each, and too few ended the process."""
    code = f"""
import ctypes, importlib.util, resource
spec = importlib.util.spec_from_file_location("bestrq2._C", {native.extension().__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.thread_pool() == "threads"
rows, width = 4096, 64
x, out = ((ctypes.c_float * (rows * width))(*[1.0] * 8) for _ in range(2))
x[rows * width - 1] = 1.0
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2)
module.gelu_rows_forward(False, rows, width, ctypes.addressof(x), 0, ctypes.addressof(out), 16)
print(out[0], out[7], out[8], out[rows * width - 1])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    first, eighth, ninth, last = map(float, result.stdout.split())
    assert first == eighth == last == pytest.approx(0.8413447, abs=1e-6)  # GELU(1) = the normal distribution at 1
    assert ninth == 0
