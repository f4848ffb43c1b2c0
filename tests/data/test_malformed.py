"""Faulty files: an AudioError that names the fault, never another exception, never a sample that is not finite."""

import os
import pickle
import random
import struct

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioError, audio_info, load_audio
from bestrq2.data.audio import audio_digest
from bestrq2.errors import REASONS

from .conftest import FORMATS, convert


def _reason(call, *arguments, **options) -> str:
    with pytest.raises(AudioError) as caught:
        call(*arguments, **options)
    assert caught.value.reason in REASONS
    assert str(caught.value.path) in str(caught.value)
    return caught.value.reason


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(AudioError("a.wav", "truncated", "3 of 5 samples")))
    assert (error.path, error.reason, error.detail) == ("a.wav", "truncated", "3 of 5 samples")
    assert str(error) == "a.wav: truncated (3 of 5 samples)"
    with pytest.raises(ValueError, match="reason"):
        AudioError("a.wav", "bad luck")


def test_not_a_file(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "broken.wav").symlink_to(tmp_path / "nowhere.wav")
    (tmp_path / "zero.wav").touch()
    (tmp_path / "text.wav").write_text("This is not audio.\n" * 100)
    for call in (audio_info, load_audio, audio_digest):
        assert _reason(call, tmp_path / "absent.wav") == "missing"
        assert _reason(call, tmp_path / "broken.wav") == "missing"
        assert _reason(call, tmp_path / "folder.wav") == "not readable"
        assert _reason(call, tmp_path / "pipe.wav") == "not readable"
        assert _reason(call, tmp_path / "zero.wav") == "empty file"
        assert _reason(call, tmp_path / "text.wav") == "not decodable"


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_no_permission(tmp_path, write_wav):
    path = write_wav("x.wav", 1.0)
    path.chmod(0)
    assert _reason(load_audio, path) == "not readable"


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "opus", "mp3", "aiff"])
def test_random_bytes(tmp_path, extension):
    path = tmp_path / f"noise.{extension}"
    for size in (1, 10, 1000, 50000):
        path.write_bytes(random.Random(size).randbytes(size))
        assert _reason(load_audio, path) in ("not decodable", "no samples")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.zeros(0), 16000)
    for call in (audio_info, load_audio, audio_digest):
        assert _reason(call, tmp_path / "x.wav") == "no samples"


def test_beyond_the_end(write_wav):
    assert _reason(load_audio, write_wav("x.wav", 1.0), start=5.0, duration=1.0) == "no samples"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channels", [1, 2])
def test_not_finite(tmp_path, bad, channels):
    samples = np.zeros((20000, channels), np.float32)
    samples[5000:5007, -1] = bad
    soundfile.write(tmp_path / "x.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"not finite \(7 NaN or infinite of {20000 * channels} samples"):
        load_audio(tmp_path / "x.wav")
    assert load_audio(tmp_path / "x.wav", duration=0.25).shape == (4000,)  # the part before is sound


def test_out_of_range(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.array([0.1, 1e20, 0.1], np.float32), 16000, subtype="FLOAT")
    assert _reason(load_audio, tmp_path / "x.wav") == "out of range"


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_absurd_sampling_rate(tmp_path, write_wav, rate):
    path = write_wav("x.wav", 1.0)
    content = bytearray(path.read_bytes())
    content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content)
    assert _reason(load_audio, path) == "not decodable"


@pytest.mark.parametrize(("extension", "format", "subtype", "rate", "channels"), FORMATS)
def test_truncated(tmp_path, speech, extension, format, subtype, rate, channels):
    """Cut at many points: more than 1 % less than the header states is an error."""
    whole = convert(tmp_path / f"whole.{extension}", np.tile(speech, 3), rate, channels, format, subtype)
    content = whole.read_bytes()
    complete = load_audio(whole)
    cut = tmp_path / f"cut.{extension}"
    for keep in (0.001, 0.02, 0.1, 0.3, 0.5, 0.75, 0.9, 0.97):
        cut.write_bytes(content[: int(keep * len(content))])
        if format == "OGG" and keep <= 0.02:  # not even the headers and the first page
            assert _reason(load_audio, cut) in ("not decodable", "no samples")
        elif format == "OGG":  # states no length, but marks its last page
            assert {_reason(read, cut) for read in (audio_info, load_audio, audio_digest)} <= {
                "truncated",
                "not decodable",
            }
        elif keep <= 0.001:
            assert _reason(load_audio, cut) in ("truncated", "not decodable", "no samples")
        else:
            # a FLAC cut within its first frame decodes to nothing at all
            allowed = ("truncated", "not decodable") if format == "FLAC" and keep <= 0.02 else ("truncated",)
            assert _reason(load_audio, cut) in allowed
            assert _reason(audio_digest, cut) in allowed
            if format in ("WAV", "WAVEX", "RF64", "AIFF", "MP3"):
                assert _reason(audio_info, cut) == "truncated"  # already the header tells
    cut.write_bytes(content[: len(content) - 20])  # a few last bytes: less than 1 %, but a whole page of Ogg
    if format == "OGG":
        assert _reason(load_audio, cut) == "truncated"
        return
    assert len(load_audio(cut)) > 0.75 * len(complete)


@pytest.mark.parametrize("extension", ["flac", "mp3"])
def test_length_that_the_bytes_cannot_hold(tmp_path, speech, extension):
    """One damaged header must not make a file of four seconds count as hours of the training data."""
    path = tmp_path / f"x.{extension}"
    soundfile.write(path, speech, 16000)
    content = bytearray(path.read_bytes())
    at = 22 if extension == "flac" else max(content.find(b"Xing"), content.find(b"Info")) + 8
    content[at : at + 4] = (0x00FFFFFF).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"truncated \(\d+ bytes are not the \d+ s that the header promises"):
        audio_info(path)
    soundfile.write(path, np.zeros(16000 * 600), 16000)  # silence is small, and has its end
    assert audio_info(path).duration == pytest.approx(600, abs=0.2)


