"""Files that are missing or are no audio: the reason that a user can act on."""

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioError, collect, load_audio, mistaken
from bestrq2.data.files import from_text
from bestrq2.errors import DataError


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_normal_form(tmp_path, form):
    other = "NFD" if form == "NFC" else "NFC"
    there, asked = (from_text(unicodedata.normalize(f, "\u00dcbung.wav")) for f in (form, other))
    (tmp_path / there).touch()
    if os.path.exists(tmp_path / asked):
        pytest.skip("a file system that takes the two for one")
    with pytest.raises(AudioError, match=rf"missing \(a file of this name in Unicode normal form {form} is there"):
        load_audio(tmp_path / asked)
    with pytest.raises(AudioError, match=r"missing$"):
        load_audio(tmp_path / from_text("\u00e4ndern.wav"))


@pytest.mark.parametrize(("table", "audio"), [("meta", "audio"), ("", "audio"), ("", "wav"), ("meta", "wav")])
def test_audio_in_a_folder_beside_the_table(tmp_path, table, audio):
    """ESC-50 has meta/esc50.csv, with names of files in audio/."""
    for folder in {table, audio}:
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / audio / "a.wav").touch()
    (tmp_path / table / "m.csv").write_text("filename\na.wav\n")
    with pytest.raises(
        DataError, match=rf"1 missing[\s\S]*\(a file of this name is in {tmp_path / audio}: save the list"
    ):
        collect(tmp_path / table / "m.csv")


@pytest.mark.parametrize(
    ("there", "asked", "hint"),
    [
        ("\u00e9t\u00e9.wav".encode(), b"\xe9t\xe9.wav", "save the manifest as UTF-8"),
        (b"\xe9t\xe9.wav", "\u00e9t\u00e9.wav".encode(), "in Latin-1 is there: rename it"),
    ],
)
def test_a_name_in_another_encoding(tmp_path, there, asked, hint):
    (tmp_path / os.fsdecode(there)).touch()
    with pytest.raises(AudioError, match=hint):
        load_audio(tmp_path / os.fsdecode(asked))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer .* git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), r"a picture \(PNG\)"),
        (b"\n<!DOCTYPE html><title>404</title>", "a web page"),
        (b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256), "an ID3 tag without audio"),
        (b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(99), r"MP4, M4A .* convert it \(ffmpeg -i IN OUT\.flac"),
        (b"\xff\xf1\x50\x80" + bytes(99), "AAC, which is .*ffmpeg"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "WMA or WMV, which is .*ffmpeg"),
        (b"404: Not Found\n", "text instead of the file: 404: Not Found"),
        (b"\1nothing that is known", "no audio in a format that is known; the first bytes are 01 6e 6f 74 68 69 6e 67"),
        (bytes(5000), "no audio in a format that is known; the first bytes are 00 00"),
    ],
)
def test_what_is_there_instead_of_audio(tmp_path, content, message, capfd):
    for name in ("x.mp3", "x.wav"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AudioError, match=message):
            load_audio(tmp_path / name)
    assert capfd.readouterr().err == ""


