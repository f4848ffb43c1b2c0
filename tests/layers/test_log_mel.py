"""LogMel against an independent NumPy computation and torchaudio, and its blindness to padding."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bestrq2.data import load_audio, tiny_dataset
from bestrq2.layers.log_mel import LogMel, reflect_edges

PUBLISHED = {"n_fft": 2048, "win_length": 2048, "hop_length": 625, "num_mels": 128}
STRIPS = {"n_fft": 1024, "win_length": 400, "hop_length": 160, "num_mels": 80}


@pytest.fixture(scope="module")
def clips():
    return [torch.from_numpy(load_audio(file.path)) for file in tiny_dataset()[::3]]


def numpy_filters(n_fft: int, num_mels: int) -> np.ndarray:
    """Triangular filters on the HTK mel scale from 0 to 8000 Hz, in float64: ``(bins, num_mels)``."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 8000 / 700), num_mels + 2) / 2595) - 1)
    bins = np.arange(n_fft // 2 + 1) * 16000 / n_fft
    bands = zip(edges, edges[1:], edges[2:])
    return np.stack([np.interp(bins, band, [0, 1, 0], left=0, right=0) for band in bands], axis=1)


def numpy_log_mel(signal: np.ndarray, filters: np.ndarray, n_fft: int, win_length: int, hop_length: int) -> np.ndarray:
    """Frame by frame in float64, from the formulas alone."""
    window = np.zeros(n_fft)
    left = (n_fft - win_length) // 2
    window[left : left + win_length] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win_length) / win_length)
    padded = np.pad(signal.astype(np.float64), n_fft // 2, mode="reflect")
    frames = []
    for start in range(0, len(signal) + 1, hop_length):
        power = np.abs(np.fft.rfft(padded[start : start + n_fft] * window)) ** 2 / (window**2).sum()
        frames.append(10 * np.log10(np.maximum(1e-10, power @ filters)))
    return np.array(frames)


@pytest.mark.parametrize("settings", [PUBLISHED, STRIPS], ids=["published", "strips"])
def test_matches_numpy(clips, settings):
    log_mel = LogMel(**settings)
    transform = {name: settings[name] for name in ("n_fft", "win_length", "hop_length")}
    exact = numpy_filters(settings["n_fft"], settings["num_mels"])
    np.testing.assert_allclose(log_mel.filters.numpy(), exact, rtol=0, atol=1e-4)
    for clip in clips:
        frames, lengths = log_mel(clip[None])
        expected = numpy_log_mel(clip.numpy(), log_mel.filters.numpy(), **transform)
        assert frames.shape[1:] == expected.shape
        assert int(lengths) == expected.shape[0]
        np.testing.assert_allclose(frames[0].numpy(), expected, rtol=0, atol=2e-5)
        # The published transform rounds its filter edges to fp32; exact edges move a value by at most 0.002 dB.
        np.testing.assert_allclose(
            frames[0].numpy(), numpy_log_mel(clip.numpy(), exact, **transform), rtol=0, atol=3e-3
        )


def test_matches_torchaudio(clips):
    try:
        transforms = pytest.importorskip("torchaudio").transforms
    except OSError as error:  # built for another torch
        pytest.skip(f"torchaudio does not load: {error}")
    mel = transforms.MelSpectrogram(
        16000, n_fft=2048, win_length=2048, hop_length=625, n_mels=128, normalized=True
    ).double()
    # Its window is computed in fp32: 2e-7 of a loud band beside one at -98 dB moves that by 0.03 dB.
    mel.spectrogram.window = torch.hann_window(2048, dtype=torch.float64)
    decibels = transforms.AmplitudeToDB()
    for clip in clips:
        expected = decibels(mel(clip.double())).T
        frames, _ = LogMel(**PUBLISHED)(clip[None])
        torch.testing.assert_close(frames[0].double(), expected, atol=1e-4, rtol=0)


def test_constant_of_window_normalisation():
    # The window's energy is 768 for 2048 Hann samples: without the division all values would be 28.9 dB higher.
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(32000) / 16000)[None]
    frames, _ = LogMel(**PUBLISHED)(tone)
    # A sine of amplitude 1 at a bin centre: |X|^2 = (sum(w) / 2)^2 = 512^2, over 768, times the filter's weight there.
    assert frames[0, 10].max().item() == pytest.approx(10 * math.log10(512**2 / 768), abs=1.5)


