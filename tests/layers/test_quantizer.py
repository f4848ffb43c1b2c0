"""RandomProjectionQuantizer: frozen, seeded, independent of padding and precision; CodeUsage counts."""

import re

import pytest
import torch

from bestrq2.data import load_audio, tiny_dataset
from bestrq2.layers import CodeUsage, LogMel, RandomProjectionQuantizer, extract_patches


@pytest.fixture(scope="module")
def clips():
    return [torch.from_numpy(load_audio(file.path)) for file in tiny_dataset()]


def brute_force(quantizer, patches):
    y = patches.double() @ quantizer.projection.double()[:, None]  # (G, B, N, d)
    scores = torch.einsum("gbnd,gvd->bngv", y, quantizer.codebook.double())
    return scores.argmax(-1)


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_codes_are_the_nearest_code(num_codebooks):
    quantizer = RandomProjectionQuantizer(256, 700, 16, num_codebooks)
    patches = torch.randn(2, 30, 256)
    codes = quantizer(patches)
    assert codes.shape == (2, 30, num_codebooks)
    assert torch.equal(codes, brute_force(quantizer, patches))


@pytest.mark.parametrize("normalize", ["none", "global", "patch", "utterance"])
def test_codes_of_a_clip_are_bit_equal_alone_and_in_a_batch(clips, normalize):
    log_mel = LogMel(n_fft=1024, win_length=400, hop_length=160, num_mels=80)
    quantizer = RandomProjectionQuantizer(320, 2048, normalize=normalize, num_codebooks=2, mean=-50, std=15)
    parts = [clip[: 4000 + 997 * i] for i, clip in enumerate(clips)]
    lengths = torch.tensor([len(part) for part in parts])
    waveform = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    patches = extract_patches(*log_mel(waveform, lengths), 80, 4)
    codes = quantizer(patches.values, patches.lengths)
    for row, part in enumerate(parts):
        single = extract_patches(*log_mel(part[None]), 80, 4)
        alone = quantizer(single.values, single.lengths)
        assert torch.equal(codes[row, : int(patches.lengths[row])], alone[0]), f"clip {row}"


def test_rows_select_after_normalisation(clips):
    quantizer = RandomProjectionQuantizer(64, 500, normalize="utterance")
    patches, rows = torch.randn(3, 20, 64) * 5 + 2, torch.tensor([[1, 5, 19]] * 3)
    assert torch.equal(quantizer(patches, rows=rows), quantizer(patches)[:, [1, 5, 19]])


def test_own_seed_and_frozen():
    torch.manual_seed(1)
    first = RandomProjectionQuantizer(64, 100, seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    torch.rand(7)
    second = RandomProjectionQuantizer(64, 100, seed=5)
    assert torch.equal(first.projection, second.projection)
    assert torch.equal(first.codebook, second.codebook)
    assert not torch.equal(first.projection, RandomProjectionQuantizer(64, 100, seed=6).projection)
    assert list(first.parameters()) == []
    assert {"projection", "codebook"} <= set(first.state_dict())
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # building it left the global generator alone


def test_distributions():
    quantizer = RandomProjectionQuantizer(256, 8192)
    bound = (6 / (256 + 16)) ** 0.5
    assert quantizer.projection.abs().max() <= bound
    assert quantizer.projection.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(1, 8192), atol=1e-6, rtol=0)


def test_codes_survive_autocast_and_casts():
    quantizer = RandomProjectionQuantizer(256, 2048, normalize="patch")
    patches = torch.randn(4, 200, 256)
    codes = quantizer(patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(patches), codes)
    assert torch.equal(quantizer.to(torch.bfloat16)(patches), codes)


def test_rejects_bad_settings():
    with pytest.raises(ValueError, match="normalize must be one of"):
        RandomProjectionQuantizer(10, normalize="layer")
    with pytest.raises(ValueError, match="codebook_size must be at least 1, got 0"):
        RandomProjectionQuantizer(10, codebook_size=0)
    with pytest.raises(TypeError, match=r"codebook_size must be an integer, got 8192.0"):
        RandomProjectionQuantizer(10, codebook_size=8192.0)
    for seed in (2**64 - 1, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
            RandomProjectionQuantizer(10, codebook_size=4, num_codebooks=2, seed=seed)
    assert RandomProjectionQuantizer(10, codebook_size=4, num_codebooks=2, seed=2**64 - 2).seed == 2**64 - 2


def test_usage_equals_bincount():
    usage = CodeUsage(2, 50, decay=1.0)
    codes = torch.randint(0, 20, (4, 30, 2))
    valid = torch.rand(4, 30) < 0.7
    usage.update(codes, valid)
    expected = torch.bincount(codes[valid][:, 1], minlength=50).double()
    assert torch.equal(usage.counts[1], expected)
    share = usage.counts / usage.counts.sum(1, keepdim=True)
    metrics = usage.metrics()
    assert metrics["codes_used"] == (usage.counts > 0).sum(1).double().mean()
    assert metrics["unigram"] == pytest.approx(share.max(1).values.mean().item())
    entropy = -torch.xlogy(share, share).sum(1)
    assert metrics["perplexity"] == pytest.approx(entropy.exp().mean().item())
    assert [metrics["perplexity/0"], metrics["perplexity/1"]] == pytest.approx(entropy.exp().tolist())
    assert [metrics["codes_used/0"], metrics["codes_used/1"]] == (usage.counts > 0).sum(1).tolist()
    assert set(CodeUsage(1, 50).metrics()) == {"codes_used", "perplexity", "unigram"}


def test_raw_decibels_are_warned_about_and_normalised_patches_are_not(clips):
    log_mel = LogMel()
    waveform = torch.stack([clip[:32000] for clip in clips if len(clip) >= 32000])
    patches = extract_patches(*log_mel(waveform), 16, 16)
    advice = {}
    for normalize in ("none", "patch"):
        quantizer = RandomProjectionQuantizer(256, 8192, normalize=normalize, seed=21072023)
        usage = CodeUsage(1, 8192)
        usage.update(quantizer(patches.values))
        advice[normalize] = usage.advice()
    assert "normalize=patch" in (advice["none"] or "")
    assert advice["patch"] is None


@pytest.mark.parametrize(
    ("settings", "tried"),
    [
        ({}, ["normalize=patch", "normalize=global"]),
        ({"measured": False}, ["normalize=patch", "projection=whitened_pca"]),
        ({"normalize": "global"}, ["normalize=patch", "projection=whitened_pca"]),
        ({"normalize": "patch"}, ["projection=whitened_pca"]),
        ({"projection": "whitened_pca", "measured": False}, ["normalize=patch"]),
        ({"normalize": "patch", "projection": "whitened_pca", "measured": False}, []),
    ],
)
def test_advice_is_of_what_is_not_done_yet(settings, tried):
    usage = CodeUsage(1, 500)
    usage.update(torch.zeros(4, 200, dtype=torch.long))
    advice = usage.advice(**settings) or ""
    assert re.findall(r"model\.targets\.(\w+=\w+)", advice) == tried
    assert ("level of the patches" in advice) == (settings.get("normalize", "none") == "none")
    assert tried or "try more varied audio" in advice.lower()
