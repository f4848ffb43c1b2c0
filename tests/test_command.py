"""The command line: one command with its parts, and failures that end in one sentence."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from bestrq2 import stats
from bestrq2.__main__ import COMMANDS, main
from bestrq2.command import _Output, command, leave, sentence
from bestrq2.config import Config, describing
from bestrq2.config.describing import describe, explanations
from bestrq2.errors import BestRQError, BestRQWarning, DataError

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, **options
    )


def test_the_command_lists_its_parts(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_part_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: bestrq2 {name}" in capsys.readouterr().out


def test_only_the_chosen_part_is_imported():
    code = "import sys; from bestrq2.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    assert run("-c", code).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("called", [main, stats.main])
def test_a_command_that_torchrun_starts_is_refused(called, monkeypatch, capsys):
    """On every rank: each may have been given a part of the work by the program that torchrun started."""
    monkeypatch.setattr(sys, "argv", ["bestrq2", *(["stats"] if called is main else []), "--clips=1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "error: this command works in one process: start it without torchrun, which is for bestrq2 train; "
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert called() == 2
        assert capsys.readouterr().err.startswith(told)


@pytest.mark.parametrize("rank", "01")
def test_a_command_runs_in_a_container_with_a_rank(rank, monkeypatch, capsys):
    """Schedulers set these two in every container, whatever runs there."""
    monkeypatch.setattr(sys, "argv", ["bestrq2", "stats", "--help"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        main()
    assert "usage: bestrq2 stats" in capsys.readouterr().out


def test_without_source_files(monkeypatch):
    def absent(module):
        raise OSError("could not get source code")

    describing._sayings.cache_clear()
    monkeypatch.setattr("inspect.getsource", absent)
    try:
        assert "train.steps: " in describe(Config())
    finally:
        describing._sayings.cache_clear()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--show-config"]])
def test_without_docstrings(arguments):
    result = run("-OO", "-m", "bestrq2", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert "train" in result.stdout


def test_former_module_names_work(tmp_path):
    for module in ("bestrq2.data.manifest", "bestrq2.data.shards"):
        result = run("-m", module, str(tmp_path / "absent"), "--out", str(tmp_path / "out.csv"))
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.stderr


def test_every_key_has_a_line(capsys):
    keys = list(explanations(Config()))
    assert len(keys) > 80
    assert [key for key, _, about in keys if not about] == []
    assert main(["train", "--show-config", "--config", "best_rq2_small", "train.steps=7"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(keys)
    assert next(line for line in shown if line.startswith("train.steps: 7 ")).endswith("# updates of the weights")
    assert describe(Config()).count("\n") == len(keys) - 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("no files"), "no files"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.npy"), "out.npy: .*; free some space"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), b"caf\x9f"), r"caf\\x9f: .*; change its permissions"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (ModuleNotFoundError("x", name="pyarrow.parquet"), "'pyarrow.parquet' is needed .* pip install pyarrow$"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "no further thread"),
        (RuntimeError("unable to open shared memory object </torch_1>"), "/dev/shm"),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), "not utf-8: byte 0xff at position 1"),
    ],
)
def test_foreseeable_failures_are_one_sentence(error, expected, capsys):
    @command
    def fails(arguments):
        raise error

    assert fails() == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n"), shown.err[:7]) == ("", 1, "error: ")
    assert re.search(expected, shown.err[7:].rstrip("\n"))


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="bestrq2.absent")]
)
def test_faults_of_ours_show_where(error):
    @command
    def fails(arguments):
        raise error

    assert sentence(error) is None
    with pytest.raises(type(error)):
        fails()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_with_their_code(number, code, capsys):
    removed = []

    @command
    def waits(arguments):
        try:
            signal.raise_signal(number)
        finally:
            removed.append("partial file")
        return 0

    before = signal.getsignal(number)
    assert waits() == code
    assert removed == ["partial file"]
    assert signal.getsignal(number) is before


def test_an_interrupt_behind_the_last_line(monkeypatch, capsys):
    @contextlib.contextmanager
    def interrupted():
        yield
        raise KeyboardInterrupt

    monkeypatch.setattr("bestrq2.command.console_log", interrupted)
    assert command(lambda arguments: 0)() == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "stopped\n")])
def test_a_signal_while_modules_are_imported(number, said):
    """Libraries catch an exception there, and go on half imported."""
    code = (
        "import signal; from bestrq2.signals import importing\n"
        f"with importing():\n    try: signal.raise_signal({int(number)})\n    except BaseException: pass\n"
        "print('went on')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "", said)


def test_output_that_nobody_reads_does_not_end_the_work(tmp_path):
    code = (
        "import sys; from bestrq2.command import command, leave\n"
        "@command\ndef main(arguments):\n"
        "    for _ in range(20000): print('a line of output')\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "    return 0\n"
        "leave(main())\n"
    )
    piped = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -c "$0" | head -1', code],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "a line of output\n", "")
    assert (tmp_path / "done").exists()
    closed = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$0" >&- 2>&-', code], cwd=ROOT)
    assert closed.returncode == 0
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
        assert result.returncode == 2
        assert result.stderr.startswith(b"error: standard output cannot be written: ")
        assert result.stderr.endswith(b"; what it would have shown is lost, all else is done\n")
        assert result.stderr.count(b"\n") == 1


def test_any_name_can_be_printed(tmp_path):
    code = (
        "from bestrq2.command import command, leave\n@command\ndef main(arguments):\n"
        "    print('caf\\udce9 \\u2581 \\U0001F600')\n    return 0\nleave(main())\n"
    )
    for encoding in ("ascii", "latin-1", "utf-8"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(b"caf\\udce9 ")


def test_an_output_keeps_its_first_failure():
    class Broken:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "gone")

        def flush(self):
            raise AssertionError("not after a failure")

    out = _Output(Broken(), 1)
    assert out.write("abc") == 3
    out.flush()
    assert out.failure is not None
    assert out.failure.errno == errno.EPIPE


def test_errors_share_a_base_and_leave_ends():
    assert issubclass(DataError, BestRQError)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            leave(3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 3


class _Full:
    """A standard output on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self):
        pass


