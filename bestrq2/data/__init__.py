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
    "AudioError": "bestrq2.errors",
    "AudioFile": "bestrq2.data.files",
    "AudioInfo": "bestrq2.data.audio",
    "Batch": "bestrq2.data.batch",
    "BucketDataset": "bestrq2.data.buckets",
    "CropDataset": "bestrq2.data.dataset",
    "DataError": "bestrq2.errors",
    "DomainSchedule": "bestrq2.data.domains",
    "ManifestError": "bestrq2.errors",
    "Sample": "bestrq2.data.dataset",
    "SampleOrder": "bestrq2.data.order",
    "Skip": "bestrq2.errors",
    "SkipReport": "bestrq2.data.scanning",
    "audio_info": "bestrq2.data.audio",
    "batches": "bestrq2.data.batch",
    "collate": "bestrq2.data.batch",
    "collect": "bestrq2.data.scanning",
    "discover_folder": "bestrq2.data.manifest",
    "find_audio": "bestrq2.data.sources",
    "iterate_clips": "bestrq2.data.whole_clips",
    "load_audio": "bestrq2.data.audio",
    "read_manifest": "bestrq2.data.manifest",
    "scan": "bestrq2.data.scanning",
    "tiny_dataset": "bestrq2.data.scanning",
    "write_manifest": "bestrq2.data.manifest",
}

if TYPE_CHECKING:
    from bestrq2.data.audio import AudioInfo, audio_info, load_audio
    from bestrq2.data.batch import Batch, batches, collate
    from bestrq2.data.buckets import BucketDataset
    from bestrq2.data.dataset import CropDataset, Sample
    from bestrq2.data.domains import DomainSchedule
    from bestrq2.data.files import AudioFile
    from bestrq2.data.manifest import discover_folder, read_manifest, write_manifest
    from bestrq2.data.order import SampleOrder
    from bestrq2.data.scanning import SkipReport, collect, scan, tiny_dataset
    from bestrq2.data.sources import find_audio
    from bestrq2.data.whole_clips import iterate_clips
    from bestrq2.errors import AudioError, DataError, ManifestError, Skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
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
