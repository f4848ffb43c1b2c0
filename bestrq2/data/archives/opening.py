"""List the clips of an archive, and open one of them by its address."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from bestrq2.console import progress_bar
from bestrq2.data.archives.readers import SampleReader
from bestrq2.data.files import _HDF5, _TAR, Listing, split_address
from bestrq2.errors import AudioError, Skip, check_open_files
from bestrq2.real_content import real_content

__all__ = ["list_archives", "open_member"]


def open_member(path: str) -> BinaryIO | SampleReader | None:
    """Open a clip in an archive: the bytes of an audio file, or decoded samples; None if ``path`` is a file itself.

    Raises:
        AudioError: no such archive or clip, or it is damaged.
        OSError: the archive cannot be read.
    """
    parts = split_address(path)
    if parts is None:
        return None
    archive, member = parts
    if not os.path.isfile(archive):
        if os.path.lexists(path):  # a file may have such a name
            return None
        there = os.path.lexists(archive)
        what = f"{archive} {'is not a regular file' if there else 'does not exist'}"
        raise AudioError(path, "not readable" if there else "missing", what)
    suffix = Path(archive).suffix.lower()
    # Imported where they are needed, for each may ask for a package that is not installed.
    if suffix in _TAR:
        from bestrq2.data.archives.tar import open_tar_member

        return open_tar_member(archive, member)
    if suffix in _HDF5:
        from bestrq2.data.archives.hdf5 import open_hdf5_clip

        return open_hdf5_clip(archive, member)
    from bestrq2.data.archives.arrow import open_arrow_clip

    return open_arrow_clip(archive, member)


def _list_archive(item: tuple[str, str], columns: bool) -> Listing:
    listing = _listed(*item, columns)
    if not listing.files and listing.skips and (what := real_content(item[0])):
        empty = what == "an empty file"
        return Listing([], skips=[Skip(item[0], "empty file") if empty else Skip(item[0], "damaged archive", what)])
    if not (listing.files or listing.skips or listing.ignored):
        return Listing([], skips=[Skip(item[0], "no samples", "an archive without a single clip")])
    return listing


def _listed(path: str, domain: str, columns: bool) -> Listing:
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".tar":
            from bestrq2.data.archives.tar import list_tar

            return list_tar(path, domain, columns=columns)
        if suffix in (".h5", ".hdf5"):
            from bestrq2.data.archives.hdf5 import list_hdf5

            return list_hdf5(path, domain, columns=columns)
        from bestrq2.data.archives.arrow import list_arrow

        return list_arrow(path, columns=columns)
    except OSError as error:
        check_open_files(error)
        return Listing([], skips=[Skip(path, "not readable", error.strerror or str(error))])


def list_archives(archives: Sequence[tuple[str, str]], progress: bool, columns: bool = False) -> Iterable[Listing]:
    """List archives in their order, several at once: on a network file system this is waiting."""
    with (
        ThreadPoolExecutor(min(8, max(1, len(archives)))) as pool,
        progress_bar(
            total=len(archives), desc="indexing", unit="archive", disable=not progress or len(archives) < 2
        ) as bar,
    ):
        for start in range(0, len(archives), 64):
            for listing in pool.map(partial(_list_archive, columns=columns), archives[start : start + 64]):
                bar.update()
                yield listing
