"""Splits that the words of a column tell, and words that tell none."""

import tarfile

import numpy as np
import pytest
import soundfile

from bestrq2.data import collect


def test_words_of_a_column_that_name_no_split(tmp_path):
    """Rows with such a word are trained on, which is told."""
    for name in ("short.wav", "long.wav"):
        soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    table = tmp_path / "m.csv"
    for words, told in ((("train", "cv"), "'cv'"), (("tr", "tt"), "'tr', 'tt'"), (("train", "devel"), "")):
        table.write_text(f"path,split\nshort.wav,{words[0]}\nlong.wav,{words[1]}\n")
        files, report = collect(table)
        note = f"{table}: rows with split {told} are used, as such values name no split"
        assert (note in report.notes, len(files)) == ((True, 2) if told else (False, 1))
        assert note not in collect(table, split=None)[1].notes
    table.write_text("path,subset\nshort.wav,clean\nlong.wav,noisy\n")
    assert len(collect(table)[1].notes) == 1


@pytest.mark.parametrize("form", ["{}/a.wav", "{}.tar"])
def test_splits_below_the_levels_that_decide(tmp_path, form):
    """A corpus in a folder of corpora: its test clips are trained on, which is told."""
    names = ("train-clean", "dev-clean", "test-clean")
    for name in names:
        file = tmp_path / "corpora" / "speech" / "LibriSpeech" / form.format(f"{name}/1")
        file.parent.mkdir(parents=True)
        soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
        if file.suffix == ".tar":
            with tarfile.open(file, "w") as shard:
                shard.add(tmp_path / "a.wav", "a.wav")
        else:
            file.write_bytes((tmp_path / "a.wav").read_bytes())
    files, report = collect(tmp_path / "corpora")
    inner = [f"speech/LibriSpeech/{name}" for name in sorted(names)]
    assert len(files) == 3
    assert f"{', '.join(inner)} are all used, though they name splits" in "".join(report.notes)
    assert "name splits" not in "".join(collect(tmp_path / "corpora", split=None)[1].notes)
    files, report = collect(tmp_path / "corpora" / "speech")
    assert len(files) == 1
    assert "name splits" not in "".join(report.notes)


def _pack(shard, names):
    """A shard with a second of silence under each of these names."""
    soundfile.write(shard.parent / "one.wav", np.zeros(16000), 16000)
    with tarfile.open(shard, "w") as tar:
        for name in names:
            tar.add(shard.parent / "one.wav", name)
    (shard.parent / "one.wav").unlink()


def test_splits_that_folders_inside_of_a_shard_name(tmp_path):
    """A corpus packed as it was: training uses what it uses of the unpacked one."""
    names = [f"LibriSpeech/{split}-clean/{number}/a.wav" for split in ("train", "dev", "test") for number in range(2)]
    _pack(tmp_path / "corpus.tar", names)
    with tarfile.open(tmp_path / "corpus.tar") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for source, begin in ((tmp_path / "corpus.tar", f"{tmp_path}/corpus.tar::"), (tmp_path / "unpacked", "")):
        for split, word in (("train", "train"), ("validation", "dev")):
            files, report = collect(source, split=split)
            assert len(files) == 2
            assert all(f"LibriSpeech/{word}-clean" in item.path for item in files)
            assert all(item.path.startswith(begin) for item in files)
            assert f"only {split} is used" in "".join(report.notes)
        files, report = collect(source, split=None, columns=True)
        assert "files of several splits are used: " in "".join(report.notes)
        found = [((item.columns or {})["split"], item.path.split("LibriSpeech/")[1].split("-")[0]) for item in files]
        assert {word: split for split, word in found} == {"train": "train", "dev": "validation", "test": "test"}


def test_a_shard_of_one_split_in_its_folders(tmp_path):
    _pack(tmp_path / "a.tar", ["train/1.wav", "train/2.wav", "noise/3.wav"])
    files, report = collect(tmp_path / "a.tar", split=None, columns=True)
    assert len(files) == 3
    assert not any("split" in (item.columns or {}) for item in files)
    assert not any("split" in note for note in report.notes)


def test_splits_below_the_levels_that_decide_inside_of_a_shard(tmp_path):
    _pack(tmp_path / "a.tar", [f"corpora/speech/{split}/1.wav" for split in ("train", "test")])
    files, report = collect(tmp_path / "a.tar")
    assert len(files) == 2
    told = f"{tmp_path}/a.tar: corpora/speech/test, corpora/speech/train are all used, though they name splits"
    assert told in "".join(report.notes)


def test_shards_that_are_named_one_by_one(tmp_path):
    """They are meant, whatever their folders are called; those of a folder or a pattern are one corpus."""
    for split in ("train", "dev"):
        _pack(tmp_path / f"{split[0]}-0.tar", [f"{split}/1.wav"])
    files, report = collect([tmp_path / "t-0.tar", tmp_path / "d-0.tar"])
    assert len(files) == 2
    assert not any("split" in note for note in report.notes)
    assert len(collect(tmp_path / "{t,d}-*.tar")[0]) == 2
    for source in (tmp_path, tmp_path / "*-0.tar"):
        files, report = collect(source)
        assert [item.path for item in files] == [f"{tmp_path}/t-0.tar::train/1.wav"]
        assert "only train is used" in "".join(report.notes)


def test_splits_that_a_pattern_matches(tmp_path):
    """As in a folder; splits that are written out are all used, without a word."""
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        _pack(tmp_path / f"{split}-0.tar", ["1.wav"])
        soundfile.write(tmp_path / split / "1.wav", np.zeros(16000), 16000)
    for pattern in ("*-0.tar", "*/1.wav", "[tv]*/*.wav"):
        files, report = collect(f"{tmp_path}/{pattern}")
        assert len(files) == 1
        assert "/train" in files[0].path
        assert f"{pattern}: of files of several splits (1 train, 1 validation) only train is used" in report.notes[0]
        files, report = collect(f"{tmp_path}/{pattern}", split=None, columns=True)
        assert [(item.columns or {})["split"] for item in files] == ["train", "validation"]
        assert f"{pattern}: files of several splits are used: 1 train, 1 validation" in report.notes[0]
    for pattern in ("{train,valid}-*.tar", "{train,valid}/*.wav", "train/*.wav"):
        files, report = collect(f"{tmp_path}/{pattern}")
        assert len(files) == (2 if "{" in pattern else 1)
        assert not any("split" in note for note in report.notes)


@pytest.mark.parametrize("source", ["", "*.tar"])
def test_a_shard_of_all_splits_beside_shards_of_one(tmp_path, source):
    for split in ("train", "test"):
        _pack(tmp_path / f"data-{split}-0.tar", ["1.wav"])
    _pack(tmp_path / "all.tar", [f"{split}/{number}.wav" for split in ("train", "valid", "test") for number in "23"])
    files, _ = collect(tmp_path / source)
    places = ("all.tar::train/2.wav", "all.tar::train/3.wav", "data-train-0.tar::1.wav")
    assert [item.path for item in files] == [f"{tmp_path}/{place}" for place in places]
