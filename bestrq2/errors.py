"""Every error of this package. All derive from :class:`BestRQError`, so that a program can catch them together.

The operations (``bestrq2.ops``) and layers raise Python's own ``TypeError``, ``ValueError`` and ``RuntimeError``.
"""

import errno
import os
import re
from dataclasses import dataclass
from typing import Any

__all__ = [
    "REASONS",
    "REMEDIES",
    "AudioError",
    "BestRQError",
    "BestRQWarning",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ManifestError",
    "OutOfMemory",
    "Skip",
    "TrainingError",
    "UnknownLayoutError",
    "byte_count",
    "check_open_files",
    "counted",
    "printable",
    "system_reason",
    "tabular",
]


class BestRQError(Exception):
    """Base class: something the user can change; the message says what was expected and what was found."""


class BestRQWarning(UserWarning):
    """Advice of this package; commands print it in one line."""


class ConfigError(BestRQError, ValueError):
    """A configuration that cannot be used; the message names the key and what was expected."""


class TrainingError(BestRQError):
    """Training cannot continue; the message says what to change."""


class OutOfMemory(TrainingError):
    """One rank is out of memory; the other ranks are not informed."""


class ManifestError(BestRQError, ValueError):
    """A manifest that cannot be understood; the message names the file and, where there is one, the line."""


class UnknownLayoutError(ConfigError):
    """A file whose tensors are not those of a layout we know; the message lists their names."""


class CheckpointError(BestRQError):
    """A checkpoint that could not be written or read; the message says which file and why."""


# What to do about an error of the system.
REMEDIES = {
    errno.ENOSPC: "free some space there, or write elsewhere",
    errno.EDQUOT: "the quota is used up: free some space there, or write elsewhere",
    errno.EFBIG: "the limit of file sizes is reached: raise it (ulimit -f unlimited), or use another file system",
    errno.EACCES: "change its permissions, or use another folder",
    errno.EPERM: "change its permissions, or use another folder",
    errno.EROFS: "use a folder that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096), or use fewer threads (--threads) and "
    "workers (data.workers=0)",
    errno.ENFILE: "the machine has too many open files: close programs, or use fewer workers (data.workers=0)",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "part of this path is a file: check the name",
    errno.EISDIR: "this is a folder: name a file",
    errno.EADDRINUSE: "choose another port (MASTER_PORT, or torchrun --rdzv-endpoint)",
    errno.ENOMEM: "use a smaller batch or fewer workers",
    errno.EIO: "the disk or the network file system failed: see the system's log",
    errno.ESTALE: "the network file system lost this file: try again",
    errno.ELOOP: "links point at each other: check the path",
    errno.EXDEV: "both names must be on one file system",
}

REASONS = (
    "missing",  # no such file
    "not readable",  # permissions, an I/O error, a directory or device
    "empty file",  # zero bytes
    "not decodable",  # not audio, or damaged before its first sample
    "truncated",  # more than 1 % of what the file promises is not there
    "no samples",  # a valid file without audio, or none in the span asked for
    "not finite",  # NaN or infinite samples
    "out of range",  # samples beyond any integer format: squares of them overflow float32
    "too short",  # less than the caller's minimum
    "silent",  # found by a check: no sample above SILENCE
    "duplicate",  # found by a check: decodes to the same samples as an earlier file
    "damaged archive",  # a part of a tar shard, HDF5, Arrow or Parquet file; its clips are unknown
)


def printable(name: str) -> str:
    """A file name for a message: bytes that are not UTF-8, line breaks and control characters are escaped.

    Such a name must not turn a report into a UnicodeEncodeError, into two lines, or into a coloured terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _decoded(name))


def tabular(name: str) -> str:
    """A file name for a table in UTF-8, which can hold all but bytes that are not UTF-8: these are escaped."""
    return _decoded(name).encode("utf-8", "backslashreplace").decode("utf-8")


def _decoded(name: str) -> str:
    try:
        # Not os.fsencode, whose encoding is the locale's.
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, out of JSON
        return name


def counted(number: int, noun: str) -> str:
    """A number with a noun for a message.

    >>> counted(1, "row"), counted(2, "row")
    ('1 row', '2 rows')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def byte_count(number: float) -> str:
    """A size for a message; small ones do not become nothing.

    >>> byte_count(2_500_000_000), byte_count(40_960), byte_count(12)
    ('2.5 GB', '41 kB', '12 bytes')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            value = number / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return counted(round(number), "byte")


@dataclass(frozen=True)
class Skip:
    """A file (or a part of one) that was left out: ``reason`` is one of ``REASONS``, ``detail`` may be empty."""

    path: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class AudioError(BestRQError):
    """A file that cannot be used. ``path``, ``reason`` (one of ``REASONS``) and ``detail`` say which and why."""

    def __init__(self, path: str | os.PathLike[str], reason: str, detail: str = "") -> None:
        if reason not in REASONS:
            raise ValueError(f"reason must be one of {REASONS}, got {reason!r}")
        self.skip = Skip(os.fspath(path), reason, detail)
        super().__init__(str(self.skip))

    def __reduce__(self) -> tuple[Any, ...]:
        return AudioError, (self.path, self.reason, self.detail)

    @property
    def path(self) -> str:
        return self.skip.path

    @property
    def reason(self) -> str:
        return self.skip.reason

    @property
    def detail(self) -> str:
        return self.skip.detail


class DataError(BestRQError, RuntimeError):
    """A source of audio that gives nothing to work with; the message says what was found and why it was left out."""


def check_open_files(error: Exception) -> None:
    """The limit of open files is a failure of this process, not of the file that it could not open.

    Raises:
        DataError: if that is what ``error`` says; no clip must be left out for it.
    """
    full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
    if full or "Too many open files" in str(error):  # h5py has no number
        raise DataError(f"Too many open files; {REMEDIES[errno.EMFILE]}") from error


def system_reason(error: Exception) -> str:
    """The reason why the system refused something, and what to do about it, without the name of a file.

    >>> system_reason(OSError(28, "No space left on device", "x.csv.partial"))
    'No space left on device; free some space there, or write elsewhere'
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (passed_on := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors
        number = int(passed_on[1])
        what = os.strerror(number)
    else:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    remedy = REMEDIES.get(number or 0)
    return what + (f"; {remedy}" if remedy else "")