def test_lost_output_is_told_once(monkeypatch, capsys):
    @command
    def shows(arguments):
        print("the result")
        if arguments:
            sys.exit(0)  # argparse after --help
        return 0

    monkeypatch.setattr(sys, "stdout", _Full())
    assert command(lambda arguments: shows())() == 2
    assert capsys.readouterr().err.count("standard output cannot be written: No space left on device;") == 1
    assert command(lambda arguments: shows(["--help"]))() == 2
    assert capsys.readouterr().err.splitlines() == ["error: standard output cannot be written: No space left on device"]


def test_a_result_without_an_output(monkeypatch, capsys):
    monkeypatch.setattr("bestrq2.command._closed", [1])
    assert main(["stats"]) == 2
    assert capsys.readouterr().err == "error: there is no standard output to print to: name a file with --out\n"


def test_a_current_folder_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: the current folder was deleted; change to one that exists")


def test_warnings_of_this_package_are_one_line(capsys):
    @command
    def main(arguments):
        for kind in (BestRQWarning, UserWarning):
            print(warnings.formatwarning("it is quiet", kind, "file.py", 7), end="")
        return 0

    assert main([]) == 0
    ours, other = capsys.readouterr().out.splitlines()
    assert ours == "warning: it is quiet"
    assert other == "file.py:7: UserWarning: it is quiet"


def test_failures_of_threads(capsys):
    class Writer(threading.Thread):
        __module__ = "tensorboard.summary.writer"

    def fails():
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    @command
    def starts(arguments):
        for kind in (threading.Thread, Writer):
            thread = kind(target=fails)
            thread.start()
            thread.join()
        return 0

    assert starts() == 0
    assert capsys.readouterr().err == "warning: x: No space left on device; free some space there, or write elsewhere\n"


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_a_limit_of_the_address_space_is_named(error, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, -1))
    assert "ulimit -v" not in sentence(error)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**9, -1))
    assert "limited to 1.0 GB: raise ulimit -v; or else " in sentence(error)


def test_an_interrupt_of_the_first_imports():
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'tqdm': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from bestrq2.__main__ import main\n"
    )
    result = run("-c", code)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_a_file_that_looks_like_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("-dash.ogg").touch()
    with pytest.raises(SystemExit):
        main(["cache", "-dash.ogg", "--out", "x"])
    assert capsys.readouterr().err.endswith("note: the file -dash.ogg is taken for an option: write ./-dash.ogg\n")
