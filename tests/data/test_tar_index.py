"""Tar shards: every member reads as the original file; damage is found, reported and survived."""

import contextlib
import json
import os
import tarfile

import numpy as np
import pytest
from tar_files import clip_bytes, write_tar

from bestrq2.data import (
    AudioError,
    AudioFile,
    CropDataset,
    DataError,
    audio_info,
    collect,
    find_audio,
    load_audio,
    read_manifest,
    tiny_dataset,
    write_manifest,
)
from bestrq2.data.archives import tar as tar_index_module
from bestrq2.data.archives.readers import Section
from bestrq2.data.archives.tar import tar_index
from bestrq2.data.audio import audio_digest
from bestrq2.data.files import from_text, split_address
from bestrq2.data.patterns import expand, expand_pattern

from . import reader_fuzzing
from .conftest import FORMATS, convert, encoded


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _relative_paths(files, folder):
    return [os.path.relpath(item.path, folder) for item in files]


@pytest.mark.parametrize(("extension", "format", "subtype", "rate", "channels"), FORMATS)
def test_a_member_reads_as_the_file_it_was(tmp_path, speech, extension, format, subtype, rate, channels):
    path = convert(tmp_path / f"clip.{extension}", speech, rate, channels, format, subtype)
    shard = write_tar(
        tmp_path / "s.tar", [("x.txt", b"-"), (f"a/clip.{extension}", path.read_bytes()), ("b.wav", b"x" * 99)]
    )
    member = f"{shard}::a/clip.{extension}"
    assert audio_info(member) == audio_info(path)
    np.testing.assert_array_equal(load_audio(member), load_audio(path))
    for start, duration in ((0.0, 0.5), (1.234, 1.0), (3.9, 5.0)):
        part = load_audio(member, 16000, start=start, duration=duration)
        np.testing.assert_array_equal(part, load_audio(path, 16000, start=start, duration=duration))
    assert audio_digest(member) == audio_digest(path)
    with pytest.raises(AudioError, match=r"b.wav: not decodable"):
        load_audio(f"{shard}::b.wav")


def test_tagged_mp3(tmp_path, speech):
    """An ID3 tag in front, and more promised than is there: as from a file."""
    path = convert(tmp_path / "x.mp3", speech, 44100, 2, "MP3", "MPEG_LAYER_III")
    tagged = b"ID3\x04\x00\x00" + bytes([0, 0, 2, 0]) + bytes(256) + path.read_bytes()
    path.write_bytes(tagged)
    shard = write_tar(tmp_path / "s.tar", [("x.mp3", tagged), ("cut.mp3", tagged[:20000])])
    np.testing.assert_array_equal(load_audio(f"{shard}::x.mp3"), load_audio(path))
    with pytest.raises(AudioError, match="truncated"):
        load_audio(f"{shard}::cut.mp3")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names(tmp_path, format):
    long = "folder/" * 12 + "y" * 90 + ".ogg" if format != tarfile.USTAR_FORMAT else "f/" * 40 + "y" * 80 + ".ogg"
    latin = b"latin-\xe9.ogg".decode("utf-8", "surrogateescape")
    names = ["a.ogg", "./speech/b.ogg", "Übung 音声.ogg", latin, long, "new\nline.ogg", "x::y.ogg", "UP.OGG"]
    if format == tarfile.USTAR_FORMAT:
        names.remove(latin)
    shard = write_tar(
        tmp_path / "s.tar", [(name, clip_bytes()) for name in [*names, "._a.ogg", ".hidden/c.ogg"]], format
    )
    files, report = collect(shard)
    assert [split_address(item.path) for item in files] == [(str(shard), os.path.normpath(from_text(n))) for n in names]
    assert report.ignored == {"(hidden)": 2}
    assert files[1].domain == "speech"
    for item in files:
        assert load_audio(item.path, duration=0.1).shape == (1600,)
    write_manifest(tmp_path / "m.csv", files)
    assert read_manifest(tmp_path / "m.csv") == files


