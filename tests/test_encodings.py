"""Manifests, labels and recipes in encodings other than UTF-8: read where a mark tells which, else refused."""

import io
import json
import os
import tarfile

import pytest

from bestrq2.config import ConfigError, load_config
from bestrq2.data import AudioFile, ManifestError, discover_folder, read_manifest, write_manifest
from bestrq2.data.archives.opening import list_archives
from bestrq2.data.files import from_text, to_text
from bestrq2.data.manifest import read_rows
from bestrq2.encodings import TextEncodingError, decode_text

WORD = "\u0107up"  # not in Latin-1
LATIN = "caf\u00e9".encode("cp1252")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_tells_the_encoding(tmp_path, encoding):
    (tmp_path / "m.csv").write_bytes(f"path,label\r\n{WORD}.wav,{WORD}\r\n".encode(encoding))
    (file,) = read_manifest(tmp_path / "m.csv")
    assert (os.path.basename(file.path), file.label) == (from_text(f"{WORD}.wav"), WORD)
    (tmp_path / "m.jsonl").write_bytes(json.dumps({"path": "a", "label": WORD}, ensure_ascii=False).encode(encoding))
    assert read_manifest(tmp_path / "m.jsonl")[0].label == WORD
    (tmp_path / "r.yaml").write_bytes(f"based_on: best_rq2_small\ntrain:\n  wandb: {WORD}\n".encode(encoding))
    assert load_config(str(tmp_path / "r.yaml")).train.wandb == WORD


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_refused(encoding):
    with pytest.raises(TextEncodingError, match="UTF-16 without a mark: save the file as UTF-8"):
        decode_text("path\n".encode(encoding))


@pytest.mark.parametrize(
    ("content", "line"), [(b"\xff\xfea\0\n\0b", 2), (b"\xfe\xff\0a\0\n\0\n\xd8\0\0a", 3)], ids=["odd", "lone surrogate"]
)
def test_damaged_utf_16_is_refused_with_its_line(content, line):
    with pytest.raises(TextEncodingError, match="damaged UTF-16") as caught:
        decode_text(content)
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", b"path,label\na.wav,x\nb.wav," + LATIN, r"m.csv:3: label is not UTF-8 \(byte 0xe9\): save the file"),
        ("m.csv", b"path,domain\na.wav," + LATIN, "m.csv:2: domain is not UTF-8"),
        ("m.tsv", b"path\tsentence\na.wav\t" + LATIN + b"\n", "m.tsv:2: sentence is not UTF-8"),
        ("m.csv", b"path," + LATIN + b"\na.wav,1\n", r"m.csv:2: the column caf\\xe9 is not UTF-8"),
        ("m.jsonl", b'{"path": "a.wav"}\n{"path": "b.wav", "tags": ["x", "' + LATIN + b'"]}', "m.jsonl:2: tags is not"),
        ("m.json", b'{"' + LATIN + b'": {"wav": "a.wav"}}', "m.json:1: ID is not UTF-8"),
    ],
)
def test_labels_in_latin_1_are_refused_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["text", "utt2spk"])
def test_kaldi(tmp_path, name):
    (tmp_path / "wav.scp").write_bytes(b"a " + LATIN + b".wav\n")
    (tmp_path / name).write_bytes(b"b x\na " + LATIN + b"\n")
    with pytest.raises(ManifestError, match=f"{name}:2: not UTF-8"):
        read_manifest(tmp_path / "wav.scp")
    (tmp_path / name).unlink()
    assert os.fsencode(read_manifest(tmp_path / "wav.scp")[0].path).endswith(LATIN + b".wav")
    (tmp_path / "wav.scp").write_bytes(LATIN + b" a.wav\n")
    with pytest.raises(ManifestError, match=r"wav\.scp:1: not UTF-8"):
        read_manifest(tmp_path / "wav.scp")


def test_names_of_files_may_be_any_bytes(tmp_path):
    """Also the domain of such a folder, which is written to a manifest and read again."""
    folder = os.fsencode(tmp_path) + b"/" + LATIN
    os.mkdir(folder)
    with open(folder + b"/b.wav", "wb"):
        pass
    files = discover_folder(tmp_path).files
    assert [to_text(os.path.basename(os.path.dirname(files[0].path)))] == [files[0].domain]
    write_manifest(tmp_path / "m.csv", files)
    assert read_manifest(tmp_path / "m.csv") == files
    assert isinstance(files[0], AudioFile)


def test_recipes_in_latin_1_are_refused_with_their_line(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"train:\n  wandb: " + LATIN)
    with pytest.raises(ConfigError, match=r"r.yaml: line 2: not UTF-8 \(byte 0xe9\): save the file as UTF-8"):
        load_config(str(tmp_path / "r.yaml"))


def test_labels_beside_a_clip_of_a_shard(tmp_path, monkeypatch):
    """Two letters of Latin-1 must not become one class."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("a.wav", b"x"), ("a.cls", b"\xe9"), ("b.wav", b"x"), ("b.cls", WORD.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (listing,) = list_archives([(str(tmp_path / "s.tar"), "")], False)
    assert [file.label for file in listing.files] == ["", WORD]
    assert "a.cls, line 1: not UTF-8" in str(listing.skips[0])


def test_labels_in_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file.create_dataset("waveform", (2, 100), "i2")
        file["label"] = [b"a", LATIN]
    (listing,) = list_archives([(str(tmp_path / "c.h5"), "")], False)
    assert "label of clip 1 is not UTF-8" in str(listing.skips[0])
