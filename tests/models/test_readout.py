"""Layers joined, rows kept, frames pooled: by hand on known tensors, and on encoders."""

import pytest
import torch
from torch.nn.functional import layer_norm

from bestrq2.config import ConfigError, load_config
from bestrq2.layers import LogMel
from bestrq2.models import ViTEncoder, build_encoder, build_model
from bestrq2.models.readout import combine_layers, parse_layers, pool_frames

WAVES = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([16000, 9000])


def encoder(*overrides, recipe="best_rq2_tiny"):
    sizes = ["model.encoder.width=32", "model.encoder.depth=3", "model.encoder.heads=2", "model.encoder.hidden=64"]
    front = ["model.front_end.normalize=global", "model.front_end.mean=-47", "model.front_end.std=31"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_encoder(load_config(recipe, [*front, *sizes, *overrides]).model).eval()


def test_layers_by_name():
    assert parse_layers("all", 3) == [0, 1, 2, None]
    assert parse_layers("middle", 6) == [2, 3]
    assert parse_layers("middle", 12) == [5, 6]
    assert parse_layers("middle", 3) == [0, 1]
    assert [parse_layers("middle", depth) for depth in (0, 1)] == [[None], [None]]
    assert parse_layers("final", 3) == [None]
    assert parse_layers(" 2, final", 3) == [2, None]
    with pytest.raises(ConfigError, match=r"0\.\.2 and final separated by commas, got '3'"):
        parse_layers("3", 3)
    with pytest.raises(ConfigError, match=r"^layers: expected all, middle, or 0\.\.2 and final .*, got 'last'"):
        parse_layers("last", 3, "layers")


def test_pooling_by_hand():
    features = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [99.0, -99.0]], [[2.0, 0.0], [4.0, 1.0], [6.0, 5.0]]])
    lengths = torch.tensor([2, 3])
    assert pool_frames(features, lengths, "mean").tolist() == [[2, 5], [4, 2]]
    assert pool_frames(features, lengths, "max").tolist() == [[3, 5], [6, 5]]
    expected = torch.tensor([[2, 5, 1, 0], [4, 2, (8 / 3) ** 0.5, (14 / 3) ** 0.5]])
    torch.testing.assert_close(pool_frames(features, lengths, "mean+std"), expected)
    with pytest.raises(ValueError, match="pooling: expected one of mean, max, mean"):
        pool_frames(features, lengths, "median")


def test_deviation_of_large_values_is_exact():
    frames = 1000 + torch.tensor([[[0.0], [0.5], [1.0]]])
    assert pool_frames(frames, torch.tensor([3]), "mean+std")[0, 1] == pytest.approx(6**-0.5, rel=1e-5)


def test_deviation_of_a_single_frame_has_a_gradient_of_zero():
    frames = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    frames[1, :2, 2] = 7.0  # equal frames
    frames.requires_grad_()
    for lengths in ([4, 1], [4, 2]):
        (gradient,) = torch.autograd.grad(pool_frames(frames, torch.tensor(lengths), "mean+std")[:, 3:].sum(), frames)
        assert gradient.isfinite().all()
        assert gradient[0].all()
        assert gradient[1].any() == (lengths[1] > 1)
        assert not gradient[1, :, 2].any()


def test_combine_by_hand():
    layers = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(combine_layers(layers, "average"), layer_norm(layers, (8,)).mean(0))
    assert torch.equal(combine_layers(layers, "concatenate")[..., 8:16], layers[1])
    assert combine_layers(layers, "each") is layers
    assert torch.equal(combine_layers(layers[:1], "average"), layers[0])
    with pytest.raises(ValueError, match="combine: expected one of each, average, concatenate, got 'sum'"):
        combine_layers(layers, "sum")


