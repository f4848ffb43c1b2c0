"""HDF5 in the published layout: the samples as stored, at the stated rate, read at random and in part."""

import contextlib
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

from bestrq2.data import AudioError, CropDataset, DataError, audio_info, batches, collect, load_audio, read_manifest
from bestrq2.data.audio import audio_digest
from bestrq2.data.shards import pack
from bestrq2.manifest import main

from .conftest import clip

h5py = pytest.importorskip("h5py")


def _clips(number: int = 6) -> list[np.ndarray]:
    """int16 clips of real audio, of 1.0 s, 1.1 s, ... at 16 kHz."""
    waveform = np.concatenate([clip("it_status"), clip("ru_status")])
    whole = (waveform * 20000 / np.abs(waveform).max()).astype(np.int16)
    return [whole[1000 * n : 1000 * n + 16000 + 1600 * n] for n in range(number)]


@pytest.fixture
def published(tmp_path):
    """As published: (n, samples) int16 with labels and names, the rate as an attribute."""
    rows = np.stack([part[:16000] for part in _clips()])
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file.create_dataset("waveform", data=rows, chunks=(1, 4000), compression="gzip")
        file["target"] = np.zeros((6, 527), bool)
        file["audio_name"] = np.array([b"Y%d.wav" % n for n in range(6)])
        file.attrs["sample_rate"] = 16000
    return tmp_path / "train.h5", rows


def test_published_layout(published, tmp_path):
    path, rows = published
    files, report = collect(path)
    assert [item.path for item in files] == [f"{path}::{n}" for n in range(6)]
    assert {(item.duration, item.sampling_rate, item.domain, item.label) for item in files} == {(1.0, 16000, "", "")}
    assert len(report) == 0
    soundfile.write(tmp_path / "gold.wav", rows[2], 16000)
    for start, duration in ((0.0, None), (0.3, 0.2), (0.9, 1.0)):
        part = load_audio(files[2].path, start=start, duration=duration)
        np.testing.assert_array_equal(part, load_audio(tmp_path / "gold.wav", start=start, duration=duration))
    resampled = load_audio(files[2].path, 22050, start=0.25, duration=0.5)
    np.testing.assert_array_equal(resampled, load_audio(tmp_path / "gold.wav", 22050, start=0.25, duration=0.5))
    assert audio_info(files[2].path) == audio_info(tmp_path / "gold.wav")
    assert audio_digest(files[2].path) == audio_digest(tmp_path / "gold.wav")


