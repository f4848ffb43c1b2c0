"""Clips to features: layers joined after pooling, long clips encoded in small groups."""

import numpy as np
import pytest
import torch

from bestrq2.config import ConfigError
from bestrq2.data import AudioFile
from bestrq2.models.readout import combine_layers, pool_frames
from bestrq2.probing import ProbeTask, features
from bestrq2.probing.controls import LogMelEncoder
from bestrq2.probing.features import baseline_log_mel, extract, log_mel_frames, readings

SAMPLES = (900, 400, 1600, 300, 350, 200)


class Frames(torch.nn.Module):
    """Frames of 100 samples as features of three layers; keeps the shapes that it was given."""

    depth = 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def encode_layers(self, waveform, lengths, layers, rows="average"):
        self.seen.append(tuple(waveform.shape))
        frames = waveform.unfold(1, 100, 100)[..., :8]
        power = {0: 1, 1: 2, None: 3}
        return torch.stack([frames ** power[layer] for layer in layers]), lengths // 100


def clips():
    generator = np.random.default_rng(0)
    return [
        (AudioFile(f"{n}.wav"), generator.normal(size=samples).astype(np.float32)) for n, samples in enumerate(SAMPLES)
    ]


@pytest.mark.parametrize("pooling", ["mean", "mean+std", "max", None])
@pytest.mark.parametrize("combine", ["concatenate", "average", "each", "weighted"])
def test_layers_are_joined_as_in_encode(combine, pooling):
    wanted = readings("0,final", combine, 2)
    found = extract(
        clips(), {"x": Frames()}, sampling_rate=100, hop=1.0, wanted=wanted, pooling=pooling, with_log_mel=False
    )
    for reading in wanted:
        for (_, waveform), got in zip(clips(), found.of[f"x{reading.end}"]):
            layers = Frames().encode_layers(
                torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]), reading.layers
            )
            if combine == "weighted" and pooling is not None:  # blocks, each with all its statistics
                expected = torch.cat([pool_frames(layer, layers[1], pooling)[0] for layer in layers[0]])
            else:
                joined = combine_layers(layers[0], reading.combine)
                joined = joined if len(reading.layers) > 1 else joined.reshape(joined.shape[-3:])
                expected = joined[0] if pooling is None else pool_frames(joined, layers[1], pooling)[0]
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-6)


def test_long_clips_are_not_padded_together(monkeypatch):
    monkeypatch.setattr(features, "SECONDS_AT_ONCE", 10.0)  # 1000 samples
    encoder = Frames()
    found = extract(clips(), {"x": encoder}, sampling_rate=100, hop=1.0, pooling="mean")
    assert encoder.seen == [(1, 900), (1, 400), (1, 1600), (2, 350), (1, 200)]
    assert found.usable == list(range(len(SAMPLES)))
    monkeypatch.setattr(features, "SECONDS_AT_ONCE", 1e9)
    whole = extract(clips(), {"x": Frames()}, sampling_rate=100, hop=1.0, pooling="mean")
    np.testing.assert_allclose(np.stack(found.of["x"]), np.stack(whole.of["x"]), rtol=1e-6)


class Tenths(torch.nn.Module):
    """Frames of 0.1 s."""

    def encode(self, waveform, lengths):
        frames = lengths // 2205
        return torch.zeros(len(waveform), int(frames.max()), 1), frames


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_the_log_mel_baseline_hears_everything(rate):
    """Its window had 400 samples at every rate: at 48 kHz there was nothing between the frames."""
    log_mel = baseline_log_mel(rate)
    assert log_mel.win_length == pytest.approx(0.025 * rate, abs=1)
    for place in range(2 * log_mel.hop_length, 4 * log_mel.hop_length, log_mel.hop_length // 16):
        click = np.zeros(6 * log_mel.hop_length, np.float32)
        click[place : place + 4] = 1
        assert log_mel_frames(click, log_mel)[:, :64].max() > -40


def test_the_log_mel_baseline_keeps_time():
    """At 22050 Hz its frames are not quite 10 ms apart: taken for that, a sound at 50 s came 0.11 s late."""
    waveform = np.zeros(55 * 22050, np.float32)
    waveform[50 * 22050 : 51 * 22050] = np.sin(np.arange(22050))
    clips = [(AudioFile("x.wav"), waveform)]
    found = extract(clips, {"x": Tenths()}, sampling_rate=22050, hop=0.1, pooling=None)
    loud = found.of["log-mel statistics"][0][:, :64].max(1) > -20
    assert np.flatnonzero(loud).tolist() == list(range(500, 510))
    assert LogMelEncoder(22050).hop_size_in_ms == pytest.approx(1000 * 220 / 22050)


def test_values_of_both_sides_of_a_split():
    """They trained, and were missing among the test clips."""
    with pytest.raises(ConfigError, match=r"train_values: expected other values than those of the test side"):
        ProbeTask(label="x", split="part", train_values=("train", "dev"), test_values=("dev", "test"))