@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq2_conformer_tiny"])
def test_encode(recipe):
    model = encoder(recipe=recipe)
    blocks, counts = model.encode_layers(WAVES, LENGTHS)
    each, same = model.encode(WAVES, LENGTHS, layers="all", combine="each")
    assert torch.equal(each, blocks)
    assert torch.equal(same, counts)
    joined = model.encode(WAVES, LENGTHS, layers=[0, None], combine="concatenate")[0]
    assert torch.equal(joined, torch.cat((blocks[0], blocks[-1]), -1))
    for spelling in ("0, final", [0, "final"]):
        assert torch.equal(model.encode(WAVES, LENGTHS, layers=spelling, combine="concatenate")[0], joined)
    assert torch.equal(model.encode(WAVES, LENGTHS, layers="2")[0], blocks[2])
    with pytest.raises(ValueError, match=r"^layers: expected all, middle, or 0\.\.2 and final .*, got '3'"):
        model.encode(WAVES, layers="3")
    average = model.encode(WAVES, LENGTHS, layers="middle")[0]
    short = int(counts[1])
    torch.testing.assert_close(average[1, :short], layer_norm(blocks[:2, 1, :short], (32,)).mean(0))
    assert not average[1, short:].any()
    pooled = model.encode(WAVES, LENGTHS, layers=[1], pooling="mean+std")[0]
    alone = blocks[1, 1, :short]
    torch.testing.assert_close(pooled[1], torch.cat((alone.mean(0), alone.std(0, correction=0))), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        pooled[:1], model.encode(WAVES[:1], layer=1, pooling="mean+std")[0], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="give one of them"):
        model.encode(WAVES, layer=0, layers=[1])
    with pytest.raises(ValueError, match="pooling: expected one of"):
        model.encode(WAVES, pooling="median")


def test_rows_of_a_time_step():
    """16 x 4 patches of 64 bands: four rows, whose mean is the usual feature."""
    model = encoder("model.encoder.patch_height=16")
    kept, counts = model.encode(WAVES, LENGTHS, layer=1, rows="concatenate")
    mean = model.encode(WAVES, LENGTHS, layer=1)[0]
    assert kept.shape == (2, int(counts.max()), 4 * 32)
    torch.testing.assert_close(kept.unflatten(-1, (4, 32)).mean(2), mean, rtol=1e-4, atol=1e-5)
    # The first of them is the lowest: a change of the highest bands alone moves the last rows most.
    tokens = model.patches(WAVES, LENGTHS)
    places = tokens.positions()[None]
    output = model.transform(model.embed(tokens.values, places), places, tokens.lengths)
    final = model.encode(WAVES, LENGTHS, rows="concatenate")[0]
    torch.testing.assert_close(output.unflatten(1, (-1, 4))[0, :, 0], final[0, :, :32], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="rows: expected one of average, concatenate"):
        model.encode(WAVES, rows="stack")


def test_an_encoder_that_joins_its_rows_by_itself():
    """Every way in gives joined rows and their width; options given still count, and so do tokens in pretraining."""
    grid = ("model.encoder.patch_height=16", "model.encoder.patch_width=4")
    plain, joined = encoder(*grid), encoder(*grid, "model.encoder.join_rows=concatenate")
    rows = joined.rows
    assert rows > 1
    assert (joined.output_dim, joined.token_width) == (32 * rows, 32) == (rows * plain.output_dim, plain.token_width)
    with torch.no_grad():
        expected, counts = plain.encode(WAVES, LENGTHS, rows="concatenate")
        for found, lengths in (joined.encode(WAVES, LENGTHS), joined(WAVES, LENGTHS)):
            assert torch.equal(found, expected)
            assert torch.equal(lengths, counts)
        assert joined.encode_layers(WAVES, LENGTHS, [0, None])[0].shape == (2, *expected.shape)
        assert torch.equal(joined.encode(WAVES, LENGTHS, rows="average")[0], plain.encode(WAVES, LENGTHS)[0])
    with pytest.raises(ValueError, match="join_rows: expected one of average, concatenate, got 'sum'"):
        ViTEncoder(LogMel(), join_rows="sum")
    with pytest.raises(ConfigError, match=r"join_rows.*a Conformer has no such choice"):
        encoder("model.encoder.join_rows=concatenate", recipe="best_rq2_conformer_tiny")


@pytest.mark.parametrize("name", ["best_rq2", "best_rq"])
def test_joined_rows_change_nothing_in_pretraining(name):
    losses = []
    for joined in ("average", "concatenate"):
        grid = ["model.encoder.patch_height=16", "model.encoder.patch_width=4", f"model.encoder.join_rows={joined}"]
        config = load_config("best_rq2_tiny", [*grid, f"model.name={name}", "model.clip_weight=0.5"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_model(config)
        output = model(WAVES, LENGTHS, step=0, index=torch.arange(2))
        output.loss.backward()
        losses.append(output.loss.item())
        assert model.flops(output.plan) > 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq_conformer_tiny"])
def test_layers_are_the_blocks_that_are_there(recipe):
    model = encoder(recipe=recipe)
    model.encoder.blocks = model.encoder.blocks[:2]
    assert model.depth == 2
    assert model.encode(WAVES, LENGTHS, layers="all", combine="each")[0].shape[0] == 3
    with pytest.raises(ConfigError, match=r"0\.\.1 and final"):
        model.encode(WAVES, LENGTHS, layers="2")
