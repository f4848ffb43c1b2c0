"""Folders and manifests: deterministic lists, and errors that name the line."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, ManifestError, discover_folder, find_audio, read_manifest, write_manifest

from .conftest import on_disk


def _touch(folder, *names):
    for name in names:
        path = folder / on_disk(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_discover_folder(tmp_path):
    _touch(tmp_path, "b.wav", "a.FLAC", "speech/it/x y.ogg", "speech/ä.opus", "music/z.mp3", "music/q.aiff", "m.aif")
    _touch(tmp_path, ".hidden.wav", ".cache/c.wav", "speech/.DS_Store", "notes.txt", "music/cover.JPG", "README")
    (tmp_path / "folder.wav").mkdir()
    _touch(tmp_path, "folder.wav/inside.wav")
    listing = discover_folder(tmp_path)
    assert [(os.path.relpath(item.path, tmp_path), item.domain) for item in listing.files] == [
        ("a.FLAC", ""),
        ("b.wav", ""),
        ("m.aif", ""),
        ("folder.wav/inside.wav", "folder.wav"),
        ("music/q.aiff", "music"),
        ("music/z.mp3", "music"),
        (on_disk("speech/ä.opus"), "speech"),
        ("speech/it/x y.ogg", "speech"),
    ]
    hidden = {"(hidden file)": 2, "(hidden folder)": 1}
    assert listing.ignored == {".txt": 1, ".jpg": 1, "(no extension)": 1, **hidden}
    assert discover_folder(tmp_path) == listing


def test_links_are_followed_once(tmp_path):
    _touch(tmp_path, "real/a.wav", "elsewhere/b.wav")
    root = tmp_path / "real"
    (root / "loop").symlink_to(root)
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "empty.wav").mkdir()
    listing = discover_folder(root)
    assert [os.path.relpath(item.path, root) for item in listing.files] == ["a.wav", "more/b.wav"]
    assert listing.ignored == {"(link to a folder listed already)": 3, "(empty folder named like audio)": 1}


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    """It would train on everything beside the source."""
    _touch(tmp_path, "data/train/a.wav", "data/test/b.wav", "private/c.wav")
    root = tmp_path / "data" / "train"
    (root / "up").symlink_to("..")
    (root / "further").symlink_to(tmp_path)
    (root / "beside").symlink_to(tmp_path / "private")
    listing = discover_folder(root)
    assert [os.path.relpath(item.path, root) for item in listing.files] == ["a.wav", "beside/c.wav"]
    assert listing.ignored == {"(link to a folder above)": 2}


def test_files_that_are_links_to_others(tmp_path):
    _touch(tmp_path, "data/a.wav", "data/deep/b.wav", "elsewhere/c.wav")
    root = tmp_path / "data"
    (root / "c.wav").symlink_to(tmp_path / "elsewhere" / "c.wav")
    assert discover_folder(root).notes == []
    (root / "deep" / "again.wav").symlink_to("../a.wav")
    (root / "once-more.wav").symlink_to("c.wav")
    (note,) = discover_folder(root).notes
    assert "2 of the files are links to others" in note
    assert find_audio(root).notes == [note]


def test_not_a_folder(tmp_path):
    with pytest.raises(NotADirectoryError, match="does not exist"):
        discover_folder(tmp_path / "absent")
    _touch(tmp_path, "a.wav")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        discover_folder(tmp_path / "a.wav")


def test_groups():
    assert AudioFile("x/y/a.wav", domain="speech").group == "speech"
    assert AudioFile("x/y/a.wav").group == "x/y"


def test_csv_manifest(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        '\ufeffseconds,path,domain,corpus,sr\n2.5,a.wav,speech,c,16000\n,"sub/b, c.wav",,,\n1,/abs/d.wav,env,,8000\n',
        encoding="utf-8",
    )
    assert read_manifest(path) == [
        AudioFile(str(tmp_path / "a.wav"), 2.5, 16000, "speech"),
        AudioFile(str(tmp_path / "sub/b, c.wav")),
        AudioFile("/abs/d.wav", 1.0, 8000, "env"),
    ]


def test_jsonl_manifest(tmp_path):
    path = tmp_path / "list.jsonl"
    rows = [{"audio_filepath": "ä.wav", "duration": 2, "label": 3, "text": "hi"}, {"path": "b.wav", "duration": None}]
    rows.append({"path": "c.wav", "label": 0, "domain": 0})  # both are names like any other
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert read_manifest(path) == [
        AudioFile(str(tmp_path / on_disk("ä.wav")), 2.0, label="3", end=2.0),  # NeMo: the first two seconds
        AudioFile(str(tmp_path / "b.wav")),
        AudioFile(str(tmp_path / "c.wav"), domain="0", label="0"),
    ]


NAN = math.nan
RECORDING = {"sources": [{"type": "file", "source": "a.wav"}], "sampling_rate": 16000, "duration": 10.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"type": "MixedCut", "tracks": []}, "a MixedCut of Lhotse without one recording"),
        ({"recording": {"sources": [{"type": "url", "source": "http"}]}}, "expected a Lhotse recording in one file"),
        ({"audio_filepath": "a.wav", "channel_selector": 1}, "channel_selector = 1 cannot be applied"),
        ({"path": "a.wav", "offset": "soon"}, "offset must be a number"),
        ({"path": "a.wav", "duration": 10**400}, "m.jsonl:1: duration must be a number >= 0, got 1000"),
        ({"path": "a.wav", "onset": NAN, "offset": 2.0}, "m.jsonl:1: onset must be a number >= 0, got nan"),
        ({"path": "a.wav", "onset": 1.0, "offset": NAN}, "m.jsonl:1: offset must be a number >= 0, got nan"),
        ({"path": "a.wav", "start": 1.0, "length_sec": NAN}, "m.jsonl:1: length_sec must be a number > 0, got nan"),
        ({"path": "a.wav", "start": 1.0, "len_ms": -math.inf}, "m.jsonl:1: len_ms must be a number > 0, got -inf"),
        ({"id": "c", "duration": NAN, "recording": RECORDING}, "m.jsonl:1: duration must be a number >= 0, got nan"),
        ({"id": "c", "recording": RECORDING | {"duration": math.inf}}, "m.jsonl:1: duration .* got inf"),
        ({"id": "c", "start": "soon", "recording": RECORDING}, "m.jsonl:1: start must be a number >= 0, got 'soon'"),
        ({"id": "c", "duration": "long", "recording": RECORDING}, "m.jsonl:1: duration must be a number >= 0, got 'l"),
    ],
)
def test_json_that_is_refused(tmp_path, row, message):
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "", "m.csv: the file is empty; expected a header line with a column 'path'"),
        ("m.csv", "name,duration\na.wav,1\n", r"no column 'path'.*\['name', 'duration'\]"),
        ("m.csv", "path,duration\n", "no rows"),
        ("m.csv", "path,duration\na.wav,1\nb.wav,long\n", "m.csv:3: duration must be a number >= 0, got 'long'"),
        ("m.csv", "path,duration\na.wav,-1\n", "m.csv:2: duration must be"),
        ("m.csv", "path,duration\na.wav,nan\n", "m.csv:2: duration must be"),
        ("m.csv", "path,duration\na.wav,1,2\n", "m.csv:2: expected 2 fields, got 3"),
        ("m.csv", "path,duration\n,1\n", "m.csv:2: the path is empty"),
        ("m.jsonl", '{"path": "a.wav"}\n{"path": \n', "m.jsonl:2: not JSON"),
        ("m.jsonl", '["a.wav"]\n', "m.jsonl:1: expected a JSON object, got list"),
        ("m.jsonl", '{"sound": "a.wav"}\n', r"m.jsonl:1: no 'path' in \['sound'\]"),
        ("m.jsonl", '{"path": 5}\n', "m.jsonl:1: path must be text, got 5"),
        ("m.csv", "path,file\na.wav,b.wav\n", "m.csv:2: columns that name different files: 'a.wav' and file = 'b.wav'"),
        ("m.csv", "path\nfile:///a.wav\n", "m.csv:2: .*write the path alone, without file://"),
        ("m.jsonl", '{"path": "a.wav", "duration": true}\n', "duration must be a number"),
        ("m.txt", "a.wav\n", "must end in .csv, .tsv or .jsonl, got '.txt'"),
    ],
)
def test_bad_manifests_name_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


@pytest.mark.parametrize(
    "row",
    [
        {"path": "clips/spk.001.wav", "file": "spk.001"},  # a name with a dot, without its ending
        {"path": "clips/a.wav", "file": " a.wav", "filename": " "},  # spaces around a delimiter
        {"path": "clips/a.b", "file": "a.b"},
        {"path": "clips/a.wav", "wav": True, "file": 17},  # no names
    ],
)
def test_columns_that_name_the_same_file(tmp_path, row):
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    assert [item.path for item in read_manifest(tmp_path / "m.jsonl")] == [str(tmp_path / row["path"])]


@pytest.mark.parametrize("other", ["a.wav", "", "elsewhere/a.flac", "C:\\\\clips\\\\a.wav", "a"])
def test_a_second_column_that_names_the_same_file(tmp_path, other):
    (tmp_path / "m.jsonl").write_text(f'{{"path": "clips/a.wav", "filename": "{other}"}}\n')
    assert [file.path for file in read_manifest(tmp_path / "m.jsonl")] == [str(tmp_path / "clips" / "a.wav")]


def test_written_manifest_reads_back(tmp_path):
    files = [
        AudioFile(str(tmp_path / "a, b.wav"), 1.25, 44100, "speech", "x"),
        AudioFile(str(tmp_path / "sub" / on_disk("new\nline ü.wav")), 0.1),
        AudioFile(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9.wav")),
        AudioFile("/elsewhere/c.wav", 3.0),
    ]
    write_manifest(tmp_path / "m.csv", files)
    assert read_manifest(tmp_path / "m.csv") == files
    assert "\na, b.wav" not in (tmp_path / "m.csv").read_text(errors="surrogateescape")  # quoted
    moved = tmp_path / "moved"
    moved.mkdir()
    os.replace(tmp_path / "m.csv", moved / "m.csv")
    assert read_manifest(moved / "m.csv")[0].path == str(moved / "a, b.wav")


def test_names_in_a_locale_that_is_not_utf8(tmp_path):
    """A manifest holds the bytes of names; a process of another locale finds the same files, and lists them alike."""
    program = (
        "import sys, os; from bestrq2.data import discover_folder, read_manifest, write_manifest\n"
        "assert sys.getfilesystemencoding() == 'ascii'\n"
        "folder, *tables = sys.argv[1:]\n"
        "listed = discover_folder(folder).files\n"
        "assert [os.path.exists(file.path) for table in tables for file in read_manifest(table)] == [True] * 3\n"
        "write_manifest(tables[0], listed)\n"
    )
    _touch(tmp_path, "ä.wav", "音.wav")
    write_manifest(tmp_path / "m.csv", discover_folder(tmp_path).files)
    before = (tmp_path / "m.csv").read_bytes()
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": "ä.wav"}))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [str(tmp_path), str(tmp_path / "m.csv"), str(tmp_path / "m.jsonl")]
    subprocess.run([sys.executable, "-c", program, *arguments], env=environment, check=True)
    assert (tmp_path / "m.csv").read_bytes() == before


def test_failed_write_leaves_the_old_manifest(tmp_path):
    write_manifest(tmp_path / "m.csv", [AudioFile("a.wav")])
    before = (tmp_path / "m.csv").read_text()

    def interrupted():
        yield AudioFile("b.wav")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path / "m.csv", interrupted())
    assert (tmp_path / "m.csv").read_text() == before
    assert os.listdir(tmp_path) == ["m.csv"]


@pytest.mark.parametrize("form", ["jsonl", "kaldi"])
def test_channel_0_of_several_is_refused(tmp_path, form):
    """A mean of two channels in its place would be another signal, without a word."""

    def written(channels):
        soundfile.write(tmp_path / "a.wav", np.zeros((16000, channels)), 16000)
        if form == "kaldi":
            (tmp_path / "wav.scp").write_text("a a.wav\n")
            (tmp_path / "segments").write_text("a-1 a 0 0.5 A\n")
            return tmp_path / "wav.scp", "segments:1"
        (tmp_path / "m.jsonl").write_text('{"path": "a.wav", "channel": 0}\n')
        return tmp_path / "m.jsonl", "m.jsonl:1"

    path, _ = written(1)
    assert [item.path for item in read_manifest(path)] == [str(tmp_path / "a.wav")]
    path, where = written(2)
    with pytest.raises(ManifestError, match=f"{where}: channel 0 of 2 cannot be applied, channels are averaged"):
        read_manifest(path)
