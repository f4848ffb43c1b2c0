"""ViTEncoder.encode: alone and in any batch, short and long clips, layers, the published fault."""

import pytest
import torch

from bestrq2.config import load_config
from bestrq2.layers.positions import published_short_clip_positions
from bestrq2.models import build_encoder

SMALL = ["model.encoder.width=32", "model.encoder.heads=2", "model.encoder.hidden=64", "model.encoder.depth=2"]


def encoder(recipe="best_rq2_1_base", window_seconds=1.0, **options):
    torch.manual_seed(1)
    config = load_config(recipe, [*SMALL, "model.front_end.mean=-40", "model.front_end.std=15"])
    return build_encoder(config.model, window_seconds, **options).eval()


@pytest.fixture(params=["best_rq2_base", "best_rq2_1_base"], ids=["grid", "strips"])
def any_encoder(request):
    return encoder(request.param, window_seconds=2.0)


@torch.no_grad()
def test_same_alone_and_in_a_batch(any_encoder):
    lengths = torch.tensor([96000, 70001, 32000, 31999, 20000, 800, 1])
    waveform = torch.randn(7, 96000) * 0.1
    features, counts = any_encoder.encode(waveform, lengths)
    assert features.dtype == torch.float32
    assert features.shape == (7, any_encoder.output_length(96000), any_encoder.output_dim)
    for row, length in enumerate(lengths.tolist()):
        alone, count = any_encoder.encode(waveform[row : row + 1, :length])
        assert int(count) == int(counts[row]) == any_encoder.output_length(length) >= 1
        torch.testing.assert_close(features[row, : int(count)], alone[0], atol=1e-5, rtol=1e-5)
        assert not features[row, int(count) :].any()


@torch.no_grad()
def test_hop_matches_duration(any_encoder):
    for samples in (48000, 100000, 161234):
        seconds = any_encoder.output_length(samples) * any_encoder.hop_size_in_ms / 1000
        assert abs(seconds - samples / any_encoder.sampling_rate) <= any_encoder.hop_size_in_ms / 1000


@torch.no_grad()
def test_long_clips_are_windows():
    model = encoder(window_seconds=1.0)
    waveform = torch.randn(1, 40000) * 0.1
    features, _ = model.encode(waveform)
    window, step = model.window_columns, model.samples_per_column
    first, _ = model.encode(waveform[:, : window * step])
    torch.testing.assert_close(features[:, :window], first, atol=1e-5, rtol=1e-5)
    total = features.shape[1]
    last, _ = model.encode(waveform[:, (total - window) * step :])  # the last window reaches back to be full
    tail = total - total // window * window
    torch.testing.assert_close(features[:, -tail:], last[:, -tail:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers():
    model = encoder()
    waveform = torch.randn(2, 12000)
    final, _ = model.encode(waveform)
    last, _ = model.encode(waveform, layer=1)
    normed = model.encoder.norm(last)  # strips: one row, so averaging over rows changes nothing
    torch.testing.assert_close(normed, final, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.encode(waveform, layer=0)[0], last)
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.1, got 2"):
        model.encode(waveform, layer=2)


@torch.no_grad()
def test_published_positions_differ_for_short_clips_only():
    # 16 columns make 10 s; weights are the same.
    right, wrong = encoder("best_rq2_base", 10.0), encoder("best_rq2_base", 10.0, published_positions=True)
    full, short = torch.randn(1, 160000) * 0.1, torch.randn(1, 48000) * 0.1
    torch.testing.assert_close(right.encode(full)[0], wrong.encode(full)[0])
    assert not torch.allclose(right.encode(short)[0], wrong.encode(short)[0], atol=1e-3)
    patches = right.patches(short)
    positions = published_short_clip_positions(patches.positions(), patches.columns)[None]
    expected = right.transform(right.embed(patches.values, positions), positions)
    expected = expected.unflatten(1, (patches.columns, 8)).mean(2)
    torch.testing.assert_close(wrong.encode(short)[0], expected)


@torch.no_grad()
def test_positions_matter():
    model = encoder()
    x = torch.randn(1, 6, 32)
    here = torch.tensor([[[0, t] for t in range(6)]])
    assert torch.allclose(
        model.transform(x, here), model.transform(x, here + torch.tensor([0, 9])), atol=1e-5
    )  # rope: distances only
    assert not torch.allclose(model.transform(x, here), model.transform(x, here.flip(1)), atol=1e-3)


def test_fine_tuning_gradients():
    model = encoder()
    features, _ = model.encode(torch.randn(1, 24000))
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_rejects_bad_input():
    model = encoder()
    with pytest.raises(ValueError, match=r"expected a floating waveform \(B, S\)"):
        model.encode(torch.zeros(100))
    with pytest.raises(ValueError, match="at least 480 samples"):
        model.patches(torch.zeros(1, 479))
    with pytest.raises(ValueError, match="one length per clip"):
        model.encode(torch.zeros(2, 1000), torch.tensor([1000]))
