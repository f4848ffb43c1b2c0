"""Real audio in every format: the packaged clips, converted through soxr and libsndfile."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from bestrq2.data import tiny_dataset

# extension, libsndfile format, subtype, sampling rate, channels
FORMATS = [
    pytest.param("wav", "WAV", "PCM_16", 16000, 1, id="wav-int16-16k-mono"),
    pytest.param("wav", "WAV", "PCM_U8", 8000, 2, id="wav-uint8-8k-stereo"),
    pytest.param("wav", "WAVEX", "PCM_24", 48000, 2, id="wav-int24-48k-stereo"),
    pytest.param("wav", "WAV", "FLOAT", 44100, 2, id="wav-float-44k-stereo"),
    pytest.param("wav", "RF64", "PCM_32", 22050, 1, id="wav-rf64-22k-mono"),
    pytest.param("wav", "WAV", "MS_ADPCM", 22050, 1, id="wav-adpcm-22k-mono"),
    pytest.param("flac", "FLAC", "PCM_16", 44100, 2, id="flac-int16-44k-stereo"),
    pytest.param("flac", "FLAC", "PCM_24", 96000, 1, id="flac-int24-96k-mono"),
    pytest.param("aiff", "AIFF", "PCM_16", 22050, 2, id="aiff-int16-22k-stereo"),
    pytest.param("aif", "AIFF", "FLOAT", 11025, 1, id="aif-float-11k-mono"),
    pytest.param("mp3", "MP3", "MPEG_LAYER_III", 44100, 2, id="mp3-44k-stereo"),
    pytest.param("mp3", "MP3", "MPEG_LAYER_III", 22050, 1, id="mp3-22k-mono"),
    pytest.param("ogg", "OGG", "VORBIS", 44100, 2, id="ogg-vorbis-44k-stereo"),
    pytest.param("ogg", "OGG", "VORBIS", 16000, 1, id="ogg-vorbis-16k-mono"),
    pytest.param("opus", "OGG", "OPUS", 48000, 2, id="opus-48k-stereo"),
]


def clip(name: str) -> np.ndarray:
    """(32000,) float32 at 16 kHz: the packaged clip whose file name contains ``name``."""
    (path,) = [item.path for item in tiny_dataset() if name in item.path]
    return soundfile.read(path, dtype="float32")[0]


def on_disk(name: str) -> str:
    """A name as this process sees it whose bytes on the disk are UTF-8, also in a locale that is not."""
    return os.fsdecode(name.encode())


def convert(
    path: Path, waveform: np.ndarray, rate: int, channels: int = 1, format: str = "WAV", subtype: str = "PCM_16"
) -> Path:
    """Write a 16 kHz waveform at another rate, its mono mix spread over the channels as 1 1/2 and 1/2."""
    samples = waveform if rate == 16000 else soxr.resample(waveform, 16000, rate)
    frames = samples[:, None] if channels == 1 else np.stack([1.5 * samples, 0.5 * samples], axis=1)
    with soundfile.SoundFile(os.fsencode(path), "w", rate, channels, format=format, subtype=subtype) as file:
        for start in range(0, len(frames), 16384):  # libsndfile's Vorbis encoder crashes on a long single write
            file.write(frames[start : start + 16384])
    return path


def encoded(seconds: float, number: int = 0, format: str = "FLAC") -> bytes:
    """The first seconds of a packaged clip as a file of its own."""
    buffer = io.BytesIO()
    waveform, rate = soundfile.read(tiny_dataset()[number].path, dtype="int16")
    soundfile.write(buffer, waveform[: round(seconds * rate)], rate, format=format)
    return buffer.getvalue()


@pytest.fixture
def damaged_copies(tmp_path: Path) -> Callable[[Path, int], Iterator[Path]]:
    """Copies of a file, each damaged in another way: cut, bytes changed, a part zeroed, a part gone."""

    def damage(path: Path, count: int) -> Iterator[Path]:
        whole, random = path.read_bytes(), np.random.default_rng(0)
        for number in range(count):
            content = bytearray(whole)
            start, length = random.integers(len(whole)), random.integers(1, 3000)
            if number % 4 == 0:
                del content[max(1, start) :]
            elif number % 4 == 1:
                for place in random.integers(len(whole), size=random.integers(1, 40)):
                    content[place] = random.integers(256)
            elif number % 4 == 2:
                content[start : start + length] = bytes(len(content[start : start + length]))
            else:
                del content[start : start + length]
            copy = tmp_path / f"damaged-{number}{path.suffix}"
            copy.write_bytes(content)
            yield copy
            copy.unlink()

    return damage


@pytest.fixture(scope="session")
def speech() -> np.ndarray:
    """(64000,) float32 at 16 kHz: two packaged clips of speech at an amplitude that stereo conversion cannot clip."""
    waveform = np.concatenate([clip("it_status"), clip("ru_status")])
    return (0.5 * waveform / np.abs(waveform).max()).astype(np.float32)


@pytest.fixture
def write_wav(tmp_path: Path, speech: np.ndarray) -> Callable[..., Path]:
    """Write ``seconds`` of real speech (repeated if longer than four) as int16 WAV at 16 kHz."""

    def write(name: str, seconds: float, gain: float = 1.0) -> Path:
        path = tmp_path / on_disk(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        count = round(seconds * 16000)
        return convert(path, gain * np.tile(speech, -(-count // len(speech)))[:count], 16000)

    return write


@pytest.fixture
def no_more_files(monkeypatch):
    """A call after which no file can be opened."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit():
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
