"""Manifests of other tools: parts of files, delimiters and quoting, splits; each gives exactly the audio it means."""

import gzip
import json
import os

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioFile, CropDataset, DataError, ManifestError, collect, iterate_clips, read_manifest
from bestrq2.data.manifest import write_manifest
from bestrq2.data.shards import pack
from bestrq2.data.splits import shared_clips
from bestrq2.manifest import main as manifest_command

RATE = 16000


@pytest.fixture
def folder(tmp_path):
    """Ten seconds, whose second n has the value n / 16; and a file of one second."""
    samples = np.repeat(np.arange(10) / 16, RATE).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "short.wav", samples[RATE : 2 * RATE], RATE, subtype="PCM_16")
    return tmp_path


def seconds(files):
    """The seconds of long.wav that the decoded clips hold."""
    heard = []
    for clip in iterate_clips(files, RATE):
        assert isinstance(clip, tuple), clip
        values, counts = np.unique(np.rint(clip[1] * 16), return_counts=True)
        heard.append({int(value): count / RATE for value, count in zip(values, counts)})
    return heard


def rows(*items):
    return "".join(json.dumps(item) + "\n" for item in items)


FORMS = {
    "nemo.jsonl": rows(
        {"audio_filepath": "long.wav", "offset": 5, "duration": 1}, {"audio_filepath": "long.wav", "duration": 2.0}
    ),
    "nemo.json": rows({"audio_filepath": "long.wav", "offset": 5.0, "duration": 1.0, "text": '"'})
    + rows({"audio_filepath": "long.wav", "offset": 0, "duration": 2, "text": "a"}),
    "ours.csv": "path,start,end\nlong.wav,5,6\nlong.wav,0,2\n",
    "spaces.csv": "path, start, end, label\nlong.wav, 5, 6, a b\nlong.wav, 0, 2, c\n",
    "spaces_behind.csv": "end ,start ,path \n6 ,5 ,long.wav \n2 ,0 ,long.wav\n",
    "spaces_in_rows.csv": "start,end,path\n5,6, long.wav\n0,2, long.wav\n",
    "spaces_and_quotes.csv": 'start,end,path,text\n5,6, "long.wav", "a, b"\n0,2, "long.wav", c\n',
    "capitals.csv": "Path,Start,END\nlong.wav,5,6\nlong.wav,0,2\n",
    "events.csv": "path,onset,offset,label\nlong.wav,5,6,dog\nlong.wav,0,2,cat\n",
    "semicolons.csv": 'path;start;end;text\nlong.wav;5;6;a, b\n"long.wav";0;2;"a; b"\n',
    "milliseconds.csv": "file,start_ms,end_ms\nlong.wav,5000,6000\nlong.wav,0,2000\n",
    "tabs.tsv": 'path\toffset\tduration\tsentence\nlong.wav\t5\t1\t"lone\nlong.wav\t0\t2\t"two" marks "\n',
    "speechbrain.csv": "ID,duration,wav,start,stop,wrd\na,1.0,long.wav,80000,96000,A\nb,2.0,long.wav,0,32000,B\n",
    "speechbrain.json": json.dumps(
        {
            "a": {"wav": {"file": "long.wav", "start": 80000, "stop": 96000}, "length": 1.0},
            "b": {"wav": {"file": "long.wav", "start": 0, "stop": 32000}, "length": 2.0},
        },
        indent=1,
    ),
    "lhotse.jsonl": rows(
        *(
            {
                "id": name,
                "type": "MonoCut",
                "start": start,
                "duration": length,
                "channel": 0,
                "recording": {
                    "id": "long",
                    "sources": [{"type": "file", "channels": [0], "source": "long.wav"}],
                    "sampling_rate": RATE,
                    "num_samples": 160000,
                    "duration": 10.0,
                },
            }
            for name, start, length in (("a", 5.0, 1.0), ("b", 0.0, 2.0))
        )
    ),
    "document.json": json.dumps([{"path": "long.wav", "start": 5, "end": 6}, {"path": "long.wav", "end": 2}], indent=2),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_parts_of_files(folder, name, compressed):
    path = folder / (name + ".gz" if compressed else name)
    path.write_bytes(gzip.compress(FORMS[name].encode()) if compressed else FORMS[name].encode())
    files, report = collect(path)
    assert seconds(files) == [{5: 1.0}, {0: 1.0, 1: 1.0}]
    assert report.notes[0].startswith(f"{path}: 2 rows, ")
    assert [file.duration for file in files] == [1.0, 2.0]


def test_kaldi_folder(folder):
    (folder / "wav.scp").write_text("rec long.wav\n")
    (folder / "segments").write_text("utt1 rec 5.00 6.00\nutt2 rec 8 -1\n")
    (folder / "text").write_text("utt1 some words\nutt2\n")
    for source in (folder, folder / "wav.scp"):
        files, report = collect(source)
        assert seconds(files) == [{5: 1.0}, {8: 1.0, 9: 1.0}]
        assert report.notes[0] == f"{folder / 'segments'}: 2 rows, 2 of them parts of longer files"
    (folder / "segments").write_text("utt1 rec 0 6.00\nutt2 rec 6 -1\n")
    assert "2 rows, 2 of them parts" in collect(folder)[1].notes[0]
    (folder / "segments").write_text("utt1 rec 0 10.00\n")
    assert collect(folder)[1].notes[0].endswith(": 1 row")  # not known without opening the file
    (folder / "segments").write_text("utt1 rec 5.00 6.00\nutt2 rec nan inf\n")
    with pytest.raises(ManifestError, match=r"segments:2: start must be a number >= 0, got 'nan'"):
        collect(folder)
    (folder / "segments").unlink()
    assert [len(found) for found in seconds(collect(folder)[0])] == [10]
    (folder / "wav.scp").write_text("rec sox long.wav -t wav - |\n")
    with pytest.raises(ManifestError, match=r"wav.scp:1: a command is not run"):
        collect(folder)


def test_fairseq_list(folder):
    (folder / "train.tsv").write_text(f"{folder}\nlong.wav\t160000\nshort.wav\t16000\n")
    files, _ = collect(folder / "train.tsv")
    assert [(file.path, file.duration) for file in files] == [
        (str(folder / "long.wav"), 10.0),
        (str(folder / "short.wav"), 1.0),
    ]


def test_common_voice(folder):
    (folder / "clips").mkdir()
    for number in range(3):
        (folder / "clips" / f"{number}.wav").write_bytes((folder / "short.wav").read_bytes())
    lines = ["client_id\tpath\tsentence", 'a\t0.wav\t"Open', "b\t1.wav\tplain", 'c\t2.wav\tclosed"']
    (folder / "validated.tsv").write_text("\n".join(lines) + "\n")
    files, report = collect(folder / "validated.tsv")
    assert [file.path for file in files] == [str(folder / "clips" / f"{number}.wav") for number in range(3)]
    assert report.notes == [f"{folder / 'validated.tsv'}: 3 rows"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('path,text\na.wav,"open\nb.wav,x\nc.wav,y\n', r"m.csv:2: a quotation mark is opened here and never closed"),
        (
            'path,text\na.wav,"open\nb.wav,x\nc.wav,"\n',
            "m.csv:2: a quotation mark is opened .* closed in line 4",
        ),
        ('path,text\na.wav,"a"b\n', "m.csv:2: ',' expected after '\"'"),
        ("path,path\na.wav,b.wav\n", "the column 'path' is there twice"),
        ("path,start,end\na.wav,3,2\n", "m.csv:2: the clip ends at 2 s, not after its start at 3 s"),
        ("path,start,stop\na.wav,16000,32000\n", "m.csv:2: start and stop, 16000 and 32000: seconds or samples"),
        ("audio_filepath,offset,end,duration\na.wav,1,5,2\n", "start 1, end 5 and duration 2 do not fit together"),
        ("path,onset,start\na.wav,1,2\n", "onset and start: expected onset with offset, or start with end"),
        ("path,channel\na.wav,1\n", "m.csv:2: channel = '1' cannot be applied"),
        ("path,speed\na.wav,0.9\n", "m.csv:2: speed = '0.9' cannot be applied"),
        ("ID,wav\na,{data_root}/a.wav\n", "m.csv:2: put the folder in place of the placeholder"),
        ("ID,wav,wav_opts\na,a.wav,start:10000 stop:26000\n", "wav_opts = 'start:10000 .* may stand for a part of the"),
        ("path,start_sample\na.wav,16000\n", "m.csv:2: start_sample = '16000' may stand for a part of the file: name"),
        ("path,Start (s),End (s)\na.wav,1,2\n", r"Start \(s\) = '1' may stand for a part"),
        ("a.wav,dog\nb.wav,cat\n", "the first line must name the columns, for example path,label; it is 'a.wav,dog'"),
        ("path,duration,duration_ms\na.wav,1,2000\n", "two different values of duration: 1 s and 2000 ms"),
    ],
)
def test_what_is_open_is_refused(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize("name", ["recording", "sources"])
def test_a_label_may_be_called_as_a_key_of_lhotse(tmp_path, name):
    (tmp_path / "m.csv").write_text(f"path,{name}\na.wav,r1\n")
    (file,) = read_manifest(tmp_path / "m.csv")
    assert file.path.endswith("a.wav")


def test_encodings(tmp_path):
    (tmp_path / "m.csv.gz").write_bytes(gzip.compress(b"path\na.wav\n")[:-9])
    with pytest.raises(ManifestError, match="damaged gzip"):
        read_manifest(tmp_path / "m.csv.gz")
    (tmp_path / "m.csv").write_bytes(b"path\rcaf\xe9.wav\r")
    assert read_manifest(tmp_path / "m.csv")[0].path.endswith(os.fsdecode(b"caf\xe9.wav"))


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;\r"])
def test_the_line_that_tells_excel_the_delimiter(tmp_path, first):
    (tmp_path / "m.csv").write_text(f"{first}\npath;label;n\na,b.wav;x;1\nc.wav;y\n", newline="")
    with pytest.raises(ManifestError, match=r"m\.csv:4: expected 3 fields, got 2"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text(f"{first}\npath;label\na,b.wav;x\n", newline="")
    assert read_manifest(tmp_path / "m.csv") == [AudioFile(str(tmp_path / "a,b.wav"), label="x")]


@pytest.mark.parametrize("path", ["https://x.org/a.wav", "s3://b/a.wav"])
def test_addresses_are_refused(tmp_path, path):
    (tmp_path / "m.csv").write_text(f"path\n{path}\n")
    with pytest.raises(ManifestError, match=rf"m\.csv:2: {path} is an address, and nothing is downloaded"):
        read_manifest(tmp_path / "m.csv")


def test_spaces_around_fields(tmp_path):
    """They belong to the delimiter where that is its form, and to a name that there is, or that was written by us."""
    table = tmp_path / "m.csv"
    table.write_text('path, label, Domain\na.wav, dog, "x, y"\n')
    assert read_manifest(table) == [AudioFile(str(tmp_path / "a.wav"), label="dog", domain="x, y")]
    (tmp_path / " b.wav").touch()
    table.write_text("label,path\ndog , b.wav\ncat, c.wav\n")
    assert [(f.path, f.label) for f in read_manifest(table)] == [
        (str(tmp_path / " b.wav"), "dog"),
        (str(tmp_path / " c.wav"), "cat"),  # neither is there: the name as it is written
    ]
    files = [AudioFile(str(tmp_path / name), label='a, "b"') for name in (" d.wav", "e.wav ", " f, g.wav")]
    write_manifest(table, files)
    assert read_manifest(table) == files


def test_labels_that_look_like_places_are_labels(tmp_path):
    (tmp_path / "m.csv").write_text("path,end_reason,start_date,num_frames,stop\na.wav,3,20200101,16000,\n")
    assert not read_manifest(tmp_path / "m.csv")[0].is_part


@pytest.mark.parametrize("unit", [1000, 16000])
def test_durations_in_another_unit(folder, unit):
    (folder / "m.csv").write_text(f"path,duration\nlong.wav,{10 * unit}\nshort.wav,{unit}\n")
    with pytest.raises(DataError, match="milliseconds" if unit == 1000 else "samples"):
        collect(folder / "m.csv")


@pytest.mark.parametrize(("column", "unit"), [("duration", "minutes"), ("seconds", "another unit")])
def test_durations_that_are_far_too_short(folder, column, unit):
    """Training would hear the beginning of each file alone."""
    (folder / "m.csv").write_text(f"path,{column}\nlong.wav,{10 / 60 if unit == 'minutes' else 0}\n")
    with pytest.raises(DataError, match=rf"long\.wav has 10\.000 s, the list says .*, which looks like {unit}"):
        collect(folder / "m.csv")


def test_durations_that_are_too_short(folder):
    table = folder / "m.csv"
    table.write_text("path,duration\nlong.wav,6\nshort.wav,1\n")
    note = f"{table}: {folder / 'long.wav'} has 10.000 s, the list says 6: training uses no more of such a file"
    assert [text.startswith(note) for text in collect(table)[1].notes] == [False, True]
    table.write_text("path,duration\nlong.wav,9.6\nlong.wav,10\n")
    assert not any("the list says" in text for text in collect(table)[1].notes)


def test_a_column_that_is_there_twice_in_a_table_without_quoting(folder):
    (folder / "m.tsv").write_text("path\tlabel\tlabel\nlong.wav\tdog\tcat\n")
    with pytest.raises(ManifestError, match="the column 'label' is there twice"):
        read_manifest(folder / "m.tsv")


def test_parts_that_are_not_there(folder):
    (folder / "m.csv").write_text("path,start,end\nlong.wav,9,12\nlong.wav,11,12\nlong.wav,9,10.02\nlong.wav,8,\n")
    skips = [clip for clip in iterate_clips(read_manifest(folder / "m.csv"), RATE) if not isinstance(clip, tuple)]
    assert [skip.reason for skip in skips] == ["truncated", "no samples"]
    (folder / "m.csv").write_text("path,start\nlong.wav,8\nlong.wav,11\n")
    files, report = collect(folder / "m.csv")
    assert [file.duration for file in files] == [2.0]
    assert report.counts() == {"no samples": 1}


def test_parts_in_training_and_back(folder, tmp_path):
    files = [AudioFile(str(folder / "long.wav"), 2.0, RATE, start=float(n), end=n + 2.0) for n in (0, 4, 6)]
    dataset = CropDataset(files, crop_seconds=1.0, seed=3)
    assert dataset.num_slots == 6
    heard = [np.rint(dataset[number].waveform * 16) for number in range(24)]
    assert {int(value) for crop in heard for value in np.unique(crop)} == {0, 1, 4, 5, 6, 7}
    write_manifest(folder / "m.csv", [*files, AudioFile(str(folder / "short.wav"), 1.0)])
    assert read_manifest(folder / "m.csv") == [
        *(AudioFile(f.path, 2.0, None if f.sampling_rate is None else RATE, start=f.start, end=f.end) for f in files),
        AudioFile(str(folder / "short.wav"), 1.0),
    ]
    assert collect(folder / "m.csv", check=True)[1].skips == []  # parts of one file are no duplicates
    packed = pack(files, folder / "shards")
    assert seconds(packed.files) == [{0: 1.0, 1: 1.0}, {4: 1.0, 5: 1.0}, {6: 1.0, 7: 1.0}]


def test_splits(folder):
    for name in ("train-clean", "dev-clean", "test"):
        (folder / "corpus" / name).mkdir(parents=True)
        (folder / "corpus" / name / "a.wav").write_bytes((folder / "short.wav").read_bytes())
    files, report = collect(folder / "corpus")
    assert [file.path for file in files] == [str(folder / "corpus" / "train-clean" / "a.wav")]
    assert "of files of several splits (1 validation, 1 test, 1 train) only train is used" in report.notes[0]
    assert len(collect(folder / "corpus", split=None)[0]) == 3
    assert [f.path for f in collect(folder / "corpus", split="validation")[0]] == [
        str(folder / "corpus" / "dev-clean" / "a.wav")
    ]
    (folder / "m.csv").write_text("path,split\nshort.wav,train\nlong.wav,test\n")
    files, report = collect(folder / "m.csv")
    assert [file.path for file in files] == [str(folder / "short.wav")]
    assert report.notes[0].endswith(": 2 rows")
    # No validation here: never what is trained on.
    assert [file.path for file in collect(folder / "m.csv", split="validation")[0]] == [str(folder / "long.wav")]


def test_clips_on_both_sides():
    whole, other = AudioFile(os.path.abspath("a.wav"), 9.0), AudioFile("b.wav", 9.0)
    first, second, third = (AudioFile("a.wav", 2.0, start=n, end=n + 2.0) for n in (0.0, 2.0, 4.0))
    assert shared_clips([whole], [other]) == shared_clips([first, third], [second, other]) == []
    assert shared_clips([whole, other], [second]) == [whole]
    assert shared_clips([first, second, third], [whole]) == [first, second, third]
    assert len(shared_clips([first, third], [AudioFile("a.wav", 8.0, start=1.0)])) == 2


def test_splits_in_a_column_with_other_words(folder):
    """Names of parts of LibriSpeech and AudioSet: what a folder of that name says, a column says, too."""
    for train, test in (("train-clean-100", "test-clean"), ("balanced_train", "eval"), ("Training", "dev set")):
        (folder / "m.csv").write_text(f"path,subset\nshort.wav,{train}\nlong.wav,{test}\n")
        assert [f.path for f in collect(folder / "m.csv")[0]] == [str(folder / "short.wav")], train


def test_a_name_that_is_there_twice_in_kaldi(folder):
    (folder / "wav.scp").write_text("a long.wav\nb short.wav\n")
    for name, text in (("utt2spk", "a s1\na s2\nb s1\n"), ("segments", "a a 0 1\na a 1 2\n")):
        (folder / name).write_text(text)
        with pytest.raises(ManifestError, match=rf"{name}:2: a is there twice"):
            read_manifest(folder / "wav.scp")
        (folder / name).unlink()


def test_splits_of_archives(folder):
    files = [AudioFile(str(folder / "short.wav"), 1.0)]
    for name in ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"):
        pack(files, folder / "packed")
        (folder / "hub" / "data").mkdir(parents=True, exist_ok=True)
        (folder / "packed" / "shards-000000.tar").rename(folder / "hub" / "data" / f"{name}.tar")
        for rest in (folder / "packed").iterdir():
            rest.unlink()
    found, report = collect(folder / "hub")
    assert [file.path.split("::")[0] for file in found] == [str(folder / "hub/data/train-00000-of-00001.tar")]
    assert "only train is used" in report.notes[0]


def test_a_name_like_a_placeholder(tmp_path):
    """SpeechBrain's placeholder is refused, but for a file that has this name."""
    manifest = tmp_path / "clips.csv"
    manifest.write_text("path\n{root}/a.wav\n")
    with pytest.raises(ManifestError, match="put the folder in place of the placeholder"):
        read_manifest(manifest)
    (tmp_path / "{root}").mkdir()
    (tmp_path / "{root}" / "a.wav").touch()
    assert [item.path for item in read_manifest(manifest)] == [str(tmp_path / "{root}" / "a.wav")]


def test_paths_written_on_windows(folder):
    (folder / "audio").mkdir()
    (folder / "short.wav").rename(folder / "audio" / "short.wav")
    soundfile.write(folder / "a\\b.wav", np.zeros(RATE), RATE)  # a name of this system
    (folder / "list").mkdir()
    table = folder / "list" / "clips.csv"
    table.write_bytes("\ufeffpath,label\r\n..\\audio\\short.wav,x\r\n../a\\b.wav,y\r\nC:\\x.wav,z\r\n".encode())
    wanted = [folder / "audio" / "short.wav", folder / "a\\b.wav", folder / "list" / "C:\\x.wav"]
    assert [item.path for item in read_manifest(table)] == [str(path) for path in wanted]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.jsonl",
            '{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav", "duration": 3.0, "duration": 1.0}\n',
            r"x.jsonl:2: 'duration' is there twice in one object",
        ),
        ("x.json", '{"utt": {"wav": "a.wav"},\n "utt": {"wav": "b.wav"}}\n', r"x.json: 'utt' is there twice"),
    ],
)
def test_names_that_are_twice_in_an_object(tmp_path, name, text, message):
    """json keeps the last of them: a row, or another duration, would be lost."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name)


def test_clips_that_are_listed_twice_are_spoken_of(folder):
    rows = ["long.wav,0,1", "long.wav,1,2", "long.wav,0,1", "short.wav,,", "short.wav,,"]
    (folder / "clips.csv").write_text("\n".join(["path,start,end", *rows]) + "\n")
    files, report = collect(folder / "clips.csv")
    assert len(files) == 5
    assert any("2 rows with a clip that is listed before" in note for note in report.notes)


def test_archives_without_a_clip(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    parquet.write_table(pyarrow.table({"audio": pyarrow.array([], kind)}), folder / "empty.parquet")
    with pytest.raises(DataError, match=r"empty\.parquet: no samples \(an archive without a single clip\)"):
        collect(folder / "empty.parquet")


def test_the_folder_of_a_manifest_is_made_before_the_work(folder):
    out = folder / "new" / "er" / "clips.csv"
    assert manifest_command([str(folder), "--out", str(out)]) == 0
    assert len(read_manifest(out)) == 2
