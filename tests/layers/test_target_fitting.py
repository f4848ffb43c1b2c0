"""Fitted targets: principal axes, centroids, their determinism, and what fitting does to code usage on real audio."""

import warnings

import pytest
import torch
from torch.nn.functional import normalize

from bestrq2.data import load_audio, tiny_dataset
from bestrq2.layers import LogMel, RandomProjectionQuantizer, extract_patches
from bestrq2.layers.target_fitting import code_entropy, fit_axes, move_to_centroids


@pytest.fixture(scope="module")
def patches():
    """Strips of the packaged clips, ``(1, N, 160)``."""
    log_mel = LogMel(n_fft=512, win_length=400, hop_length=160, num_mels=40)
    parts = []
    for file in tiny_dataset():
        waveform = torch.from_numpy(load_audio(file.path))[None]
        parts.append(extract_patches(*log_mel(waveform), 40, 4).values[0])
    return torch.cat(parts)[None]


def fitted(patches, **options):
    quantizer = RandomProjectionQuantizer(160, 64, 8, normalize="patch", **options)
    quantizer.fit(quantizer.normalise(patches)[0])
    return quantizer


def test_axes_are_the_principal_ones():
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    sample = (torch.randn(20000, 6) * torch.tensor([5.0, 3.0, 2.0, 0.5, 0.2, 0.1])) @ turn + 7
    mean, axes = fit_axes(sample, 3, whiten=0)
    torch.testing.assert_close(mean, sample.mean(0), atol=1e-4, rtol=0)
    assert ((axes.T @ turn.T[:, :3]).abs().diagonal() > 0.999).all()
    torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-5, rtol=0)
    whitened = (sample - mean) @ fit_axes(sample, 3, whiten=3)[1]
    torch.testing.assert_close(whitened.T @ whitened / len(sample), torch.eye(3), atol=1e-4, rtol=0)
    mixed = (sample - mean) @ fit_axes(sample, 3, whiten=0, rotation_seed=1)[1]
    assert float(mixed.var(0).max() / mixed.var(0).min()) < 25 / 4 * 0.9  # no axis carries what the first did
    torch.testing.assert_close(mixed.var(0).sum(), ((sample - mean) @ axes).var(0).sum(), rtol=1e-4, atol=0)


def test_the_sign_and_the_number_of_directions_are_checked():
    sample = torch.randn(100, 4) * torch.tensor([3.0, 2.0, 1.0, 1.0])
    first, second = fit_axes(sample, 2, 0)[1], fit_axes(sample + 1, 2, 0)[1]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    flat = sample.clone()
    flat[:, 2:] = 1.0
    with pytest.raises(ValueError, match="varies along 3 axes, got one that varies along 2"):
        fit_axes(flat, 3, whiten=3)
    with pytest.raises(ValueError, match="more than 4 patches"):
        fit_axes(sample[:4], 4, whiten=4)


def test_centroids_find_clusters_and_revive_dead_codes():
    torch.manual_seed(1)
    centres = normalize(torch.randn(12, 5), dim=-1)
    vectors = (centres[torch.arange(2400) % 12] + 0.02 * torch.randn(2400, 5)) * torch.rand(2400, 1).add(0.1)
    # Every code begins beside one cluster: without revival, at most one would win everything.
    start = normalize(centres[:1] + 0.3 * torch.randn(24, 5), dim=-1)
    codes = move_to_centroids(vectors, start, steps=8, seed=0)
    assert float((centres @ codes.T).max(1).values.min()) > 0.99
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(24))
    assert torch.equal(codes, move_to_centroids(vectors, start, steps=8, seed=0))


def test_fitted_codes_are_the_nearest_code_of_the_centred_projection(patches):
    quantizer = fitted(patches, projection="whitened_pca", centroid_steps=3, num_codebooks=2)
    values = torch.nn.functional.layer_norm(patches.double(), (160,)) - quantizer.center.double()
    projected = values @ quantizer.projection.double()[:, None]
    scores = torch.einsum("gbnd,gvd->bngv", projected, quantizer.codebook.double())
    best = scores.topk(2).values
    clear = best[..., 0] - best[..., 1] > 1e-4 * projected.norm(dim=-1).permute(1, 2, 0)
    codes = quantizer(patches)
    assert clear.float().mean() > 0.99
    assert torch.equal(codes[clear], scores.argmax(-1)[clear])


def test_some_codebooks_take_plain_axes(patches):
    """The books of ``plain_codebooks`` are those of "pca", the others those of "whitened_pca"."""
    options = {"centroid_steps": 2, "num_codebooks": 3}
    plain, white = (fitted(patches, projection=kind, **options) for kind in ("pca", "whitened_pca"))
    both = fitted(patches, projection="whitened_pca", plain_codebooks=2, **options)
    for name in ("projection", "codebook"):
        assert torch.equal(getattr(both, name), torch.cat((getattr(plain, name)[:2], getattr(white, name)[2:])))
    assert not torch.equal(plain.projection[2], white.projection[2])
    assert "whitened_pca (2 plain) projection" in repr(both)


