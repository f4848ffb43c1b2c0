"""The list of files that data workers have: the same rows, in little memory."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

from bestrq2.data import AudioFile, CropDataset, batches, tiny_dataset
from bestrq2.data.file_table import FileTable

FILES = [
    AudioFile("a.wav"),
    AudioFile("/data/é 音/b.flac", 3.25, 44100, "music", "low", 1.5, 4.75),
    AudioFile("bytes\udcff and half a pair\ud800.wav", 2, None, "music", "", 0.0, math.inf),
    AudioFile("shard.tar::x/a.wav", 1e-3, 16000, "", "7", 1e6, None),
    AudioFile("", 0.0, 8000, "speech", "low"),
]


def test_every_field_of_every_row_comes_back():
    table = pickle.loads(pickle.dumps(FileTable(FILES)))
    assert list(table) == FILES
    assert [table[row] for row in range(-5, 0)] == FILES
    assert table[np.int64(1)] == FILES[1]
    assert table[1:4:2] == FILES[1:4:2]
    assert table == FILES
    assert [*FILES] == table
    assert table != FILES[:-1]
    assert table != [*FILES[:-1], AudioFile("other")]
    with pytest.raises(IndexError):
        table[5]
    for entry in fields(AudioFile):  # a field that is added must be kept, too
        value = {"path": "p", "domain": "d", "label": "l", "sampling_rate": 3}.get(entry.name, 2.5)
        changed = replace(AudioFile("x"), **{entry.name: value})
        assert entry.default is MISSING or value != entry.default
        assert FileTable([changed])[0] == changed
    assert isinstance(table, Sequence)
    assert len(FileTable([])) == 0


def test_a_copy_for_a_worker_is_small_and_gives_the_same_samples():
    files = [replace(item, start=0.25) for item in tiny_dataset()]
    dataset = CropDataset(files, crop_seconds=1.0, seed=3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.files == files
    assert type(dataset.files) is list
    for index in range(30):
        one, two = dataset[index], copy[index]
        assert np.array_equal(one.waveform, two.waveform)
        assert (one.index, one.skips, one.domain) == (two.index, two.skips, two.domain)
    many = [AudioFile(f"/data/{number:06d}.flac", 2.0, 16000, "speech", "", number / 7) for number in range(5000)]
    small, large = (len(pickle.dumps(CropDataset(many[:count]))) for count in (1000, 5000))
    assert (large - small) / 4000 < 18 + 40 + 40, "path, columns, and the arrays of the order"


def test_workers_read_it():
    dataset = CropDataset(tiny_dataset(), crop_seconds=1.0, seed=3)
    one, two = (list(batches(dataset, 4, num_steps=3, workers=workers)) for workers in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.waveform.numpy(), b.waveform.numpy())
