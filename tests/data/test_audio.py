"""Decoding: every format and rate gives the same sound, a part equals that part of the whole, info tells the truth."""

import os
import sys

import numpy as np
import pytest
import soundfile

from bestrq2.data import AudioError, audio, audio_info, load_audio, tiny_dataset
from bestrq2.errors import printable

from .conftest import FORMATS, convert, on_disk


def _relative(value: np.ndarray, gold: np.ndarray) -> float:
    return float(np.linalg.norm(value - gold) / np.linalg.norm(gold))


def test_packaged_clips():
    files = tiny_dataset()
    assert len(files) == 24
    assert {domain: sum(item.domain == domain for item in files) for domain in ("speech", "music", "env")} == {
        "speech": 8,
        "music": 8,
        "env": 8,
    }
    for item in files:
        waveform = load_audio(item.path)
        assert waveform.shape == (32000,)
        assert waveform.dtype == np.float32
        assert 0.01 < np.abs(waveform).max() <= 1.5
        info = audio_info(item.path)
        assert (info.sampling_rate, info.num_samples, info.channels) == (16000, 32000, 1)
        assert info.duration == item.duration


@pytest.mark.parametrize(("extension", "format", "subtype", "rate", "channels"), FORMATS)
def test_every_format_gives_the_same_sound(tmp_path, speech, extension, format, subtype, rate, channels):
    path = convert(tmp_path / f"clip.{extension}", speech, rate, channels, format, subtype)
    info = audio_info(path)
    assert (info.sampling_rate, info.channels) == (rate, channels)
    waveform = load_audio(path, 16000)
    assert waveform.dtype == np.float32
    assert waveform.flags.c_contiguous
    assert abs(len(waveform) - len(speech)) <= 0.06 * 16000  # encoders pad to whole blocks
    common = min(len(waveform), len(speech))
    shifts = range(-20, 21)
    inside, gold = slice(2000, common - 2000), speech[:common]
    errors = [_relative(waveform[inside], np.roll(gold, shift)[inside]) for shift in shifts]
    # lossless formats: what 16 -> rate -> 16 kHz keeps; 8 kHz loses half of the band; codecs lose what is not heard
    if rate == 8000 or rate == 11025:
        bound = 0.5
    elif subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III", "MS_ADPCM"):
        bound = 0.3
    else:
        bound = 0.03
    print(f"error {errors[20]:.4f}, bound {bound}, error one sample off {min(errors[19], errors[21]):.4f}")
    assert errors[20] < bound
    assert np.argmin(errors) == 20, "the sound is shifted"