def test_a_name_that_the_locale_cannot_write(tmp_path):
    code = (
        "from bestrq2.data import AudioError, load_audio\n"
        "try: load_audio('U\\u0308.wav')\nexcept AudioError as error: print(ascii(str(error)))\n"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "missing (the locale (ascii) has no such letter: set LC_ALL=C.UTF-8)" in result.stdout, result.stderr


def test_channels_that_cancel_each_other(tmp_path, caplog):
    """One inverted channel: the mono mix would be next to nothing, without a word."""
    wave = 0.1 * np.random.default_rng(0).standard_normal(16000)
    for name, other in (("same", wave), ("one", 0 * wave), ("inverted", -0.999 * wave)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack([wave, other], axis=1), 16000)
        load_audio(tmp_path / f"{name}.wav", start=0.1, duration=0.5)
        load_audio(tmp_path / f"{name}.wav")
    (record,) = caplog.records
    assert "inverted.wav: the channels cancel each other" in record.message


def test_16_bit_integers_in_32_bits(tmp_path, caplog):
    """Written as int32 without a factor they are 65536 times too quiet; a faint recording of 24 bits is what it is."""
    wave = (12000 * np.sin(np.arange(32000) ** 1.2)).astype(np.int32)
    for name, samples in (
        ("right", wave << 16),
        ("mistaken", wave),
        ("24", (wave >> 8) << 8),
        ("click", np.where(np.arange(32000) == 9, 1, 0).astype(np.int32)),
    ):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype="PCM_32")
        load_audio(tmp_path / f"{name}.wav", start=0.1, duration=0.5)
    soundfile.write(tmp_path / "float.wav", (wave * 2.0**-31).astype(np.float32), 16000, subtype="FLOAT")
    faint = load_audio(tmp_path / "float.wav")
    assert np.array_equal(load_audio(tmp_path / "mistaken.wav"), faint)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = wave[None]
        file.attrs["sample_rate"] = 16000
    assert np.array_equal(load_audio(f"{tmp_path}/x.h5::0"), faint)
    assert [record.message.split(": ")[0].rsplit("/")[-1] for record in caplog.records] == ["mistaken.wav", "x.h5::0"]
    assert "32-bit samples up to 11999, where full scale is 2147483648: 16-bit integers" in caplog.text


def test_integers_with_eight_bits_less_than_their_file(tmp_path, caplog, monkeypatch):
    """24 bits within 32, and 16 within 24; a quiet passage, or a recorder's zeros behind its 24 bits, are none."""
    for name in ("_faint", "_looked_at"):  # earlier tests may have used up what a process says
        monkeypatch.setattr(mistaken, name, set())
    wave = 2.0**23 * 0.7 * np.sin(np.arange(32000) ** 1.2)
    of_24, of_16 = wave.astype(np.int32), (wave / 256).astype(np.int32)
    passage = np.concatenate([of_24, 100 * of_24])
    for name, samples, subtype in (
        ("right 24", of_24 << 8, "PCM_24"),  # soundfile takes the upper bits
        ("right 32", of_24 << 8, "PCM_32"),
        ("quiet 32", (of_24 >> 8) << 8, "PCM_32"),
        ("passage 32", passage, "PCM_32"),
        ("passage 24", passage, "PCM_24"),
        ("quiet 24", of_24 >> 4, "PCM_24"),
        ("a 24 in 32", of_24, "PCM_32"),
        ("b 16 in 24", of_16 << 8, "PCM_24"),
    ):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000, subtype=subtype)
        soundfile.write(tmp_path / f"{name}.flac", samples, 16000, subtype="PCM_24") if subtype == "PCM_24" else None
    for path in sorted(tmp_path.iterdir()):
        for _ in range(2):
            load_audio(path, start=0.1, duration=0.5)
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["waveform"] = np.stack([np.pad(of_24, (0, 32000)), passage])
        file.attrs["sample_rate"] = 16000
    found = [load_audio(f"{tmp_path}/x.h5::{row}", duration=0.5) for row in range(2)]
    assert np.array_equal(found[0], load_audio(tmp_path / "a 24 in 32.wav", duration=0.5))
    assert len(mistaken._faint) == 4  # a look at a quiet passage leaves others their warning
    told = [record.message.split(": ")[0].rsplit("/")[-1] for record in caplog.records]
    assert told == ["a 24 in 32.wav", "b 16 in 24.flac", "b 16 in 24.wav", "x.h5::0"]
    first, second = (record.message.split(": ", 1)[1] for record in caplog.records[:2])
    assert first.startswith(
        "32-bit samples up to 5872025, where full scale is 2147483648: 24-bit integers that were not"
    )
    assert second.startswith("24-bit samples up to 22937, where full scale is 8388608: 16-bit integers that were not")
    assert second.endswith("multiplied by 256? It is used as it is, 48 dB too quiet if they are")
