"""Files that belong together: they are made in a hidden folder beside their places and take them together."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from bestrq2.errors import CheckpointError, ConfigError
from bestrq2.outputs import alone_in, busy

Check = Callable[[], None]


@contextmanager
def staged(folder: Path, names: Sequence[str], look_again: Check | None = None, alone: str = "") -> Iterator[Path]:
    """Yield an empty folder for the files ``names``, which are put into ``folder`` when the block ends well.

    If the block fails, ``folder`` is as it was. The last of the names is removed before any other file is replaced and
    put back at the very end, so that no moment has parts of two results: it must be the one that readers look for
    first.

    Args:
        folder: made if need be.
        names: of the files.
        look_again: called before anything is replaced; another process may have written there meanwhile.
        alone: an option, for the message where another process is writing into ``folder``; empty: others may.

    Raises:
        ConfigError: another process is writing into ``folder``, or as ``look_again``.
        OSError, CheckpointError: a file cannot be written; the error has the name of its place.
    """
    first_made = next((place for place in (*reversed(folder.parents), folder) if not place.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        with alone_in(folder, busy(alone, folder)) if alone else nullcontext():
            stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
            try:
                with _named_without(stage):
                    yield stage
                    if look_again is not None:
                        look_again()
                    (folder / names[-1]).unlink(missing_ok=True)
                    for name in names:
                        os.replace(stage / name, folder / name)
                done = True
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    finally:
        if not done and first_made is not None:
            _remove_empty(folder, first_made)


@contextmanager
def _named_without(stage: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        for name in ("filename", "filename2"):
            value = getattr(error, name)
            if isinstance(value, str | Path) and Path(value).parent == stage:
                setattr(error, name, str(stage.parent / Path(value).name))
        raise
    except (CheckpointError, ConfigError) as error:
        raise type(error)(str(error).replace(f"{stage}{os.sep}", f"{stage.parent / 'x'}"[:-1])) from error


def _remove_empty(folder: Path, first_made: Path) -> None:
    with suppress(OSError):
        while True:
            folder.rmdir()
            if folder == first_made:
                return
            folder = folder.parent