def test_same_alone_and_in_any_batch(clips):
    log_mel = LogMel(**STRIPS)
    parts = [clips[0], clips[1][:7001], clips[2][:3], clips[3][:1], clips[4][:20000], clips[5][:641]]
    lengths = torch.tensor([len(part) for part in parts])
    waveform = torch.full((len(parts), 40000), 0.7)  # what lies behind a clip's end must not matter
    for row, part in enumerate(parts):
        waveform[row, : len(part)] = part
    frames, frame_lengths = log_mel(waveform, lengths)
    for row, part in enumerate(parts):
        alone, alone_length = log_mel(part[None])
        count = int(frame_lengths[row])
        assert count == int(alone_length) == 1 + len(part) // 160
        assert torch.equal(frames[row, :count], alone[0])
        assert not frames[row, count:].any()


@pytest.mark.parametrize("n_fft", [401, 405])
@pytest.mark.parametrize("samples", [1600, 1599, 160, 159, 1])
def test_an_odd_transform_has_every_frame(n_fft, samples):
    """The last one of a clip of whole hops needs one reflected sample more behind the end than before the beginning."""
    log_mel = LogMel(n_fft=n_fft, win_length=400, hop_length=160, num_mels=20)
    waveform = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    alone, counts = log_mel(waveform[:1, :samples])
    assert alone.shape[1] == int(counts[0]) == 1 + samples // 160
    together, _ = log_mel(waveform, torch.tensor([samples, 1600]))
    assert torch.equal(together[0, : alone.shape[1]], alone[0])


def test_reflection_equals_numpy():
    signal = torch.arange(1, 8).float()
    for length in (1, 2, 3, 7):
        expected = np.pad(signal[:length].numpy(), 5, mode="reflect")
        padded = reflect_edges(signal[None], torch.tensor([length]), 5)
        np.testing.assert_array_equal(padded[0, : length + 10], expected)
        assert not padded[0, length + 10 :].any()


def test_standardises(clips):
    plain, _ = LogMel(**STRIPS)(clips[0][None])
    scaled, _ = LogMel(**STRIPS, mean=-40.0, std=12.0)(clips[0][None])
    torch.testing.assert_close(scaled, (plain + 40) / 12)


@pytest.mark.parametrize("scale", [{}, {"mean": -70.0, "std": 12.0}])
def test_floor_lifts_quiet_cells_alone(clips, scale):
    clip = clips[0][None]
    waveform = torch.cat((torch.nn.functional.pad(clip, (0, 4000)), torch.nn.functional.pad(0.5 * clip, (0, 4000))))
    lengths = torch.tensor([clip.shape[1], clip.shape[1] + 4000])
    plain, _ = LogMel(**STRIPS)(waveform, lengths)
    raised = LogMel(**STRIPS, floor_db=-60.0, **scale)
    expected = (plain.clamp(min=-60.0) - scale.get("mean", 0.0)) / scale.get("std", 1.0)
    counts = raised(waveform, lengths)[1]
    expected[0, counts[0] :] = 0  # behind the end of a clip, whatever the floor
    assert (plain < -60).any()
    assert (plain > -60).any()
    for transform in (raised, raised.reference):
        torch.testing.assert_close(transform(waveform, lengths)[0], expected)
    with pytest.raises(ValueError, match="floor_db"):
        LogMel(floor_db=-120.0)


def test_precision_survives_casts(clips):
    plain, _ = LogMel(**STRIPS)(clips[0][None])
    log_mel = LogMel(**STRIPS).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = log_mel(clips[0][None])
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


def test_rejects_bad_input():
    log_mel = LogMel(**STRIPS)
    with pytest.raises(ValueError, match=r"waveform \(B, S\).*\(5,\)"):
        log_mel(torch.zeros(5))
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.10"):
        log_mel(torch.zeros(1, 10), torch.tensor([11]))
    for clips, told in ((1, "the clip is empty"), (2, "all 2 clips are empty")):
        with pytest.raises(ValueError, match=told):
            log_mel(torch.zeros(clips, 0))
    with pytest.raises(ValueError, match="f_max"):
        LogMel(f_max=9000)
    with pytest.raises(ValueError, match="win_length"):
        LogMel(n_fft=512, win_length=600)


def test_a_transform_begun_without_values_leaves_nothing_behind():
    settings = {"n_fft": 444, "win_length": 440, "hop_length": 160, "num_mels": 31}
    with FakeTensorMode(), contextlib.suppress(Exception):  # it looks at values, which are not there
        LogMel(**settings)
    log_mel = LogMel(**settings)
    assert type(log_mel.window) is type(log_mel.filters) is torch.Tensor
