"""Output places of commands: results are replaced only with ``--overwrite``, and a place that cannot be written is
refused before anything is computed."""

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bestrq2.errors import BestRQError, ConfigError, printable

__all__ = ["add_overwrite", "alone_in", "busy", "check_new", "check_writable", "numbered"]


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what is there (default: refuse)")


def check_new(option: str, paths: Iterable[Path], overwrite: bool = False) -> None:
    """Refuse results that exist, or that cannot be written, before the work that comes first. Nothing is written.

    Args:
        option: named in the message.
        paths: files that will be written.
        overwrite: they may exist.

    Raises:
        ConfigError: if one exists, is no file, or its folder is none or cannot be written.
    """
    for path in paths:
        if os.path.isdir(path):
            raise ConfigError(f"{option}: {printable(str(path))} is a folder, expected the name of a file")
        if os.path.exists(path) and not os.path.isfile(path):  # replaced, it would be gone from the machine
            raise ConfigError(f"{option}: {printable(str(path))} is a device or pipe, expected the name of a file")
        if not overwrite and os.path.lexists(path):
            raise ConfigError(
                f"{option}: {printable(str(path))} exists; choose another name, or replace it with --overwrite"
            )
        check_writable(option, path.parent, path)


@contextmanager
def alone_in(folder: Path, refusal: BestRQError, file: str | None = None) -> Iterator[None]:
    """Keep other processes from writing into a folder. The system unlocks it however this process ends.

    Args:
        folder: to write into.
        refusal: raised if another process does.
        file: made in the folder and locked in its place: NFS locks only what is open for writing.

    File systems without locks are not protected.
    """
    try:
        import fcntl

        flags = os.O_RDONLY if file is None else os.O_WRONLY | os.O_CREAT
        descriptor = os.open(folder if file is None else folder / file, flags, 0o666)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def busy(option: str, folder: Path) -> ConfigError:
    """The refusal of :func:`alone_in` for the folder that an option of a command names."""
    name = printable(str(folder))
    return ConfigError(f"{option}: another process is writing to {name}; wait for it, or choose another name")


def check_writable(option: str, folder: Path, result: Path | None = None) -> None:
    """Refuse a folder that cannot be made or written.

    Args:
        option: named in the message.
        folder: for the results.
        result: named in the message (default: the folder).

    Raises:
        ConfigError: if the folder, or the nearest one above it that exists, is none or cannot be written.
    """
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    given, name = (_called(place) for place in (result or folder, there))
    if not there.is_dir():
        raise ConfigError(f"{option} {given}: {name} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        remedy = "its file system is read-only," if _is_read_only(there) else "change its permissions, or"
        remedy += " use another folder"
        raise ConfigError(f"{option} {given}: {'it' if name == given else name} cannot be written: {remedy}")


def _called(path: Path) -> str:
    return "the current folder" if path == Path() else printable(str(path))


def _is_read_only(folder: Path) -> bool:
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except (OSError, AttributeError):  # Windows has no statvfs
        return False


def numbered(stem: str) -> Path:
    """Make the first of the folders ``stem-001``, ``stem-002``, ... that does not exist."""
    number = 1
    while True:
        folder = Path(f"{stem}-{number:03d}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
