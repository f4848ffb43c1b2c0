"""Shards for tests: clips of the package under any names."""

import io
import tarfile
from pathlib import Path

from bestrq2.data import tiny_dataset


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    """A shard; names in UTF-8, whatever the locale."""
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def clip_bytes(number=0) -> bytes:
    return Path(tiny_dataset()[number].path).read_bytes()
