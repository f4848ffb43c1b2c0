"""Files that are held out and, under another name, trained on."""

import os

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, collect, copies
from bestrq2.data.copies import copied_files
from bestrq2.data.splits import shared_clips

RATE = 8000


def write(path, seed, silent=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-3000, 3000, 3 * RATE)
    noise[silent:] = 0
    soundfile.write(path, noise.astype(np.int16), RATE)


@pytest.fixture
def sides(tmp_path):
    """Held out are 0 ... 3; trained on, under other names, 2 ... 5: all files have one size."""
    for number in range(4):
        write(tmp_path / "held" / f"{number}.wav", number, 3 * RATE)
        write(tmp_path / "used" / "deep" / f"clip-{number + 2}.wav", number + 2, 3 * RATE)
    return collect(tmp_path / "held")[0], collect(tmp_path / "used")[0]


def test_copies_are_counted(sides, tmp_path):
    held, used = sides
    assert len(shared_clips(held, used)) == 0
    found = copied_files(held, used)
    assert found == {
        f"{tmp_path}/{name}": f"{tmp_path}/held/{number}.wav"
        for number in (2, 3)
        for name in (f"held/{number}.wav", f"used/deep/clip-{number}.wav")
    }
    assert len(shared_clips(held, used, found)) == 2
    assert copied_files(held, held) == {}  # under one name they are the same file already
    part = AudioFile(used[0].path, 0.5, start=1.0, end=1.5)
    whole = [AudioFile(held[2].path, 1.0, end=1.0), AudioFile(held[2].path, 1.0, start=1.2)]
    assert len(shared_clips(whole, [part], copied_files(whole, [part]))) == 1
    os.link(held[0].path, tmp_path / "linked.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    odd = [AudioFile(str(tmp_path / name), held[0].duration) for name in ("linked.wav", "pipe.wav", "gone.wav")]
    assert len(copied_files(held, odd)) == 2


def test_files_alike_at_their_beginning_middle_and_end_are_told_apart(tmp_path):
    """Sounds put into silence: all three pieces that are read first are the same."""
    for name, at in (("a", 9000), ("b", 9400)):
        samples = np.zeros(4 * RATE, np.int16)
        samples[at : at + 100] = 1000
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
    one, other = collect(tmp_path)[0]
    assert copied_files([one], [other]) == {}


def test_long_files_that_differ_in_one_place_alone_are_told_apart(tmp_path):
    """Behind the first megabyte, and in none of the pieces."""
    samples = np.zeros(180 * RATE, np.int16)
    for name, value in (("a", 1000), ("b", 1001), ("c", 1001)):
        samples[800_000] = value
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE)
    one, two, three = collect(tmp_path)[0]
    assert copied_files([one], [two]) == {}
    assert copied_files([two], [one, three]) == {item.path: two.path for item in (two, three)}


def test_cost_is_bounded(sides, monkeypatch):
    held, used = sides
    opened = []
    monkeypatch.setattr(copies, "_pieces", lambda path: opened.append(path))
    assert copied_files(held, [AudioFile(item.path, 3.4) for item in used]) == {}
    assert not opened  # of other lengths
    looked = []
    monkeypatch.setattr(copies, "_size", lambda path: looked.append(path))
    monkeypatch.setattr(copies, "TRAINED_ON", 50)
    monkeypatch.setattr(copies, "HELD_OUT", 2)
    assert copied_files(held, [AudioFile(f"/absent/{number}.wav", 3.0) for number in range(1001)]) == {}
    assert len(looked) == 2 + 48
