"""Corpora from packages: what is decoded, labelled, kept apart, and found in containers."""

import csv
import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
import soundfile

from benchmarks.transfer import containers, corpora, packages
from benchmarks.transfer.sound_classes import sound_class
from benchmarks.transfer.tasks import corpus_tasks, held_out_tasks
from bestrq2.data.manifest import read_manifest
from bestrq2.probing.labels import read_clips


def sound(path, seconds=0.5, rate=16000, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(seed).normal(size=(round(seconds * rate), 2))
    soundfile.write(path, noise, rate)


@pytest.fixture
def root(tmp_path):
    """A few packages as ``dpkg -x`` leaves them, with sounds of WAV and Ogg only."""
    share = tmp_path / "asterisk-prompt-it-menardi-wav" / "usr" / "share" / "asterisk" / "sounds" / "it_IT_f_Menardi"
    sound(share / "digits" / "1.wav", 0.4, 8000, 1)
    sound(share / "hello.wav", 12.0, 8000, 2)
    sound(share / "beep.wav", 0.4, 8000, 3)
    (share / "damaged.wav").write_bytes(b"RIFF damaged")
    game = tmp_path / "wesnoth-1.16-data" / "usr" / "share" / "games" / "wesnoth" / "1.16" / "data" / "core" / "sounds"
    sound(game / "wolf-1.ogg", 11.0, 44100, 4)
    sound(game / "sword-1.ogg", 0.5, 44100, 5)
    (game / "sword-2.ogg").write_bytes((game / "sword-1.ogg").read_bytes())
    return tmp_path


def test_build(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert corpora.main(["--root", str(root), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "1 x wesnoth-1.16-data: byte-identical to an earlier file" in printed.err
    assert "1 x asterisk-prompt-it-menardi-wav: LibsndfileError" in printed.err
    with (out / "clips.csv").open() as file:
        rows = {row["item"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"digits/1", "hello", "wolf-1", "sword-1"}
    assert (rows["wolf-1"]["label"], rows["wolf-1"]["split"]) == ("animal", "pretrain")
    assert (rows["hello"]["speaker"], rows["hello"]["split"]) == ("paola", "probe")
    assert float(rows["hello"]["duration"]) == 10  # cut: a clip of a probe
    assert float(rows["wolf-1"]["duration"]) == pytest.approx(11, abs=0.01)
    files = read_manifest(out / "pretrain.csv")
    assert {file.domain for file in files} == {"environment"}
    samples, rate = soundfile.read(files[0].path)
    assert rate == 16000
    assert samples.ndim == 1
    assert "domain_weights: {environment: 0.2}" in (out / "data.yaml").read_text()
    before = (out / "clips.csv").read_bytes()
    assert corpora.main(["--root", str(root), "--out", str(out)]) == 0
    assert (out / "clips.csv").read_bytes() == before


def test_bad_calls(tmp_path, capsys):
    assert corpora.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "none of the packages" in capsys.readouterr().err
    assert corpora.main(["--only", "lincity,nothing"]) == 2
    assert "no such package here: lincity, nothing" in capsys.readouterr().err
    assert corpora.main(["--list"]) == 0
    assert "fluid-soundfont-gm" in capsys.readouterr().out


def test_tasks_find_their_clips(tmp_path):
    def row(number, **columns):
        fixed = {"path": f"{number}.flac", "split": "probe", "corpus": "c", "kind": "prompt", "domain": "speech"}
        return {**fixed, "lang": "", "item": str(number), "label": "", "group": str(number), **columns}

    rows = []
    for item in ("yes", "no"):
        rows.append(row(len(rows), corpus="asterisk-core", lang="it", item=item, split="pretrain"))
        rows.append(row(len(rows), corpus="asterisk-prompt", lang="it", item=item))
    rows.append(row(len(rows), corpus="asterisk-core", lang="it", item="only here", split="pretrain"))
    for program in range(4):
        note = {"kind": "note", "domain": "music", "label": "piano" if program % 2 else "organ", "program": program}
        rows.append(row(len(rows), group=f"program-{program}", pitch=program // 2, **note))
    for label in ("fire", "water"):
        for split in ("pretrain", "probe"):
            rows.append(row(len(rows), domain="environment", label=label, kind="effect", split=split))
    for number, program in enumerate((0, 0, 2, 2, 26, 26)):
        note = {"kind": "note", "domain": "music", "program": program, "octave": 3 + number % 2}
        rows.append(row(len(rows), group=f"program-{program}", **note))
    for actor, line in ((a, i) for a in ("British", "Pirate", "Default_ru") for i in ("Hello", "Oops")):
        rows.append(row(len(rows), kind="line", speaker=f"hedgewars-{actor}", item=line))
    corpora.add_task_columns(rows)
    path = tmp_path / "clips.csv"
    corpora.write_table(path, corpora.COLUMNS, rows)
    tasks = corpus_tasks(path, layers="middle", combine="average", pooling="mean+std")
    assert len(read_clips(tasks["phrase-it"])) == 4
    assert read_clips(tasks["instrument"]).classes == ["organ", "piano"]
    assert len(set(read_clips(tasks["pitch"]).groups)) == 4
    sounds = read_clips(tasks["sound"])
    assert (sounds.classes, sorted(sounds.parts)) == (["fire", "water"], [0, 0, 1, 1])
    assert read_clips(tasks["domain"]).classes == ["environment", "speech"]  # notes are no clips of it
    others = {name: read_clips(task) for name, task in held_out_tasks(path).items()}
    assert others["octave"].classes == ["3", "4"]
    assert (others["program"].classes, len(others["program"])) == (["0", "2", "26"], 6 + 2)
    assert len(others["line"]) == 4
    assert others["actor"].classes == ["hedgewars-British", "hedgewars-Pirate"]
    assert len(others["take"]) == 4


def test_zip_and_qt_resource():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sound/a.ogg", b"one")
        archive.writestr("readme.txt", b"two")
    assert list(containers.zipped(buffer.getvalue())) == [("sound/a.ogg", b"one")]
    # A root folder with one compressed file, as rcc writes it.
    data = zlib.compress(b"wave")
    data = struct.pack(">I", len(data) + 4) + struct.pack(">I", 4) + data
    name = "cow.ogg"
    names = struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHHHI", 0, 1, 0, 0, 0)
    head = 20
    places = struct.pack(">iiii", 1, head, head + len(tree), head + len(tree) + len(data))
    assert list(containers.qt_resource(b"qres" + places + tree + data + names)) == [("cow.ogg", b"wave")]


def test_openttd_sounds():
    riff = b"RIFF" + struct.pack("<I", 8) + b"WAVEdata"
    name = b"Cow moo\0"
    entry = bytes([len(name)]) + name + riff
    table = struct.pack("<II", 8, len(entry))
    assert list(containers.openttd_sounds(table + entry)) == [("00_cow-moo.wav", riff)]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("wolf-growl-1", "animal"),
        ("lich-hit", ""),
        ("torch", "fire"),
        ("bow-fire", "weapon"),
        ("default_dig_cracky", "impact"),
    ],
)
def test_sound_classes(name, label):
    assert sound_class(name) == label


def test_speech_of_the_probes_is_not_trained_on():
    assert ("asterisk-prompt", "speech") not in packages.PRETRAINING
    assert ("notes", "music") not in packages.PRETRAINING
    names = [package.name for package in packages.PACKAGES]
    assert len(names) == len(set(names)) == 21