def test_integer_scaling(tmp_path):
    """Integer formats are divided by their full scale and channels averaged, with nothing normalised or clipped."""
    for subtype, dtype, full in (("PCM_16", np.int16, 2**15), ("PCM_32", np.int32, 2**31)):
        values = np.array([[full - 1, 0], [-full, -full], [full // 2, -full // 2], [1, 2]], dtype)
        soundfile.write(tmp_path / "x.wav", values, 16000, subtype=subtype)
        expected = (values.astype(np.float64) / full).mean(axis=1).astype(np.float32)
        np.testing.assert_array_equal(load_audio(tmp_path / "x.wav"), expected)
    loud = np.array([3.5, -7.25, 0.5], np.float32)
    soundfile.write(tmp_path / "loud.wav", loud, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "loud.wav"), loud)


@pytest.mark.parametrize(("extension", "format", "subtype", "rate", "channels"), FORMATS)
@pytest.mark.parametrize("target", [16000, 24000])
def test_a_part_equals_that_part_of_the_whole(tmp_path, speech, extension, format, subtype, rate, channels, target):
    path = convert(tmp_path / f"clip.{extension}", speech, rate, channels, format, subtype)
    whole = load_audio(path, target)
    for first, count in ((0, 1600), (1, 1), (777, 5000), (12345, 16000), (len(whole) - 4000, 4000), (30001, 7)):
        part = load_audio(path, target, start=first / target, duration=count / target)
        assert part.shape == (count,)
        np.testing.assert_allclose(part, whole[first : first + count], rtol=0, atol=1e-6)
    # across the end: what is there
    part = load_audio(path, target, start=(len(whole) - 100) / target, duration=1.0)
    np.testing.assert_allclose(part, whole[-100:], rtol=0, atol=1e-6)


def test_the_margin_of_a_part_matters(tmp_path, speech, monkeypatch):
    path = convert(tmp_path / "clip.flac", speech, 48000, 2, "FLAC", "PCM_16")
    whole = load_audio(path)
    monkeypatch.setattr(audio, "_MARGIN", 0)
    part = load_audio(path, start=0.77, duration=0.5)
    assert np.abs(part - whole[12320:20320]).max() > 1e-4


@pytest.mark.parametrize(
    ("extension", "format", "subtype"),
    [("mp3", "MP3", "MPEG_LAYER_III"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS")],
)
def test_lossy_files_are_entered_by_seeking_far_in(tmp_path, speech, monkeypatch, capfd, extension, format, subtype):
    """Beyond the exact part a lossy crop may land a few milliseconds off, and the MP3 decoder must stay quiet."""
    rate = 48000
    path = convert(tmp_path / f"clip.{extension}", np.tile(speech, 5), rate, 2, format, subtype)
    whole = load_audio(path)
    monkeypatch.setattr(audio, "_EXACT_SECONDS", 2.0)
    decoded = []
    blocks = audio._blocks
    monkeypatch.setattr(audio, "_blocks", lambda f, p, n, *at: decoded.append(n) or blocks(f, p, n, *at))
    capfd.readouterr()
    for start in np.linspace(4.0, 18.0, 15):
        part = load_audio(path, start=start, duration=1.0)
        assert part.shape == (16000,)
        first = round(start * 16000)
        near = [
            _relative(part[::7], whole[first + shift : first + shift + 16000][::7])
            for shift in range(-400, 401)
            if first + shift + 16000 <= len(whole)
        ]
        assert min(near) < 0.02
    assert capfd.readouterr().err == ""
    assert max(decoded) < 3.5 * rate, "decoded from the beginning"


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_of_an_mp3_have_no_seams(tmp_path, monkeypatch, capfd, mode, channels):
    """Decoded in many blocks, in one, and from the middle on: the same samples."""
    rate, path = 48000, tmp_path / "clip.mp3"
    level = np.repeat(np.random.default_rng(1).uniform(0.01, 0.3, 60), rate // 10)[:, None]
    samples = level * np.random.default_rng(0).normal(size=(len(level), channels))
    try:
        file = soundfile.SoundFile(path, "w", rate, channels, format="MP3", compression_level=0.5, bitrate_mode=mode)
    except TypeError:
        pytest.skip("soundfile before 0.13")
    with file:
        for start in range(0, len(samples), 4096):
            file.write(samples[start : start + 4096])
    once = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)
    for block in (1000, 20000, 1 << 20):
        monkeypatch.setattr(audio, "_BLOCK", block)
        np.testing.assert_allclose(load_audio(path, rate), once, rtol=0, atol=1e-6)
        monkeypatch.setattr(audio, "_EXACT_SECONDS", 2.0)
        for start in (1.0, 2.5, 4.123):
            part, first = load_audio(path, rate, start=start, duration=1.5), round(start * rate)
            np.testing.assert_allclose(part, once[first : first + 72000], rtol=0, atol=1e-6)
    assert capfd.readouterr().err == ""


def test_stream_of_unstated_length(tmp_path, speech):
    """A FLAC written to a pipe has no length in its header; everything in it is read nevertheless."""
    path = convert(tmp_path / "clip.flac", speech, 16000, 1, "FLAC", "PCM_16")
    expected = load_audio(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of total samples in STREAMINFO
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert audio_info(path).num_samples == len(speech)
    np.testing.assert_array_equal(load_audio(path), expected)
    np.testing.assert_array_equal(load_audio(path, start=1.0, duration=0.5), expected[16000:24000])


@pytest.mark.parametrize("stated", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000])
def test_wav_written_to_a_pipe(tmp_path, speech, stated):
    """Programs that cannot seek back leave a placeholder as the size: that is no promise to break."""
    path = convert(tmp_path / "clip.wav", speech, 16000)
    expected = load_audio(path)
    content = bytearray(path.read_bytes())
    at = content.find(b"data") + 4
    content[at : at + 4] = stated.to_bytes(4, "little")
    path.write_bytes(content)
    np.testing.assert_array_equal(load_audio(path), expected)


def test_unusual_names(tmp_path, speech):
    for name in ("with space.wav", "Übung 音声 🎵.wav", "new\nline.wav", "-dash.wav", "UPPER.WAV", "a'b\"c.wav"):
        path = convert(tmp_path / on_disk(name), speech, 16000)
        assert len(load_audio(path)) == len(load_audio(str(path))) == len(speech)
    not_utf8 = os.fsdecode(os.fsencode(path.parent) + b"/latin-\xe9.wav")
    path.rename(not_utf8)
    assert len(load_audio(not_utf8)) == len(speech)
    os.truncate(not_utf8, 0)
    with pytest.raises(AudioError) as caught:
        load_audio(not_utf8)
    shown = r"latin-\xe9.wav" if sys.getfilesystemencoding() == "utf-8" else printable(os.path.basename(not_utf8))
    assert str(caught.value).endswith(f"{shown}: empty file")


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_very_short_clips(tmp_path, count, rate):
    soundfile.write(tmp_path / "x.wav", np.full(count, 0.25, np.float32), rate, subtype="FLOAT")
    if round(count * 16000 / rate) == 0:
        with pytest.raises(AudioError, match="no samples"):
            load_audio(tmp_path / "x.wav")
        return
    waveform = load_audio(tmp_path / "x.wav")
    assert abs(len(waveform) - count * 16000 / rate) <= 1
    assert np.isfinite(waveform).all()


def test_rejects_bad_arguments(tmp_path):
    for arguments in ({"sampling_rate": 0}, {"start": -1.0}, {"start": float("nan")}, {"duration": 0.0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            load_audio(tmp_path / "x.wav", **arguments)