def test_sidecars_and_order(tmp_path):
    stated = {"duration": 2.0, "sampling_rate": 16000, "domain": "speech", "label": 7}
    members = [
        ("z.json", json.dumps(stated).encode()),
        ("z.ogg", clip_bytes(0)),
        ("music/a.ogg", clip_bytes(1)),
        ("music/a.txt", b"a waltz\n"),
        ("m.b.ogg", clip_bytes(2)),  # webdataset: key "m", extension "b.ogg"
        ("m.json", b'{"domain": "", "duration": "long", "seconds": 2}'),
        ("bad.ogg", clip_bytes(3)),
        ("bad.json", b"{"),
        ("x.npy", b"123"),
        ("z.ogg", clip_bytes(4)),  # appended again
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    files, report = collect(str(shard))
    assert files == [
        AudioFile(f"{shard}::z.ogg", 2.0, 16000, "speech", "7"),
        AudioFile(f"{shard}::music/a.ogg", 2.0, 16000, "music", "a waltz"),
        AudioFile(f"{shard}::m.b.ogg", 2.0, 16000, "", ""),
        AudioFile(f"{shard}::bad.ogg", 2.0, 16000),
        AudioFile(f"{shard}::z~2.ogg", 2.0, 16000),  # z.json belongs to one of them, unknown which
    ]
    assert report.ignored == {".npy": 1}
    assert [str(skip).split(": ", 1)[1] for skip in report.skips] == [
        "damaged archive (the .json beside bad.ogg is not JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); it is not used)"
    ]
    assert report.notes == [
        f"1 clip in 1 shard with the name of an earlier one of the same shard, first {shard}::z.ogg: all are used, the "
        "later ones are called NAME~2 and so on"
    ]
    np.testing.assert_array_equal(load_audio(files[4].path), load_audio(tiny_dataset()[4].path))


def test_repeated_samples_keep_their_own_labels(tmp_path):
    """Shards that were joined have the same keys again; each clip has the label that came with it."""
    samples = [("a.ogg", clip_bytes(0)), ("a.cls", b"cat"), ("a.ogg", clip_bytes(1)), ("a.cls", b"dog")]
    shard = str(
        write_tar(tmp_path / "s.tar", [*samples, ("b.ogg", clip_bytes(2)), ("b.cls", b"old"), ("b.cls", b"new")])
    )
    for _ in range(2):  # read from the kept index the second time
        files, report = collect(shard)
        labels = {split_address(item.path)[1]: item.label for item in files}
        assert labels == {"a.ogg": "cat", "a~2.ogg": "dog", "b.ogg": "new"}
        assert len(report.notes) == 1


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ("a.ogg a.cls:1 a.wav a.cls:2", "1 2"),
        ("a.cls:1 a.ogg a.wav a.cls:2", "1 2"),  # joined; each sorted
        ("a.l.ogg a.cls:1 a.r.ogg a.cls:2", "1 2"),
        ("a.ogg a.wav a.cls:1", "1 1"),  # one sample of two clips
        ("a.ogg a.wav a.cls:1 a.ogg a.wav a.cls:2", "1 1 2 2"),
        ("a.ogg a.wav a.cls:1 a.cls:2", "2 2"),  # a label that was changed later
    ],
)
def test_repeated_keys_with_other_endings(tmp_path, members, labels):
    """Shards that were joined may have a key again for a clip of another format: its label is its own."""
    made = []
    for member in members.split():
        name, _, label = member.partition(":")
        made.append((name, label.encode() or clip_bytes()))
    files = find_audio(write_tar(tmp_path / "s.tar", made)).files
    assert " ".join(item.label for item in files) == labels


def test_labels_of_several_kinds_for_clips_of_one_key_are_told(tmp_path):
    """One sample in two formats with two labels, or two samples? Nothing tells, so the user has to know."""
    members = [("a.ogg", clip_bytes()), ("a.json", b'{"label": "dog"}'), ("a.cls", b"cat"), ("a.wav", clip_bytes())]
    found = find_audio(write_tar(tmp_path / "two.tar", members))
    assert {item.label for item in found.files} == {"dog"}
    said = f"2 clips in 1 shard with the key of another clip and several labels, first {tmp_path / 'two.tar'}::a.ogg "
    assert [said + "('cat', 'dog')" in note for note in found.notes] == [True]
    assert not found.skips  # the shard is intact
    assert not find_audio(write_tar(tmp_path / "one.tar", members[:3])).notes  # a number or a text beside the label


def test_repeated_names_of_many_shards_are_one_note(tmp_path):
    for number in range(3):
        names = ["a.ogg", "b.ogg"] if number == 1 else ["a.ogg", "a.ogg", "a.ogg"]
        write_tar(tmp_path / f"s{number}.tar", [(name, clip_bytes(clip)) for clip, name in enumerate(names)])
    _, report = collect(tmp_path)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("4 clips in 2 shards with the name of an earlier one of the same shard, first ")


