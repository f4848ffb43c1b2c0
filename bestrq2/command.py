"""The edge of every command: a foreseeable failure becomes one sentence and exit code 2, a fault of ours a traceback.

Import this before torch: it sets what OpenMP reads when torch is loaded.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from types import FrameType
from typing import Any, TextIO, TypeVar

from bestrq2.signals import FOLDER_GONE, end_imports, folder_is_gone, handled_by

# isort: split
from bestrq2.console import console_log
from bestrq2.errors import REMEDIES, BestRQError, BestRQWarning, ConfigError, byte_count, printable, system_reason

__all__ = ["check_alone", "command", "leave", "output_closed", "sentence"]

# Threads that wait must not spin: on a laptop whose other core is busy, spinning made small models 2.7 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

Main = TypeVar("Main", bound=Callable[..., int])

# Errors of the system that libraries pass on as a plain RuntimeError: part of the text, what happened, remedy.
_PASSED_ON = (
    ("can't start new thread", "no further thread can be started", "raise ulimit -u, or set OMP_NUM_THREADS=1"),
    ("Resource temporarily unavailable", "no further thread or process can be started", "raise ulimit -u"),
    ("Too many open files", "too many files are open", REMEDIES[errno.EMFILE]),
    ("No space left on device", "the disk or shared memory (/dev/shm) is full", "free space, or set data.workers=0"),
    ("unable to open shared memory", "shared memory (/dev/shm) cannot be used", "enlarge it, or set data.workers=0"),
    ("unable to allocate shared memory", "shared memory (/dev/shm) is full", "enlarge it, or set data.workers=0"),
    ("DefaultCPUAllocator", "out of memory", "use a smaller batch (train.batch_size, --batch-size) or fewer workers"),
    ("out of memory", "out of memory", "use a smaller batch (train.batch_size, --batch-size)"),
    ("Connection refused", "another rank cannot be reached", "check MASTER_ADDR and MASTER_PORT and start all ranks"),
    ("Connection closed by peer", "another rank ended", "see the messages of the other ranks"),
    ("Connection reset by peer", "another rank ended", "see the messages of the other ranks"),
    ("Timed out", "another rank did not answer in time", "see the messages of the other ranks"),
    ("timed out", "another rank did not answer in time", "see the messages of the other ranks"),
    ("Found no NVIDIA driver", "there is no NVIDIA driver", "use the device cpu"),
    ("CUDA driver version is insufficient", "the CUDA driver is too old for this torch", "use the device cpu"),
)

_FOR_LACK_OF_MEMORY = (
    "no further thread can be started",
    "no further thread or process can be started",
    "out of memory",
)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where the program is so that unfinished files are removed."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def sentence(error: BaseException) -> str | None:
    """Message for a foreseeable failure; None for a fault of this program."""
    if isinstance(error, BestRQError):
        return str(error)
    if isinstance(error, OSError):
        if isinstance(error, TimeoutError | ConnectionError) and _several_ranks():
            return f"{error}; see the messages of the other ranks"
        given = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        names = " -> ".join(printable(os.fsdecode(name)) for name in given)
        return (f"{names}: " if names else "") + system_reason(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "bestrq2").startswith("bestrq2"):
        return f"the package {error.name!r} is needed and not installed: pip install {(error.name or '').split('.')[0]}"
    if isinstance(error, MemoryError):
        limit = _address_limit()
        return f"out of memory; {limit}use a smaller batch (train.batch_size, --batch-size) or fewer workers"
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not {error.encoding}: byte {error.object[error.start]:#04x} at position {error.start}"
    if isinstance(error, RuntimeError):
        for part, what, remedy in _PASSED_ON:
            if part in str(error):
                limit = _address_limit() if what in _FOR_LACK_OF_MEMORY else ""
                return f"{what}; {limit}{remedy} ({str(error).strip().splitlines()[0]})"
    return None


def _address_limit() -> str:
    """The part of a remedy that speaks of ``ulimit -v``, where it is set: threads need room for their stacks."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, AttributeError, OSError, ValueError):
        return ""
    if limit == resource.RLIM_INFINITY:
        return ""
    return f"the address space is limited to {byte_count(limit)}: raise ulimit -v; or else "


def _several_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


class _Output(io.TextIOBase):
    """Standard output or error that never raises: a reader that went away or a full disk must not end the work.

    The first failure is kept in ``failure``; what comes after it is dropped. ``told``: it was reported.
    """

    def __init__(self, stream: TextIO, number: int) -> None:
        self.stream, self.number = stream, number
        self.failure: OSError | None = None
        self.told = False
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        if self.failure is None:
            with self._kept():
                try:
                    self.stream.write(text)
                except UnicodeError:  # a stream that could not be reconfigured
                    self.stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            with self._kept():
                self.stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self.stream.isatty()
        return False

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    @property
    def buffer(self) -> Any:
        return self.stream.buffer

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:  # written to after it was closed
            self.failure = OSError(errno.EBADF, str(error))
        except OSError as error:
            self.failure = error
            # What is still in the buffer must go somewhere when Python flushes it at its end.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if self.stream.fileno() == self.number:
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self.number)
                    os.close(null)


