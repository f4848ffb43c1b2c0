"""Shared fixtures: seeds, the device under test, and uninitialised memory that fails loudly."""

import contextlib
import functools
import os
import signal
from collections import Counter

# Before torch loads OpenMP, here and in every process that a test starts: threads that wait sleep. Where others compute
# on the same cores, spinning doubles the processor time of a training test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# numpy's and scipy's BLAS has no such choice: one thread waits for no other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Processes beside each other have the cores busy: more threads each would cost a tenth more processor time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS refuses torch.use_deterministic_algorithms without it; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import interpreter_arithmetic  # noqa: F401  (products and bf16 of Triton's interpreter)

# A job in the background, or one under nohup, starts with these signals ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import torch
from other_libraries import needs_other_library
from plain_training import plain_training  # noqa: F401  (a fixture)

THREADED = ("layers", "ops")  # folders whose tests of C++ loops always have at least two threads
PROCESSES = 3  # on two cores: a fifth of the time a test waits, for a signal, a clock or a process that it started


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device the tests run on: cpu (default) or cuda")
    parser.addoption(
        "--other-libraries", action="store_true", help="run only the tests that skip where another library is missing"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """``pytest`` without a path uses up to three processes, where pytest-xdist is installed and has no ``-n``.

    One process is for tests named on the command line, ``-s``, ``--pdb``, and a GPU, whose memory one may need.
    """
    option = config.option
    everything = config.args_source == config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    watched = option.capture == "no" or option.usepdb or option.device != "cpu"
    if everything and not watched and getattr(option, "numprocesses", 0) is None and option.dist == "no":
        option.numprocesses = min(PROCESSES, (os.cpu_count() or 1) + 1)
        option.dist = "loadfile"
        option.loadscopereorder = False  # the order of pytest_collection_modifyitems


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays in one process, with its fixtures; compilations are single tests that use the remaining time."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith("_compile.py") else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--device"))


def pytest_configure(config):
    """Without ``--device cuda`` no test, and no process that a test starts, sees a GPU: ``train.device=auto`` too."""
    if config.option.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {config.option.device}: torch finds no CUDA device")


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` selects
def pytest_collection_modifyitems(config, items):
    """With ``--device cuda`` the tests that take ``device`` are GPU tests, and no others run. See also --help."""
    if hasattr(config, "workerinput"):
        _long_files_first(items)
    if config.option.other_libraries:
        others = [item for item in items if not needs_other_library(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if needs_other_library(item)]
    if config.option.device != "cpu":
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker("gpu")
            if not item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="runs on a CPU: leave out --device cuda"))
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # item.keywords also holds the names of the folders above
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _long_files_first(items):
    """Of several processes none shall begin with a file of minutes when the others are done."""
    file_of = {item: item.nodeid.partition("::")[0] for item in items}
    slow = {file for item, file in file_of.items() if item.get_closest_marker("slow")}
    count = Counter(file_of.values())
    items.sort(
        key=lambda i: (file_of[i].endswith("_compile.py"), file_of[i] not in slow, -count[file_of[i]], file_of[i])
    )


# torch keeps a list of its factories, made at first use, for `with torch.device(...)`. It must hold torch.empty itself
# and not the one of poison_empty.
with torch.device("cpu"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def threads(request):
    before = torch.get_num_threads()
    if request.path.parent.name in THREADED:
        torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def limited_files():
    """``with limited_files(bytes)``: no file can become longer, as on a disk that is full by then."""
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill every torch.empty with NaN (or a huge integer), so that reading unwritten memory fails a test."""

    def poisoned(allocate):
        @functools.wraps(allocate)
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type != "meta" and not torch.compiler.is_compiling():
                if tensor.is_floating_point() or tensor.is_complex():
                    tensor.detach().fill_(float("nan"))
                elif tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
