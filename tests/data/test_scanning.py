"""Scanning: nothing is left out without being counted, and nothing usable is an error that says why."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from bestrq2.config.loading import load_config, recipe_names
from bestrq2.data import AudioFile, CropDataset, DataError, audio, collect, read_manifest, scan, tiny_dataset
from bestrq2.data.workers import _named_start
from bestrq2.manifest import LONGEST_PATCH, main

from .conftest import on_disk


@pytest.fixture
def mixed_folder(tmp_path, write_wav):
    """Three usable files and one of each fault, beside files of other kinds."""
    folder = tmp_path / "audio"
    write_wav("audio/a.wav", 2.0)
    same, _ = soundfile.read(folder / "a.wav", dtype="int16")
    soundfile.write(folder / "copy.flac", same, 16000)
    write_wav("audio/sub/b ü.wav", 1.0)
    write_wav("audio/short.wav", 0.1)
    (folder / "zero.ogg").touch()
    (folder / "text.wav").write_text("hello\n" * 50)
    cut = write_wav("audio/cut.wav", 3.0)
    cut.write_bytes(cut.read_bytes()[:50000])
    soundfile.write(folder / "silent.wav", np.zeros(32000), 16000)
    soundfile.write(folder / "nan.wav", np.full(32000, np.nan, np.float32), 16000, subtype="FLOAT")
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize("threads", [1, 4])
def test_scan_counts_what_it_leaves_out(mixed_folder, threads):
    files, report = collect(mixed_folder, min_seconds=0.5, num_threads=threads)
    names = [item.path.removeprefix(str(mixed_folder) + "/") for item in files]
    # Headers alone show neither silence, NaN nor copies.
    assert names == ["a.wav", "copy.flac", "nan.wav", "silent.wav", on_disk("sub/b ü.wav")]
    assert [item.duration for item in files] == [2.0, 2.0, 2.0, 2.0, 1.0]
    assert {item.sampling_rate for item in files} == {16000}
    assert report.counts() == {"too short": 1, "empty file": 1, "not decodable": 1, "truncated": 1}
    assert report.ignored == {".txt": 1}
    assert "4 skipped: " in str(report)
    assert "1 ignored: 1 .txt" in str(report)
    assert len(report) == len(report.examples()) == 4
    assert len(files) + len(report) == 9


def test_check_decodes_everything(mixed_folder):
    files, report = collect(mixed_folder, min_seconds=0.5, check=True)
    assert [item.path.removeprefix(str(mixed_folder) + "/") for item in files] == ["a.wav", on_disk("sub/b ü.wav")]
    assert report.counts() == {
        "too short": 1,
        "empty file": 1,
        "not decodable": 1,
        "truncated": 1,
        "silent": 1,
        "not finite": 1,
        "duplicate": 1,
    }
    (duplicate,) = [skip for skip in report.skips if skip.reason == "duplicate"]
    assert duplicate.path.endswith("copy.flac")
    assert duplicate.detail.endswith("a.wav")


def test_known_durations_are_not_opened(tmp_path):
    """A manifest of a million rows is ready at once; faults are met when a file is read."""
    known = [AudioFile(str(tmp_path / "absent.wav"), duration=3.0), AudioFile(str(tmp_path / "b.wav"), duration=0.2)]
    files, report = scan(known, min_seconds=0.5)
    assert files == known[:1]
    assert report.counts() == {"too short": 1}


def test_check_corrects_listed_durations_and_says_so(tmp_path, write_wav):
    write_wav("a.wav", 3.0), write_wav("b.wav", 2.0), write_wav("c.wav", 1.0)
    (tmp_path / "m.csv").write_text("path,duration\na.wav,300\nb.wav,2\nc.wav,0.5\n")
    files, report = collect(tmp_path / "m.csv", check=True)
    assert [item.duration for item in files] == [3.0, 2.0, 1.0]
    assert sum("a.wav 300.000 s, found 3.000 s and 1 more" in note for note in report.notes) == 1


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_numbers_out_of_range(seconds):
    with pytest.raises(DataError, match="min_seconds: expected 0 or more seconds, got"):
        collect(min_seconds=seconds)
    with pytest.raises(DataError, match="threads: expected at least 1, got 0"):
        scan(tiny_dataset(), num_threads=0)


def test_nothing_usable(tmp_path, mixed_folder):
    for name in ("a.wav", on_disk("sub/b ü.wav"), "copy.flac", "silent.wav", "nan.wav", "cut.wav"):
        (mixed_folder / name).unlink()
    with pytest.raises(DataError, match=r"no usable audio in .*audio: found 3 files, 3 skipped: 1 [\s\S]*zero.ogg"):
        collect(mixed_folder, min_seconds=0.5)
    with pytest.raises(
        DataError, match=r"does not exist; expected a folder, .* a pattern for any of them, such as 'audio/\*/\*\.wav'"
    ):
        collect(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no audio files in .*empty \(looked for .aif"):
        collect(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match=r"it holds 1 \.txt"):
        collect(tmp_path / "empty")
    with pytest.raises(DataError, match="of no kind that is known; expected a folder"):
        collect(tmp_path / "empty" / "a.txt")


def test_sources(tmp_path, write_wav):
    first, second = write_wav("one/a.wav", 1.0), write_wav("b.wav", 1.5)
    (tmp_path / "m.csv").write_text("path,domain\none/a.wav,speech\n")
    assert collect(first)[0] == [AudioFile(str(first), 1.0, 16000)]
    assert collect(tmp_path / "m.csv")[0] == [AudioFile(str(first), 1.0, 16000, "speech")]
    assert [item.path for item in collect([str(tmp_path / "one"), second])[0]] == [str(first), str(second)]
    assert collect()[0] == tiny_dataset()


def test_command_writes_a_manifest(tmp_path, mixed_folder, capsys):
    out = mixed_folder / "manifest.csv"
    assert main([str(mixed_folder), "--out", str(out), "--check", "--min-seconds", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "2 files" in printed
    assert "7 skipped" in printed
    files = read_manifest(out)
    assert files == collect(mixed_folder, min_seconds=0.5, check=True)[0]
    skipped = (mixed_folder / "manifest.skipped.csv").read_text().splitlines()
    assert skipped[0] == "path,reason,detail"
    assert len(skipped) == 8


def test_command_says_which_durations_were_not_compared(tmp_path, write_wav, capsys):
    write_wav("a.wav", 2.0)
    (tmp_path / "m.csv").write_text("path,start,end\na.wav,0,1\na.wav,30,31\n")
    told = "durations of 2 clips are those of the list, not compared (--check does)"
    for options in ([], ["--check"]):
        assert main([str(tmp_path / "m.csv"), "--out", str(tmp_path / "out.csv"), "--overwrite", *options]) == 0
        printed = capsys.readouterr().out
        assert (told in printed, "1 skipped" in printed) == (not options, bool(options))


def test_command_reports_errors(tmp_path, capsys):
    assert main([str(tmp_path / "absent"), "--out", str(tmp_path / "m.csv")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "m.csv").exists()
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--out", "m.txt"])


def test_command_line(tmp_path, write_wav):
    write_wav("a.wav", 1.0)
    command = [sys.executable, "-W", "error", "-m", "bestrq2.data.manifest", str(tmp_path), "--out"]
    done = subprocess.run([*command, str(tmp_path / "m.csv")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "m.csv") == [AudioFile(str(tmp_path / "a.wav"), 1.0, 16000)]


def test_the_limit_of_open_files_is_no_fault_of_a_file(no_more_files, monkeypatch):
    files = [AudioFile(item.path) for item in tiny_dataset()[:2]]

    def refused(*_):
        no_more_files()
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(audio, "Decoder", refused)
    for _ in range(2):  # libsndfile meets it, then Python
        with pytest.raises(DataError, match=r"Too many open files; .*ulimit -n"):
            scan(files, num_threads=1)


def test_the_limit_of_open_files_at_the_start_of_a_worker(monkeypatch, capfd):
    with pytest.raises(DataError, match="ulimit -n"), _named_start():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGTERM)
    try:
        from bestrq2.data.worker_server import _in_one_line
    finally:
        signal.signal(signal.SIGTERM, before)
    _in_one_line(EOFError, EOFError(), None)  # its end of it: nothing was received
    assert capfd.readouterr().err == ""


def test_clips_that_two_sources_have(tmp_path, write_wav):
    """They are drawn as often as they are listed, which only a single manifest told."""
    write_wav("a/x.wav", 1.0)
    write_wav("a/y.wav", 1.0)
    folder, table = str(tmp_path / "a"), tmp_path / "m.csv"
    files, report = collect([folder, f"{folder}/x.wav"])
    assert len(files) == 3
    told = "1 clip in several of these sources; each is used as often as it is listed"
    assert report.notes == [f"{folder}, {folder}/x.wav: {told}"]
    table.write_text("path\na/x.wav\na/x.wav\n")
    assert not any("these sources" in note for note in collect([table, f"{folder}/y.wav"])[1].notes)


def test_durations_of_nemo_in_minutes(tmp_path, write_wav):
    """A row with audio_filepath is the beginning of its file, which may be short; a list of sixtieths is a mistake."""
    seconds = {"a.wav": 30.0, "b.wav": 12.0, "c.wav": 4.0}
    for name, length in seconds.items():
        write_wav(name, length)

    def listed(factor):
        rows = [{"audio_filepath": name, "duration": round(factor * length, 2)} for name, length in seconds.items()]
        (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return collect(tmp_path / "m.jsonl")[1].notes[1:]

    with pytest.raises(DataError, match=r"a\.wav has 30\.000 s, the list says 0\.5, which looks like minutes"):
        listed(1 / 60)
    assert listed(1) == []
    assert listed(1 / 30) == [f"{tmp_path}/m.jsonl: {tmp_path}/a.wav has 30.000 s, the list says 1: training uses no "
                              "more of such a file"]  # fmt: skip


def test_listed_parts_behind_the_end_of_their_file(tmp_path, write_wav):
    """A list with durations is not compared with its files, but for a few; a note says what will be skipped."""
    write_wav("a.wav", 10.0)
    rows = [f"a.wav,{start},{start + 4}\n" for start in range(0, 20, 4)]
    (tmp_path / "m.csv").write_text("path,start,end\n" + "".join(rows))
    files, report = collect(tmp_path / "m.csv")
    assert len(files) == 5
    assert "a.wav@16.000-20.000: the file has 10.000 s): such parts are skipped and counted" in report.notes[-1]
    assert {"truncated": 1, "no samples": 2}.items() <= collect(tmp_path / "m.csv", check=True)[1].counts().items()
    dataset = CropDataset(files, crop_seconds=1.0)
    skips = Counter(str(skip) for index in range(100) for skip in dataset[index].skips)
    assert len(skips) == 3  # one line each, whatever the crops
    assert sum(skips.values()) > 30


def test_a_check_makes_no_note_of_what_it_leaves_out_or_corrects(tmp_path, write_wav):
    write_wav("a.wav", 10.0)
    for table in ("path,start,end\na.wav,0,2\na.wav,8,19\n", "path,duration\na.wav,6\n"):
        (tmp_path / "m.csv").write_text(table)
        for check in (False, True):
            notes = collect(tmp_path / "m.csv", check=check)[1].notes
            assert any("manifest --check" in text for text in notes) is not check, notes


def test_a_check_tells_of_clips_that_training_may_skip(tmp_path, write_wav, capsys):
    """The least length depends on the model."""
    write_wav("a.wav", 1.0)
    arguments = [str(tmp_path), "--out", str(tmp_path / "m.csv"), "--check", "--overwrite"]
    assert main(arguments) == 0
    assert "shorter than" not in capsys.readouterr().out
    write_wav("b.wav", 0.02)
    write_wav("c.wav", 0.3)
    assert main(arguments) == 0
    told = (
        f"note: 2 files shorter than 0.6 s, the shortest {tmp_path}/b.wav with 0.020 s: training skips what is shorter"
    )
    assert told in capsys.readouterr().out
    models = [load_config(name).model for name in recipe_names()]
    patches = [(m.encoder.frames_per_token - 1) * m.front_end.hop_length / m.front_end.sampling_rate for m in models]
    assert LONGEST_PATCH - 0.1 < max(patches) <= LONGEST_PATCH