def test_fitting_uses_codes_more_evenly(patches):
    entropy = {}
    for name, options in {
        "random": {},
        "centroids": {"centroid_steps": 5},
        "whitened": {"projection": "whitened_pca"},
        "both": {"projection": "whitened_pca", "centroid_steps": 5},
    }.items():
        entropy[name] = code_entropy(fitted(patches, **options)(patches)[0], 64)
    assert entropy["centroids"] > entropy["random"] + 0.3
    assert entropy["whitened"] > entropy["random"] + 0.3
    assert entropy["both"] > max(5.2, entropy["random"] + 0.6)  # of 6 bits


@pytest.mark.parametrize("normalize", ["none", "global", "patch", "utterance"])
def test_codes_of_a_clip_do_not_depend_on_its_batch(patches, normalize):
    quantizer = RandomProjectionQuantizer(
        160, 64, 8, normalize=normalize, projection="pca", centroid_steps=2, mean=-50, std=20
    )
    quantizer.fit(quantizer.normalise(patches)[0])
    batch = torch.stack((patches[0, :90], patches[0, 90:180]))
    batch[1, 30:] = 0
    lengths = torch.tensor([90, 30])
    codes = quantizer(batch, lengths)
    rows = torch.tensor([[3, 29], [0, 17]])
    assert torch.equal(quantizer(batch, lengths, rows), codes.gather(1, rows[..., None]))
    assert torch.equal(codes[1, :30], quantizer(batch[1:, :30], torch.tensor([30]))[0])


def test_fits_are_repeated_and_carried_by_the_state(patches):
    first = fitted(patches, projection="pca", centroid_steps=2, num_codebooks=2, seed=4)
    second = fitted(patches, projection="pca", centroid_steps=2, num_codebooks=2, seed=4)
    other = RandomProjectionQuantizer(160, 64, 8, 2, "patch", 9, projection="pca", centroid_steps=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(other(patches), first(patches))
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(patches), first(patches))
    assert list(first.parameters()) == []
    # Nothing new is stored where nothing is fitted but the codes: older checkpoints fit as they are.
    plain = {"projection", "codebook", "mean", "std"}
    assert set(RandomProjectionQuantizer(160).state_dict()) == plain
    assert set(first.state_dict()) == {*plain, "center"}


def test_random_targets_are_left_alone(patches):
    quantizer = RandomProjectionQuantizer(160, 64, 8, normalize="patch")
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.fit(patches[0])
    assert not quantizer.needs_fit
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


def test_what_cannot_be_fitted_is_refused(patches):
    with pytest.raises(ValueError, match="projection must be one of random, pca, whitened_pca; got 'lda'"):
        RandomProjectionQuantizer(160, projection="lda")
    with pytest.raises(ValueError, match=r"at most patch_dim = 64 axes, got 8 \* 16"):
        RandomProjectionQuantizer(64, num_codebooks=8, projection="pca")
    with pytest.raises(ValueError, match="at most 1 with projection=whitened_pca and num_codebooks=2, got 2"):
        RandomProjectionQuantizer(160, num_codebooks=2, projection="whitened_pca", plain_codebooks=2)
    with pytest.raises(ValueError, match="at most 0 with projection=pca and num_codebooks=2, got 1"):
        RandomProjectionQuantizer(160, num_codebooks=2, projection="pca", plain_codebooks=1)
    with pytest.raises(ValueError, match="at least 400 patches, got 100"):
        RandomProjectionQuantizer(160, 200, centroid_steps=1).fit(patches[0, :100])
    with pytest.raises(ValueError, match=r"expected a sample \(S, 160\)"):
        RandomProjectionQuantizer(160, 10, centroid_steps=1).fit(patches)
    with pytest.raises(ValueError, match="centroid_steps must be at least 0"):
        RandomProjectionQuantizer(160, centroid_steps=-1)


def test_code_entropy_in_bits():
    assert code_entropy(torch.arange(16)[:, None], 32) == pytest.approx(4.0)
    codes = torch.stack((torch.zeros(16, dtype=torch.int64), torch.arange(16)), -1)
    assert code_entropy(codes, 16) == pytest.approx(2.0)  # the mean over codebooks


@pytest.mark.parametrize("options", [{"projection": "pca"}, {"projection": "whitened_pca"}, {"centroid_steps": 2}])
def test_targets_that_were_to_be_fitted_and_are_random_give_a_warning(patches, options):
    quantizer = RandomProjectionQuantizer(160, 64, 8, normalize="patch", **options)
    with pytest.warns(UserWarning, match=r"the targets are random: .* take effect in fit\(sample\) alone"):
        quantizer(patches)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(patches)  # once
        fitted(patches, **options)(patches)
        restored = RandomProjectionQuantizer(160, 64, 8, normalize="patch", **options)
        restored.load_state_dict(fitted(patches, **options).state_dict())
        restored(patches)
        RandomProjectionQuantizer(160, 64, 8, normalize="patch")(patches)
