"""A short hash of the training data, so that a resumed run can tell that its data changed."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from bestrq2.data import AudioFile, CropDataset


def data_fingerprint(dataset: CropDataset) -> str:
    """Hash of the names and durations of the files and of the crop settings.

    Folders are left out: moving the data, or mounting it elsewhere, does not change the order of training.
    """
    digest = hashlib.sha256()
    settings = (dataset.crop_samples, dataset.sampling_rate, dataset.seed, dataset.join_short, dataset.min_seconds)
    digest.update(repr(settings).encode())
    digest.update(file_list_digest(dataset.files).encode())
    return digest.hexdigest()[:16]


def file_list_digest(files: Iterable[AudioFile]) -> str:
    """Hash of the names and durations of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{Path(file.path).name}\0{file.duration}\n".encode())
    return digest.hexdigest()
