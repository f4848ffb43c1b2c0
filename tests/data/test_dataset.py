"""Crops: drawn from (seed, index) alone, long files as often as their length, faulty ones replaced and reported."""

from collections import Counter

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, CropDataset, DataError, collect, iterate_clips, load_audio, tiny_dataset
from bestrq2.errors import Skip

from .conftest import convert


def _ramp(folder, name: str, seconds: float):
    """A file whose every sample tells its own position: int32 n at sample n, so a crop can be located."""
    import soundfile

    folder.mkdir(exist_ok=True, parents=True)
    values = np.arange(round(seconds * 16000), dtype=np.int32) << 8
    soundfile.write(folder / name, values, 16000, subtype="PCM_24")
    return AudioFile(str(folder / name), seconds, 16000)


def _positions(waveform: np.ndarray) -> np.ndarray:
    return np.rint(waveform.astype(np.float64) * 2**23).astype(np.int64)


def test_crops_of_one_file(tmp_path):
    item = _ramp(tmp_path, "x.wav", 20.0)
    dataset = CropDataset([item], crop_seconds=2.0, seed=5)
    assert len(dataset) == dataset.num_slots == 10
    starts = []
    for index in range(200):
        sample = dataset[index]
        positions = _positions(sample.waveform)
        np.testing.assert_array_equal(positions, np.arange(positions[0], positions[0] + 32000))
        assert sample.index == index
        assert sample.skips == ()
        starts.append(positions[0])
    starts = np.array(starts).reshape(20, 10)
    # Each epoch takes one crop from every tenth of the possible starts; another epoch, other crops.
    np.testing.assert_array_equal(np.sort(starts // 28800.1, axis=1), np.tile(np.arange(10.0), (20, 1)))
    assert len(np.unique(starts)) > 190
    inside = (starts / 28800.1) % 1  # place inside its tenth: uniform
    assert abs(inside.mean() - 0.5) < 5 * (1 / 12 / 200) ** 0.5


def test_crops_reach_the_last_sample(tmp_path):
    """1001 samples are 1001 / 16000 s, and that times 16000 is 1000.9999999999999."""
    dataset = CropDataset([_ramp(tmp_path, "x.wav", 1001 / 16000)], crop_seconds=1000 / 16000)
    assert {int(_positions(dataset[index].waveform)[-1]) for index in range(30)} == {999, 1000}


def test_long_files_are_not_under_sampled(tmp_path):
    files = [_ramp(tmp_path, "long.wav", 12.0), _ramp(tmp_path, "mid.wav", 3.4), _ramp(tmp_path, "short.wav", 0.5)]
    dataset = CropDataset(files, crop_seconds=2.0)
    assert dataset.num_slots == 6 + 2 + 1
    lengths = Counter(len(dataset[index].waveform) for index in range(9))
    assert lengths == {32000: 8, 8000: 1}  # a short file comes at its own length


def test_same_sample_from_any_copy():
    files, _ = collect()
    one, other = (CropDataset(files, crop_seconds=0.7, seed=3) for _ in range(2))
    for index in (0, 7, 500, 10**9, 7, 0):
        np.testing.assert_array_equal(one[index].waveform, other[index].waveform)
    different = CropDataset(files, crop_seconds=0.7, seed=4)
    assert any(not np.array_equal(one[i].waveform, different[i].waveform) for i in range(5))


def test_resampled_crops_equal_those_of_the_whole(tmp_path, speech):
    path = convert(tmp_path / "x.flac", speech, 44100, 2, "FLAC", "PCM_16")
    whole = load_audio(path)
    dataset = CropDataset([AudioFile(str(path))], crop_seconds=0.5)
    windows = np.lib.stride_tricks.sliding_window_view(whole, 8000)
    for index in range(6):
        waveform = dataset[index].waveform
        start = np.abs(windows[:, :50] - waveform[:50]).max(axis=1).argmin()
        np.testing.assert_allclose(waveform, windows[start], rtol=0, atol=1e-6)


def test_join_short(tmp_path):
    """Short clips of a group fill a crop end to end, all of them about once an epoch; groups never mix."""
    files = [_ramp(tmp_path / "a", f"{n}.wav", 0.5 + 0.25 * n) for n in range(8)]  # 11 s
    files += [_ramp(tmp_path / "b", f"{n}.wav", 0.3) for n in range(3)]  # 0.9 s: less than a crop
    files += [_ramp(tmp_path / "a", "long.wav", 5.0)]
    dataset = CropDataset(files, crop_seconds=2.5, join_short=True, seed=1)
    assert dataset.num_slots == 2 + 4 + 1
    heard = np.zeros(8)
    epochs = 30
    for index in range(epochs * dataset.num_slots):
        positions = _positions(dataset[index].waveform)
        if len(positions) == 3 * 4800:
            np.testing.assert_array_equal(positions, np.tile(np.arange(4800), 3))  # all that group b has
            continue
        assert len(positions) == 40000
        borders = [0, *(np.flatnonzero(np.diff(positions) != 1) + 1), 40000]
        pieces = np.diff(borders)
        if len(pieces) == 1:
            continue  # a crop of the long file
        assert all(positions[border] == 0 for border in borders[:-1])  # every piece is the beginning of a file
        wholes = [round((piece / 16000 - 0.5) / 0.25) for piece in pieces[:-1]]
        assert all(piece == 16000 * (0.5 + 0.25 * n) for piece, n in zip(pieces, wholes))
        assert len(set(wholes)) == len(wholes)  # no file twice in one sample
        heard[wholes] += 1
    assert heard.min() > 0.3 * epochs
    assert heard.max() < 1.5 * epochs


def test_unreadable_files_are_replaced_and_reported(tmp_path, write_wav):
    """A file that vanishes or breaks after the scan: another takes its place, always the same one."""
    files = [_ramp(tmp_path, f"{n}.wav", 1.0) for n in range(10)]
    dataset = CropDataset(files, crop_seconds=1.0, seed=2)
    before = [dataset[index].waveform for index in range(30)]
    (tmp_path / "3.wav").unlink()
    (tmp_path / "7.wav").write_bytes(b"")
    hit = 0
    for index in range(30):
        sample, again = dataset[index], dataset[index]
        assert sample.skips == again.skips
        np.testing.assert_array_equal(sample.waveform, again.waveform)
        assert len(sample.waveform) == 16000
        if sample.skips:
            hit += 1
            assert {skip.path for skip in sample.skips} <= {files[3].path, files[7].path}
            assert {skip.reason for skip in sample.skips} <= {"missing", "empty file"}
        else:
            np.testing.assert_array_equal(sample.waveform, before[index])
    assert hit == 6  # two of ten files in each of three epochs


def test_join_reports_unreadable_files(tmp_path):
    files = [_ramp(tmp_path, f"{n}.wav", 0.5) for n in range(6)]
    (tmp_path / "2.wav").unlink()
    dataset = CropDataset(files, crop_seconds=3.0, join_short=True)
    sample = dataset[0]
    assert sample.skips == (Skip(files[2].path, "missing"),)
    assert len(sample.waveform) == 5 * 8000


def test_gives_up_with_a_clear_error(tmp_path):
    for join_short in (False, True):
        files = [AudioFile(str(tmp_path / f"{n}.wav"), 1.0) for n in range(40)]
        dataset = CropDataset(files, join_short=join_short)
        with pytest.raises(
            DataError, match=r"gave up on training sample 4: .*could not be read:\n.*[0-9]+.wav: missing"
        ) as caught:
            dataset[4]
        assert str(caught.value).count(": missing") == 16


def test_wrong_durations_of_a_manifest(tmp_path):
    """The manifest says 100 s, the file has 3: crops inside it are used, others are reported and replaced."""
    item = _ramp(tmp_path, "x.wav", 3.0)
    dataset = CropDataset([AudioFile(item.path, 100.0), item], crop_seconds=1.0, min_seconds=0.5)
    found = Counter(skip for index in range(103) for skip in dataset[index].skips)
    (skip, count), *_ = found.most_common()
    assert count > 50  # one line, whatever the crops
    assert (skip.reason, skip.detail[:48]) == ("truncated", "listed with 100.000 s, the file has 3.000 s: cor")
    assert {skip.reason for skip in found} <= {"truncated", "too short"}
    assert all(len(dataset[index].waveform) >= 8000 for index in range(50))


def test_min_seconds_at_reading(tmp_path):
    short = _ramp(tmp_path, "short.wav", 0.2)
    dataset = CropDataset([AudioFile(short.path, 5.0), _ramp(tmp_path, "x.wav", 1.0)], 10.0, min_seconds=0.5)
    skips = [skip for index in range(2) for skip in dataset[index].skips]
    assert skips
    assert {skip.reason for skip in skips} == {"too short"}


def test_rejects_bad_arguments():
    files = tiny_dataset()
    with pytest.raises(DataError, match="no files"):
        CropDataset([])
    for name, value in (("crop_seconds", 0.0), ("sampling_rate", 0), ("min_seconds", 11.0), ("max_attempts", 0)):
        with pytest.raises(ValueError, match=name):
            CropDataset(files, **{name: value})
    with pytest.raises(DataError, match=r"absent.wav: missing; leave such files out with scan\(\)"):
        CropDataset([AudioFile("absent.wav")])


@pytest.mark.parametrize("threads", [1, 3])
def test_iterate_clips(tmp_path, threads):
    files = tiny_dataset()[:5]
    files.insert(2, AudioFile(str(tmp_path / "absent.wav")))
    results = list(iterate_clips(files, 8000, threads=threads))
    assert results[2] == Skip(files[2].path, "missing")
    for item, result in zip(files, results):
        if not isinstance(result, Skip):
            assert result[0] is item
            np.testing.assert_array_equal(result[1], load_audio(item.path, 8000))
    (short,) = iterate_clips(files[:1], min_seconds=3.0)
    soundfile.write(tmp_path / "exact.wav", np.full(3087, 0.1), 44100)
    (exact,) = iterate_clips([AudioFile(str(tmp_path / "exact.wav"))], 44100, min_seconds=0.07)  # 3087.0000000000005
    assert len(exact[1]) == 3087
    assert isinstance(short, Skip)
    assert short.reason == "too short"