def test_rate_that_is_not_stated(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = np.stack([part[:16000] for part in _clips()])
        file["rate"] = np.full(6, 4.5)  # of speech: a label
    (item, *_), report = collect(tmp_path / "x.h5", columns=True)
    assert (item.sampling_rate, item.duration, item.columns) == (32000, 0.5, {"rate": 4.5})
    assert any("1 HDF5 file without a sampling rate" in note and "32000 Hz is taken" in note for note in report.notes)
    assert load_audio(item.path).shape == (8000,)


@pytest.mark.parametrize(
    "name", ["sampling_rate", "samplerate", "sr", "Fs", "Sample Rate", "sampling_frequency", "rate"]
)
@pytest.mark.parametrize("place", ["file", "waveform", "dataset", "datasets", "clip"])
def test_rate_by_another_name(tmp_path, name, place):
    """It was taken for 32000 Hz, at which all clips were an octave off."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        if place == "clip":
            file.create_group("waveform").create_dataset("a", data=_clips()[0]).attrs[name] = 16000
        else:
            file["waveform"] = np.stack([part[:16000] for part in _clips()])
            if place.startswith("dataset"):
                file[name] = 16000 if place == "dataset" else [16000] * 6
            else:
                (file if place == "file" else file["waveform"]).attrs[name] = 16000
    (item, *_), report = collect(tmp_path / "x.h5", columns=True)
    assert (item.sampling_rate, item.duration, item.columns, report.notes) == (16000, 1.0, {}, [])
    np.testing.assert_array_equal(load_audio(item.path), _clips()[0][:16000] / np.float32(32768))


def test_what_would_not_be_the_audio_is_refused(tmp_path):
    """Zeros behind the end of padded clips, and 64-bit integers: full scale is hardly at 2^63."""
    rows = np.stack([part[:16000] for part in _clips()])
    with h5py.File(tmp_path / "padded.h5", "w") as file:
        file["waveform"], file["lengths"] = rows, [16000, 8000, 16000, 16000, 16000, 12000]
        file.attrs["sample_rate"] = 16000
    with pytest.raises(DataError, match="'lengths' says that clips are padded with zeros"):
        collect(tmp_path / "padded.h5")
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["waveform"], file["lengths"] = rows, [16000] * 6
    assert len(collect(tmp_path / "whole.h5")[0]) == 6
    with h5py.File(tmp_path / "long.h5", "w") as file:
        file["waveform"] = rows.astype(np.int64)
    with pytest.raises(DataError, match=r"'waveform' must be int16 .*, got int64"):
        collect(tmp_path / "long.h5")


@pytest.mark.parametrize(
    ("kind", "scale", "step"), [("f4", 1, 2**-24), ("f2", 1, 2**-12), ("i4", 2**31, 2**-24), ("i1", 128, 0)]
)
def test_other_samples_in_shards(tmp_path, kind, scale, step):
    """Some ended the packing, and those above full scale became a square wave."""
    rows = np.stack([part[:16000] for part in _clips()]) / 32768
    rows[2] *= 20000 if kind == "f4" else 1
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = (rows * scale).astype(kind)
        file.attrs["sample_rate"] = 16000
    files, _ = collect(tmp_path / "x.h5")
    packed = pack(files, tmp_path / "shards")
    assert not packed.skips
    assert [item.path[-4:] for item in packed.files].count(".wav") == (kind == "f4")
    for one, other in zip(files, packed.files, strict=True):
        np.testing.assert_allclose(load_audio(other.path), load_audio(one.path), rtol=0, atol=step)


@pytest.mark.parametrize("layout", ["group", "arrays"])
def test_clips_of_any_length(tmp_path, layout):
    parts = _clips()
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        if layout == "group":
            group = file.create_group("waveform")
            for number, part in enumerate(parts):
                group[f"clip-{number}"] = part
            group.attrs["sample_rate"] = 16000
        else:
            rows = file.create_dataset("waveform", (6,), h5py.vlen_dtype(np.int16))
            for number, part in enumerate(parts):
                rows[number] = part
            file["sample_rate"] = [16000, 8000, 16000, 16000, 16000, 16000]
        file["domain"] = ["speech", "music"] * 3
        file["label"] = [f"é{n}" for n in range(6)]
    files, _ = collect(tmp_path / "x.hdf5")
    assert [item.domain for item in files] == ["speech", "music"] * 3
    assert files[3].label == "é3"
    assert [round(item.duration * item.sampling_rate) for item in files] == [len(part) for part in parts]
    assert files[1].sampling_rate == (16000 if layout == "group" else 8000)
    np.testing.assert_array_equal(load_audio(files[4].path), parts[4].astype(np.float32) / 32768)
    np.testing.assert_array_equal(
        load_audio(files[4].path, start=0.5, duration=0.25), parts[4][8000:12000].astype(np.float32) / 32768
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_training_batches_manifest_and_shards(published, tmp_path, capsys):
    """The same batches with workers, from a manifest of the clips, and from shards that they are packed into."""
    path, _ = published
    assert main([str(path), "--out", str(tmp_path / "m.csv"), "--check"]) == 0
    assert "6 files" in capsys.readouterr().out
    packed = pack(collect(path)[0], tmp_path / "shards")
    sources = [collect(path)[0], read_manifest(tmp_path / "m.csv"), packed.files]
    streams = [list(batches(CropDataset(files, 0.4, seed=1), 4, num_steps=5)) for files in sources]
    streams.append(list(batches(CropDataset(sources[0], 0.4, seed=1), 4, num_steps=5, workers=2)))
    for stream in streams[1:]:
        for batch, gold in zip(stream, streams[0], strict=True):
            assert torch.equal(batch.waveform, gold.waveform)


def test_faults_are_named(published, tmp_path):
    path, _ = published
    for name in ("6", "-1", "x"):
        with pytest.raises(AudioError, match=r"missing \(the file has clips 0 to 5\)"):
            load_audio(f"{path}::{name}")
    with pytest.raises(AudioError, match="missing"):
        load_audio(f"{tmp_path}/absent.h5::0")
    with h5py.File(tmp_path / "mp3.h5", "w") as file:
        file["mp3"] = np.zeros(3)
    with pytest.raises(DataError, match=r"no 'waveform' in the file; it has mp3"):
        collect(tmp_path / "mp3.h5")
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["waveform"] = np.zeros(3, np.int16)
    with pytest.raises(DataError, match=r"'waveform' must be int16 \(clips, samples\), got int16 \(3,\)"):
        collect(tmp_path / "flat.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(DataError, match="damaged archive"):
        collect(tmp_path / "text.h5")
    # several files: the intact one is used, the cut one is counted
    cut = tmp_path / "cut.h5"
    cut.write_bytes(path.read_bytes()[:20000])
    files, report = collect([cut, path])
    assert len(files) == 6
    assert report.counts() == {"damaged archive": 1}


def test_damaged_chunk(published):
    """One clip's compressed bytes overwritten: it is skipped and named, the others are used."""
    path, rows = published
    with h5py.File(path) as file:
        damaged = file["waveform"].id.get_chunk_info_by_coord((3, 4000))
    content = bytearray(path.read_bytes())
    content[damaged.byte_offset : damaged.byte_offset + damaged.size] = b"\xa5" * damaged.size
    path.write_bytes(content)
    files, _ = collect(path)
    with pytest.raises(AudioError, match=r"train.h5::3: not readable"):
        load_audio(files[3].path)
    np.testing.assert_array_equal(load_audio(files[4].path), rows[4].astype(np.float32) / 32768)
    samples = [CropDataset(files, 1.0)[index] for index in range(6)]
    assert {skip.path for sample in samples for skip in sample.skips} == {files[3].path}


def test_random_damage(published, damaged_copies):
    """Only clear errors come out, and clips that are not listed are reported."""
    usable = 0
    for copy in damaged_copies(published[0], 120):
        try:
            files, report = collect(copy)
        except DataError:
            continue
        assert len(files) == 6 or report.skips
        for item in files:
            with contextlib.suppress(AudioError):
                usable += len(load_audio(item.path)) == 16000
    assert usable > 60


@pytest.mark.parametrize("found", [None, types.ModuleType("h5py")], ids=["nothing", "a folder h5py"])
def test_without_h5py(published, monkeypatch, found):
    path, _ = published
    monkeypatch.setitem(sys.modules, "h5py", found)
    monkeypatch.setattr("bestrq2.data.archives.hdf5._files", {})
    with pytest.raises(DataError, match=r'HDF5 needs h5py: pip install "bestrq2\[hdf5\]"'):
        collect(path)
    with pytest.raises(DataError, match="HDF5 needs h5py"):  # it is no fault of the clip
        load_audio(f"{path}::0")


def test_a_file_that_another_process_writes_anew(tmp_path):
    """libhdf5 knows an open file by its inode: without closing it first, the lengths of the old one were used."""
    path = tmp_path / "x.h5"
    for number, samples, value in ((3, 1600, 100), (5, 1200, 300)):
        with h5py.File(tmp_path / "new.h5", "w") as file:
            file["waveform"] = np.full((number, samples), value, np.int16)
            file.attrs["sample_rate"] = 16000
        with open(path, "wb") as target:  # in place: the same inode
            target.write((tmp_path / "new.h5").read_bytes())
        files, _ = collect(path)
        assert len(files) == number
        for item in files:
            np.testing.assert_array_equal(load_audio(item.path), np.full(samples, value / 32768, np.float32))


def test_a_dataset_split_chooses_clips(published):
    """As a column of a manifest does; all were trained on."""
    path, _ = published
    with h5py.File(path, "a") as file:
        file["split"] = [b"train", b"test", b"train", b"validation", b"train", b"train"]
    files, report = collect(path)
    assert [item.path for item in files] == [f"{path}::{n}" for n in (0, 2, 4, 5)]
    assert "(4 train, 1 test, 1 validation) only train is used" in report.notes[0]
