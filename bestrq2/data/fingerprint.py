"""A short hash of the training data, so that a resumed run can tell that its data changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bestrq2.data import AudioFile, CropDataset
from bestrq2.data.content import sample_contents
from bestrq2.data.files import to_text


def data_identity(dataset: CropDataset) -> dict[str, Any]:
    """Data in a checkpoint: ``data``, their fingerprint, ``files``, their number, and ``content``, digests of up to 256
    of them."""
    files = dataset.files
    return {"data": data_fingerprint(dataset), "files": len(files), "content": sample_contents(files)}


def data_fingerprint(dataset: CropDataset) -> str:
    """Hash of the names and durations of the files, of the crop and batch settings, and of weighted domains.

    Folders are left out: moving the data, or mounting it elsewhere, does not change the order of training.
    """
    digest = hashlib.sha256()
    digest.update(repr(dataset.identity).encode())
    digest.update(file_list_digest(dataset.files).encode())
    if dataset.schedule is not None:
        digest.update("\0".join(file.domain for file in dataset.files).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def file_list_digest(files: Iterable[AudioFile]) -> str:
    """Hash of the names and durations of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        name = Path(file.path).name
        if file.start > 0 or file.end not in (None, file.duration):  # not of every part: runs have recorded it so
            name += file.place[len(file.path) :]
        digest.update(f"{to_text(name)}\0{file.duration}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
