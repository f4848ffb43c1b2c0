"""From audio files to training batches: ``collect`` finds them, ``CropDataset`` cuts them, ``batches`` delivers them.

    files, report = collect("recordings/", min_seconds=1.0)
    dataset = CropDataset(files, crop_seconds=10.0, seed=0)
    for batch in batches(dataset, batch_size=16, num_steps=1000, workers=4):
        batch.waveform, batch.lengths  # (B, S) float32, (B,) int64

A source may be a folder, a manifest, tar shards, HDF5 or a saved Hugging Face dataset (``find_audio``); clips of
similar length are taken whole by ``BucketDataset``. Which sample comes when is a pure function of (seed, global sample
index), so training resumes anywhere at once and sees the same audio with any number of workers and ranks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Lazy, so that `python -m bestrq2.data.manifest` does not import itself twice.
_HOME = {
    "AudioError": "audio",
    "AudioFile": "manifest",
    "AudioInfo": "audio",
    "Batch": "batch",
    "BucketDataset": "buckets",
    "CropDataset": "dataset",
    "DataError": "dataset",
    "DomainSchedule": "domains",
    "ManifestError": "manifest",
    "Sample": "dataset",
    "SampleOrder": "order",
    "Skip": "audio",
    "SkipReport": "scanning",
    "audio_info": "audio",
    "batches": "batch",
    "collate": "batch",
    "collect": "scanning",
    "discover_folder": "manifest",
    "find_audio": "sources",
    "iterate_clips": "clips",
    "load_audio": "audio",
    "read_manifest": "manifest",
    "scan": "scanning",
    "tiny_dataset": "scanning",
    "write_manifest": "manifest",
}

if TYPE_CHECKING:
    from .audio import AudioError, AudioInfo, Skip, audio_info, load_audio
    from .batch import Batch, batches, collate
    from .buckets import BucketDataset
    from .clips import iterate_clips
    from .dataset import CropDataset, DataError, Sample
    from .domains import DomainSchedule
    from .manifest import AudioFile, ManifestError, discover_folder, read_manifest, write_manifest
    from .order import SampleOrder
    from .scanning import SkipReport, collect, scan, tiny_dataset
    from .sources import find_audio


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AudioError",
    "AudioFile",
    "AudioInfo",
    "Batch",
    "BucketDataset",
    "CropDataset",
    "DataError",
    "DomainSchedule",
    "ManifestError",
    "Sample",
    "SampleOrder",
    "Skip",
    "SkipReport",
    "audio_info",
    "batches",
    "collate",
    "collect",
    "discover_folder",
    "find_audio",
    "iterate_clips",
    "load_audio",
    "read_manifest",
    "scan",
    "tiny_dataset",
    "write_manifest",
]
