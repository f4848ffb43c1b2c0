"""Files replaced by others of the same name and length are noticed; copies of the same files are not."""

import shutil

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, CropDataset, collect
from bestrq2.data.content import SAMPLED_FILES, changed_files, content_digest, replaced_files, sample_contents
from bestrq2.data.fingerprint import data_fingerprint, data_identity
from bestrq2.data.shards import pack

RATE = 8000


def write(path, seed, seconds=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-3000, 3000, int(RATE * seconds))
    soundfile.write(path, noise.astype(np.int16), RATE)


@pytest.fixture
def files(tmp_path):
    for number in range(4):
        write(tmp_path / "audio" / f"{number}.wav", number)
    return collect(tmp_path / "audio")[0]


def test_a_replaced_file_is_found_and_the_fingerprint_is_as_before(files, tmp_path):
    before = data_identity(CropDataset(files, 1.0))
    write(tmp_path / "audio" / "2.wav", 99)
    assert data_fingerprint(CropDataset(files, 1.0)) == before["data"]
    assert replaced_files(files, before["content"]) == ([files[2]], 4)


def test_what_changed_is_named(files, tmp_path):
    before = sample_contents(files)
    write(tmp_path / "audio" / "new.wav", 7)
    new = collect(tmp_path / "audio")[0]
    assert changed_files(new, before, 4) == f"5 files instead of 4; new or changed: {new[-1].path}"
    assert changed_files(files[1:], before, 4) == "3 files instead of 4; the content of 1 is gone"
    assert changed_files([new[-1], *files[1:]], before, 4).startswith("new or changed: ")
    assert changed_files(files[::-1], before, 4).startswith("the same content under other names")
    assert changed_files(files, before, None) == ""  # a checkpoint of an earlier version


def test_of_many_files_the_number_alone_is_told(files):
    """Of 300 files about 170 are sampled: the others are not known, and the sample is not their number."""
    before = sample_contents(files * 75)
    assert len(before.split()) < SAMPLED_FILES
    assert changed_files(files * 25, before, 300) == "100 files instead of 300"
    assert changed_files(files * 75, before, 300) == ""
    assert changed_files(files * 75, sample_contents(files), 4) == "300 files instead of 4"


def test_content_that_is_not_known_is_not_compared(files):
    rows = [AudioFile(f"a.parquet::{number}", 1.0) for number in range(3)]
    assert changed_files(rows, sample_contents(rows), 3) == ""
    assert changed_files(rows[:1], sample_contents(rows), 3) == "1 file instead of 3"


def test_copies_and_shards_of_the_same_files_have_the_same_content(files, tmp_path):
    before = sample_contents(files)
    shutil.copytree(tmp_path / "audio", tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    assert sample_contents(collect(tmp_path / "copy")[0]) == before
    pack(files, tmp_path / "shards")
    packed = collect(str(tmp_path / "shards"))[0]
    assert "::" in packed[0].path
    assert sample_contents(packed) == before


def test_a_file_that_cannot_be_read_is_not_compared(files, tmp_path):
    before = sample_contents(files)
    (tmp_path / "audio" / "0.wav").unlink()
    assert replaced_files(files, before) == ([], 3)
    assert content_digest(files[0]) == "-"
    assert content_digest(AudioFile(str(tmp_path))) == "-"


@pytest.mark.parametrize("before", [None, "", "12345678"])
def test_nothing_is_compared_without_a_record_of_these_files(files, before):
    assert replaced_files(files, before) == ([], 0)


def test_a_million_files_are_sampled(tmp_path):
    write(tmp_path / "a.wav", 0, 0.1)
    digests = sample_contents([AudioFile(str(tmp_path / "a.wav"))] * 1_000_000).split()
    assert SAMPLED_FILES - 3 <= len(digests) <= SAMPLED_FILES


def test_samples_of_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")

    def digests(seed):
        with h5py.File(tmp_path / f"{seed}.h5", "w") as file:
            samples = np.random.default_rng(seed).integers(-999, 999, (2, 30000)).astype(np.int16)
            samples[0] = 5
            file["waveform"] = samples
        return sample_contents(collect(str(tmp_path / f"{seed}.h5"))[0]).split()

    one, other = digests(1), digests(2)
    assert one[0] == other[0] != "-"
    assert one[1] != other[1]
