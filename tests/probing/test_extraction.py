"""Clips to features: layers joined after pooling, long clips encoded in small groups."""

import numpy as np
import pytest
import torch

from bestrq2.data import AudioFile
from bestrq2.models.readout import combine_layers, pool_frames
from bestrq2.probing import features
from bestrq2.probing.features import extract, readings

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