def _open_standard_files() -> list[int]:
    """Give a process that was started with closed standard files (``>&-``) a sink, before another file gets their
    numbers and what is printed goes there. Returns the numbers."""
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the end)
    return closed


_closed = _open_standard_files()


def output_closed() -> bool:
    """Return True if this process was started without a standard output: what is printed is nowhere."""
    return 1 in _closed


@contextlib.contextmanager
def _safe_output() -> Iterator[tuple[_Output, _Output]]:
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, _Output) and isinstance(sys.stderr, _Output):  # a command that calls another
        yield sys.stdout, sys.stderr
        return
    out, err = _Output(before[0], 1), _Output(before[1], 2)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        if sys.stdout is out:
            sys.stdout = before[0]
        if sys.stderr is err:
            sys.stderr = before[1]


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, unless somebody chose otherwise (``nohup``)."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough
        raise Stopped(number)

    with handled_by(stop, lambda now: now is signal.SIG_DFL):
        yield


def _lost(out: _Output, err: _Output, rest: str = "") -> bool:
    """Return True if standard output could not be written, though it has a reader; reported once, where commands call
    each other."""
    out.flush()
    if out.failure is None or out.failure.errno == errno.EPIPE:
        return False
    if not out.told:
        out.told = True
        print(f"error: standard output cannot be written: {out.failure.strerror}{rest}", file=err)
    return True


@contextlib.contextmanager
def _thread_failures(err: _Output) -> Iterator[None]:
    """A foreseeable failure in a thread is one line too."""
    before = threading.excepthook

    def report(given: threading.ExceptHookArgs) -> None:
        message = None if given.exc_value is None else sentence(given.exc_value)
        if message is None:
            before(given)
        elif not type(given.thread).__module__.startswith("tensorboard."):  # its next use warns: MetricsLog
            print(f"warning: {message}", file=err)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = before


def check_alone() -> None:
    """
    Raises:
        ConfigError: if torchrun started this process as one of several, each of which would do all of the work. In
            every one of them: a program that torchrun started may give each a part of its own, and none may be lost.
    """
    # Schedulers of clusters set RANK and WORLD_SIZE in every container, whatever is run there, but no LOCAL_RANK.
    if _several_ranks() and os.environ.get("RANK") and os.environ.get("LOCAL_RANK"):
        raise ConfigError(
            "this command works in one process: start it without torchrun, which is for bestrq2 train; where a program "
            "under torchrun calls it, without RANK in its environment"
        )


def command(main: Main, ranks: bool = False) -> Main:
    """Decorate the ``main(arguments) -> exit code`` of a command. ``ranks``: torchrun may start several of it.

    Foreseeable failures are printed as ``error: ...`` and give exit code 2, Ctrl-C and SIGTERM 130 and 143. Output that
    cannot be written never ends the work: if its reader went away nothing more is printed, else the exit code is 2.
    """

    def watched(arguments: Sequence[str] | None) -> int:
        with _safe_output() as (out, err), console_log(), _thread_failures(err), _plain_warnings():
            try:
                with _stop_signals():
                    if folder_is_gone():
                        raise ConfigError(FOLDER_GONE)
                    if arguments is None and not ranks:
                        check_alone()
                    code = main(arguments)
            except SystemExit as ended:  # argparse, after --help or a wrong option
                if _lost(out, err) and not ended.code:
                    return 2
                for name in sys.argv[1:] if arguments is None else arguments:
                    if ended.code and str(name).startswith("-") and os.path.exists(name):
                        print(f"note: the file {printable(name)} is taken for an option: write ./{name}", file=err)
                raise
            except Stopped as error:
                print(f"stopped by {error}", file=err)
                return 128 + error.number
            except KeyboardInterrupt:
                print("interrupted", file=err)
                return 128 + signal.SIGINT
            except Exception as error:
                message = sentence(error)
                if message is None:
                    raise
                print(f"error: {message}", file=err)
                return 2
            rest = "; what it would have shown is lost, all else is done" if code == 0 else ""
            return code or 2 if _lost(out, err, rest) else code

    @wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> int:
        end_imports()
        try:
            return watched(arguments)
        except KeyboardInterrupt:  # between the last line of the command and here
            with contextlib.suppress(OSError, ValueError):
                print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT

    return guarded  # type: ignore[return-value]


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings of this package without the line of code that they come from."""
    usual = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *place: Any, **line: Any) -> str:
        if issubclass(category, BestRQWarning):
            return f"warning: {message}\n"
        return usual(message, category, *place, **line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def leave(code: int) -> None:
    """End the process of a command.

    Among several ranks everything is written and closed by then, and taking the interpreter down would race with the
    threads of gloo, to which sharded models hold on: a run that had ended well was once aborted there (torch 2.13).
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: no traceback out of the interpreter's end
    if _several_ranks():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