@pytest.mark.parametrize("unread", [b"x" * 5000, b"caf\xe9"])
def test_a_label_that_is_not_read_keeps_its_place(tmp_path, unread):
    """Too long, or in another encoding: the label of the second clip does not go to the first."""
    samples = [("a.ogg", clip_bytes(0)), ("a.txt", unread), ("a.ogg", clip_bytes(1)), ("a.txt", b"dog")]
    files, _ = collect(str(write_tar(tmp_path / "s.tar", samples)))
    assert [item.label for item in files] == ["", "dog"]


def test_a_sidecar_in_another_encoding_costs_nothing_else(tmp_path):
    samples = [("a.ogg", clip_bytes(0)), ("a.cls", b"caf\xe9"), ("a.ogg", clip_bytes(1)), ("a.cls", b"dog")]
    files, report = collect(
        str(write_tar(tmp_path / "s.tar", [*samples, ("b.ogg", clip_bytes(2)), ("b.txt", b"\xff\x00x")]))
    )
    assert [item.label for item in files] == ["", "dog", ""]
    assert report.counts() == {"damaged archive": 2}


def test_links(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        (tmp_path / "a.ogg").write_bytes(clip_bytes())
        os.link(tmp_path / "a.ogg", tmp_path / "b.ogg")
        os.symlink("a.ogg", tmp_path / "c.ogg")
        for name in ("a.ogg", "b.ogg", "c.ogg"):
            tar.add(tmp_path / name, name)
    files, report = collect(tmp_path / "s.tar")
    np.testing.assert_array_equal(load_audio(files[1].path), load_audio(tmp_path / "a.ogg"))
    assert len(files) == 2
    assert "c.ogg is a link" in str(report.skips[0])


@pytest.mark.parametrize("cut", [0, 100, 512 * 10 + 7, 40000, -1])
def test_truncated_shard(tmp_path, cut):
    """Every clip before the cut is used; what is missing is counted."""
    contents = [clip_bytes(number) for number in range(5)]
    shard = write_tar(tmp_path / "s.tar", [(f"{n}.ogg", content) for n, content in enumerate(contents)])
    index = tar_index(str(shard), keep=False)
    ends = [member.offset + member.size for member in index.members]
    whole = shard.read_bytes()
    cut = cut if cut >= 0 else -(-ends[2] // 512) * 512  # exactly between two members
    shard.write_bytes(whole[:cut])
    intact = [f"{shard}::{n}.ogg" for n, end in enumerate(ends) if end <= cut]
    if not intact:
        reason = "empty file" if cut == 0 else "damaged archive"
        with pytest.raises(DataError, match=rf"no audio files in .*s.tar[\s\S]*{reason}"):
            collect(shard)
        return
    files, report = collect(shard)
    assert [item.path for item in files] == intact
    assert "the shard was cut, and members may be lost" in str(report.skips[0])
    cut_inside = [end for end, member in zip(ends, index.members) if member.offset < cut < end]
    assert report.counts() == {"damaged archive": 1, **({"truncated": 1} if cut_inside else {})}
    for item, gold in zip(files, tiny_dataset()):
        np.testing.assert_array_equal(load_audio(item.path), load_audio(gold.path))
    with pytest.raises(AudioError, match=r"truncated \(the shard ends|missing \(no such member"):
        load_audio(f"{shard}::3.ogg")


@pytest.mark.parametrize("fill", [b"\0", b"\xa5"])
def test_damage_in_the_middle(tmp_path, fill):
    """The headers of two members overwritten: the members behind them are found again."""
    shard = write_tar(tmp_path / "s.tar", [(f"{n}.ogg", clip_bytes(n)) for n in range(6)])
    members = tar_index(str(shard), keep=False).members
    content = bytearray(shard.read_bytes())
    start, stop = members[2].offset - 512, members[3].offset + 1000
    content[start:stop] = fill * (stop - start)
    shard.write_bytes(content)
    files, report = collect(shard)
    assert [item.path[-5:] for item in files] == ["0.ogg", "1.ogg", "4.ogg", "5.ogg"]
    assert report.counts() == {"damaged archive": 1}
    assert f"from byte {start} to {members[4].offset - 512} of" in str(report.skips[0])
    # zeros to the end, as a download leaves that reserved its space first
    content[members[4].offset + 100 :] = bytes(200_000)
    shard.write_bytes(content)
    assert "zeros at the end of" in str(collect(shard)[1].skips[1])
    # one byte of one header
    content = bytearray(write_tar(tmp_path / "t.tar", [(f"{n}.ogg", clip_bytes(n)) for n in range(3)]).read_bytes())
    content[members[1].offset - 512 + 3] ^= 1
    (tmp_path / "t.tar").write_bytes(content)
    files, report = collect(tmp_path / "t.tar")
    assert [item.path[-5:] for item in files] == ["0.ogg", "2.ogg"]
    assert report.counts() == {"damaged archive": 1}


def test_random_damage(tmp_path, damaged_copies):
    """Only clear errors come out; every clip reads or says why not; if one is not listed, damage is reported."""
    members = [(f"{n}.flac", encoded(0.3, n)) for n in range(6)]
    usable = 0
    for shard in damaged_copies(write_tar(tmp_path / "s.tar", members, tarfile.PAX_FORMAT), 120):
        try:
            files, report = collect(shard)
        except DataError:
            continue
        assert len(files) == 6 or report.skips
        for item in files:
            with contextlib.suppress(AudioError):
                usable += len(load_audio(item.path)) == 4800
    assert usable > 300


def test_shard_that_vanishes_or_fails_while_it_is_used(tmp_path, monkeypatch):
    """Its clips are replaced by others, and each is named."""
    shard = write_tar(tmp_path / "s.tar", [(f"{n}.ogg", clip_bytes(n)) for n in range(3)])
    files, _ = collect(shard)
    dataset = CropDataset([*files, *tiny_dataset()[3:12]], 1.0)
    before = [dataset[index].waveform for index in range(24)]
    shard.rename(tmp_path / "elsewhere.tar")
    samples = [dataset[index] for index in range(24)]
    assert {skip.path for sample in samples for skip in sample.skips} == {item.path for item in files}
    assert {skip.reason for sample in samples for skip in sample.skips} == {"missing"}
    (tmp_path / "elsewhere.tar").rename(shard)
    for index, gold in enumerate(before):
        np.testing.assert_array_equal(dataset[index].waveform, gold)
    # an I/O error in the middle of a member, inside of the decoder's call back into Python
    read = Section.readinto

    def failing(self, buffer):
        if self.tell() > 4000:
            self._file = open(os.devnull, "wb")  # noqa: SIM115
        return read(self, buffer)

    monkeypatch.setattr(Section, "readinto", failing)
    with pytest.raises(AudioError, match=r"s.tar::0.ogg: not readable"):
        load_audio(files[0].path)


def test_not_a_tar(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(DataError, match=r"no valid header from byte 0 to 5000 of 5000"):
        collect(tmp_path / "s.tar")
    for content in (b"x", b"x" * 512, bytes(10240), bytes(1 << 20)):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(DataError, match="damaged archive"):
            collect(tmp_path / "s.tar")
    (tmp_path / "s.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="is compressed"):
        collect(tmp_path / "s.tar.gz")


def test_index_is_kept_and_rebuilt(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "s.tar", [("a.ogg", clip_bytes(0)), ("b.ogg", clip_bytes(1))])
    built = []
    build = tar_index_module._build
    monkeypatch.setattr(tar_index_module, "_build", lambda *arguments: built.append(1) or build(*arguments))
    first = tar_index(str(shard))
    assert (tmp_path / "s.tar.index.json").exists()
    assert tar_index(str(shard)) == first
    assert len(built) == 1
    before = load_audio(f"{shard}::b.ogg")
    # another shard under the same name, also for a process that has read the old one
    write_tar(shard, [("c.ogg", clip_bytes(2)), ("x.ogg", clip_bytes(2)), ("b.ogg", clip_bytes(1))])
    np.testing.assert_array_equal(load_audio(f"{shard}::b.ogg"), before)
    assert len(built) == 2
    for damage in ("", "{", '{"format": "other"}', '{"format": "bestrq2 tar index 1", "members": [[1]]}', "[]"):
        (tmp_path / "s.tar.index.json").write_text(damage)
        assert [member.name for member in tar_index(str(shard)).members] == ["c.ogg", "x.ogg", "b.ogg"]
    assert len(built) == 7
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_index_of_a_shard_in_a_folder_that_is_read_only(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "s.tar", [("a.ogg", clip_bytes(0))])
    write = tar_index_module._write
    monkeypatch.setattr(
        tar_index_module, "_write", lambda place, index: place.parent != tmp_path and write(place, index)
    )
    index = tar_index(str(shard))
    assert not (tmp_path / "s.tar.index.json").exists()
    assert len(list((tmp_path / "cache" / "bestrq2" / "tar").iterdir())) == 1
    monkeypatch.setattr(tar_index_module, "_build", None)
    assert tar_index(str(shard)) == index
    # and with no place at all
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "s.tar"))
    monkeypatch.setattr(tar_index_module, "_write", lambda place, index: False)
    assert len(tar_index(str(shard)).members) == 1


def test_folders_that_exist_stand_for_themselves_in_patterns(tmp_path):
    for name in ("Album [12]", "Album 1", "x{a,b}", "xa"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip.wav").touch()
    for name in ("Album [12]", "x{a,b}"):
        assert expand_pattern(f"{tmp_path}/{name}/*.wav") == [str(tmp_path / name / "clip.wav")]
        assert [folder for folder, _ in expand(f"{tmp_path}/{name}/*.wav")] == [str(tmp_path / name)]
    one_of = [f"{tmp_path}/Album [12]/clip.wav", f"{tmp_path}/Album 1/clip.wav"]
    assert expand_pattern(f"{tmp_path}/{{Album [12],Album 1}}/*.wav") == one_of
    assert expand_pattern(f"{tmp_path}/Album [123]/*.wav") == [one_of[1]]
    with pytest.raises(DataError, match=r"no file fits .*cl\[0\]\*.wav; .*\[\[\] for a bracket"):
        expand_pattern(f"{tmp_path}/Album [12]/cl[0]*.wav")


def test_patterns(tmp_path):
    assert expand_pattern("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand_pattern("{b,a}/{1..2}.tar") == ["b/1.tar", "b/2.tar", "a/1.tar", "a/2.tar"]
    assert expand_pattern("{3..1}{x}") == ["3{x}", "2{x}", "1{x}"]
    (tmp_path / "{1..2}.tar").touch()
    assert expand_pattern(str(tmp_path / "{1..2}.tar")) == [str(tmp_path / "{1..2}.tar")]
    for name in ("b.tar", "a.tar", "a.tar.index.json"):
        (tmp_path / name).touch()
    assert expand_pattern(str(tmp_path / "[ab].tar*")) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    with pytest.raises(DataError, match="no file fits"):
        expand_pattern(str(tmp_path / "c*.tar"))
    with pytest.raises(DataError, match="over 1,000,000 names"):
        expand_pattern("{0..2000}{0..2000}")
    with pytest.raises(DataError, match=r"s-1.tar does not exist"):
        collect(str(tmp_path / "s-{1..3}.tar"))


def test_folders_of_shards(tmp_path):
    (tmp_path / "speech").mkdir()
    write_tar(tmp_path / "speech" / "0.tar", [("x/a.ogg", clip_bytes(0)), ("x/b.ogg", clip_bytes(1))])
    write_tar(tmp_path / "1.tar", [("env/c.ogg", clip_bytes(2)), ("d.ogg", clip_bytes(3))])
    files, _ = collect(tmp_path)
    assert _relative_paths(files, tmp_path) == [
        "1.tar::env/c.ogg",
        "1.tar::d.ogg",
        "speech/0.tar::x/a.ogg",
        "speech/0.tar::x/b.ogg",
    ]
    assert [item.domain for item in files] == ["env", "", "speech", "speech"]
    listed = collect([tmp_path / "speech" / "0.tar", tmp_path / "1.tar"])[0]
    assert _relative_paths(listed, tmp_path)[0] == "speech/0.tar::x/a.ogg"
    assert collect(f"{tmp_path}/1.tar::d.ogg")[0][0].path == f"{tmp_path}/1.tar::d.ogg"
    # next to audio files, shards are usually the same audio again: ignored with a note
    (tmp_path / "e.ogg").write_bytes(clip_bytes(4))
    files, report = collect(tmp_path)
    assert _relative_paths(files, tmp_path) == ["e.ogg"]
    assert report.ignored == {".tar": 2}


def test_members_that_are_not_at_block_borders(tmp_path):
    """Bytes put in and zeroed: what follows the zeros has no header where one may be, and is no end of the archive."""
    content = reader_fuzzing.damaged(reader_fuzzing.tar_bytes(), [(47200, ("repeat", 513)), (47436, ("zero", 194))])
    (tmp_path / "shard.tar").write_bytes(content)
    found = find_audio(tmp_path / "shard.tar")
    assert len(found.files) == 3
    assert "members are lost" in found.skips[0].detail
