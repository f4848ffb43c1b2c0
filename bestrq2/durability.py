"""Ask the system to bring what was written to the disk, where the file system can; say which file could not be."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "flush_file",
    "flush_folder",
    "has_utf8_name",
    "named_in_errors",
    "replacing",
    "save_file",
    "whole_file",
    "write_array",
]

_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EROFS, errno.EBADF}


def flush_file(file: int | str | os.PathLike[str]) -> None:
    """Flush a file, by descriptor or name. File systems that cannot do it (some of FUSE) are taken as they are.

    Raises:
        OSError: the data could not be written: a full or failing disk.
    """
    descriptor = file if isinstance(file, int) else os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        if not isinstance(file, int):
            os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder. Network and FUSE file systems often refuse it (CIFS: EINVAL, or not even open
    folders); the files are whole without it, so that no refusal is an error."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


@contextmanager
def named_in_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give an OSError of the block the name of the file, which a failed ``write`` (a full disk) does not have."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def replacing(path: str | os.PathLike[str], partial: Path) -> Iterator[Path]:
    """Put the file ``partial``, which the block writes, in the place of ``path``; remove it if that fails.

    Raises:
        OSError: it cannot be written; the error has the name of ``path``.
    """
    try:
        with named_in_errors(path):
            yield partial
            os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (partial, str(partial)):
            error.filename, error.filename2 = os.fspath(path), None
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file (text in UTF-8, or bytes) that is complete when the block ends, and as it was before if that fails.

    Raises:
        OSError: it cannot be written; the error has its name.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with replacing(target, partial), open(partial, mode, **text) as file:  # type: ignore[call-overload]
        yield file


def write_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write a ``.npy`` file as :func:`whole_file` does.

    Raises:
        OSError: it cannot be written; the error has its name and the system's reason.
    """
    with whole_file(path, "wb") as file:
        np.save(SimpleNamespace(write=file.write), array)  # into a real file numpy's error gives no reason


def save_file(
    tensors: "Mapping[str, Tensor]", path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """``safetensors.torch.save_file`` with the permissions of any new file. Those that version 0.8 gives let
    the owner alone read it (safetensors 782).

    Raises:
        OSError, safetensors.SafetensorError: it cannot be written.
    """
    from safetensors import torch

    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777  # by the umask, or the access list of the folder
    torch.save_file(dict(tensors), path, metadata)
    with suppress(OSError):  # a file system without permissions
        os.chmod(path, mode)


def has_utf8_name(path: str | os.PathLike[str]) -> bool:
    """Return False for a path that safetensors, onnxruntime and torch.export cannot open."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeError:
        return False
    return True