def test_report_of_an_odd_name_is_one_line():
    assert str(AudioError("a\nb\x1b[31m\udcff é.wav", "missing")) == "a\\nb\\x1b[31m\\xff é.wav: missing"


def test_part_before_the_cut_of_a_flac_is_usable(tmp_path, speech):
    path = convert(tmp_path / "x.flac", speech, 16000, 1, "FLAC", "PCM_16")
    complete = load_audio(path)
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    np.testing.assert_array_equal(load_audio(path, start=0.5, duration=1.0), complete[8000:24000])
    assert _reason(load_audio, path, start=3.5, duration=0.5) in ("truncated", "not decodable")


def _damage(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """One of six kinds of damage: cut, flipped bytes, a damaged header, a hole, an insertion, another file's tail."""
    data = bytearray(content)
    kind = chance.randrange(6)
    if kind == 0:
        return bytes(data[: chance.randrange(len(data))])
    if kind == 1:
        for _ in range(chance.randrange(1, 50)):
            data[chance.randrange(len(data))] = chance.randrange(256)
    elif kind == 2:
        for _ in range(chance.randrange(1, 8)):
            data[chance.randrange(min(len(data), 200))] = chance.choice([0, 127, 128, 255, chance.randrange(256)])
    elif kind == 3:
        at = chance.randrange(len(data))
        del data[at : at + chance.randrange(1, 3000)]
    elif kind == 4:
        at = chance.randrange(len(data))
        data[at:at] = chance.randbytes(chance.randrange(1, 3000))
    else:
        at = chance.randrange(min(len(data), len(other)))
        return bytes(data[:at]) + other[at:]
    return bytes(data)


def test_damaged_files_give_samples_or_an_audio_error(tmp_path, speech):
    """900 damaged files of 15 formats, three calls each. A failure leaves the file in its temporary folder."""
    chance = random.Random(0)
    sources = []
    for number, parameters in enumerate(FORMATS):
        extension, format, subtype, rate, channels = parameters.values
        path = convert(tmp_path / f"{number}.{extension}", speech[:20000], rate, channels, format, subtype)
        sources.append((path.suffix, path.read_bytes()))
    outcomes: dict[str, int] = {}
    for number in range(900):
        suffix, content = sources[number % len(sources)]
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(_damage(content, chance.choice(sources)[1], chance))
        for options in (None, {}, {"start": 0.7, "duration": 0.5}):
            try:
                if options is None:
                    assert audio_info(path).num_samples > 0
                    outcome = "info"
                else:
                    waveform = load_audio(path, **options)
                    assert waveform.dtype == np.float32
                    assert waveform.size > 0
                    assert np.isfinite(waveform).all()
                    assert "duration" not in options or waveform.size <= 8000
                    outcome = "samples"
            except AudioError as error:
                outcome = error.reason
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)
    # The damage is neither harmless nor total.
    assert outcomes["samples"] > 300
    assert outcomes["truncated"] > 100
    assert outcomes["not decodable"] > 100
