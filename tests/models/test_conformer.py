"""ConformerEncoder: alone and in any batch, one-stage and two-step pretraining, what masked frames can reach."""

import pytest
import torch
from plain_training import SMALL_MODEL
from torch.optim import swa_utils

from bestrq2.config import ConfigError, load_config
from bestrq2.layers.conformer_convolution import MaskedBatchNorm
from bestrq2.models import ConformerEncoder, build_encoder, build_model

TINY = [
    "model.front_end.mean=-45",
    "model.front_end.std=20",
    *SMALL_MODEL,
    "model.targets.codebook_size=64",
]
RECIPES = ["best_rq_conformer_tiny", "best_rq2_conformer_tiny"]


def tiny(recipe, *overrides):
    torch.manual_seed(3)
    model = build_model(load_config(recipe, [*TINY, *overrides]))
    with torch.no_grad():
        for block in model.encoder.encoder.blocks:  # the small initial weights would hide differences
            for parameter in block.parameters():
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["model.encoder.conformer.channels=[4,4,4]"],
        ["model.encoder.conformer.conv_mode=causal", "model.encoder.conformer.chunk_size=4"],
        ["model.encoder.conformer.conv_mode=chunk", "model.encoder.conformer.chunk_size=5"],
        ["model.encoder.conformer.conv_norm=batch_norm", "model.encoder.conformer.left_context=3"],
    ],
    ids=["4x", "8x", "causal", "chunk", "batch-norm"],
)
def test_same_alone_and_in_a_batch(options):
    encoder = tiny("best_rq_conformer_tiny", *options).encoder.eval()
    assert isinstance(encoder, ConformerEncoder)
    lengths = torch.tensor([24000, 17001, 8000, 7999, 641, 480, 1])
    waveform = torch.randn(7, 24000) * 0.1
    features, counts = encoder.encode(waveform, lengths)
    assert features.dtype == torch.float32
    assert features.shape == (7, encoder.output_length(24000), 32)
    for row, length in enumerate(lengths.tolist()):
        alone, count = encoder.encode(waveform[row : row + 1, :length])
        assert int(count) == int(counts[row]) == encoder.output_length(length) >= 1
        torch.testing.assert_close(features[row, : int(count)], alone[0], atol=1e-5, rtol=1e-5)
        assert not features[row, int(count) :].any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_changes_nothing_in_pretraining(recipe):
    model = tiny(recipe).eval()
    waveform = torch.randn(3, 16000) * 0.1
    lengths, index = torch.tensor([16000, 9000, 5000]), torch.tensor([4, 5, 6])
    output = model(waveform, lengths, step=7, index=index)
    losses = []
    for row, length in enumerate(lengths.tolist()):
        single = model(waveform[row : row + 1, :length], lengths[row : row + 1], step=7, index=index[row : row + 1])
        count = int(output.plan.predicted_lengths[row])
        assert single.plan.predicted[0].tolist() == output.plan.predicted[row, :count].tolist()
        assert torch.equal(single.codes[0], output.codes[row, :count])
        torch.testing.assert_close(single.hidden[0], output.hidden[row, :count], atol=1e-5, rtol=1e-5)
        losses.append(single.loss * count)
    torch.testing.assert_close(output.loss, sum(losses) / output.plan.predicted_lengths.sum())


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "random-chunks"])
def test_no_masked_frame_reaches_the_encoder(recipe, training):
    """Bit for bit: whatever the masked frames hold, context (two-step) and predictions (one-stage) stay."""
    chunks = ["model.encoder.conformer.chunk_training=speechbrain", "model.encoder.conformer.conv_mode=chunk"]
    model = tiny(recipe, *(chunks if training else [])).train(training)
    waveform, lengths, index = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 11000]), torch.arange(2)
    output = model(waveform, lengths, step=0, index=index)
    values, frames = output.patches.values, output.patches.frames
    target = torch.where(output.plan.predicted_valid(), output.plan.predicted, values.shape[1])
    masked = torch.zeros(2, values.shape[1] + 1, dtype=torch.bool).scatter_(1, target, True)[:, :-1]
    assert 0.4 < masked[0].float().mean() < 0.6
    seen = []
    handle = model.encoder.encoder.register_forward_hook(lambda *call: seen.append(call[2]))
    of_frames = masked.repeat_interleave(4, 1)[..., None]
    for changed in (frames, frames.masked_fill(of_frames, 1e3), frames.masked_fill(~of_frames, 1e3)):
        patches = type(output.patches)(values, output.patches.lengths, 1, changed)
        model.encoder.patches = lambda *_, patches=patches: patches
        model(waveform, lengths, step=0, index=index)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])  # the seen frames do matter
    if recipe.startswith("best_rq2"):
        assert seen[0].shape[1] == output.plan.seen.shape[1] < values.shape[1]


def test_distances_in_the_context_are_those_of_the_clip():
    model = tiny("best_rq2_conformer_tiny").eval()
    waveform = torch.randn(1, 16000) * 0.1
    output = model(waveform, torch.tensor([16000]), step=0, index=torch.arange(1))
    plan, patches = output.plan, output.patches
    context = model.encoder.context(patches, plan, 0)
    seen_frames = patches.frames.unflatten(1, (-1, model.encoder.factor))[:, plan.seen[0]].flatten(1, 2)
    compacted = model.encoder.transform(seen_frames)
    assert not torch.allclose(context, compacted, atol=1e-2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_reach_everything_but_the_quantizer(recipe):
    model = tiny(recipe, "model.encoder.conformer.conv_norm=batch_norm")
    before = {name: buffer.clone() for name, buffer in model.quantizer.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        model(
            torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]), step=step, index=torch.arange(2)
        ).loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert missing == []
        optimizer.step()
    for name, buffer in model.quantizer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_targets_are_four_stacked_frames():
    model = tiny("best_rq_conformer_tiny").eval()
    patches = model.encoder.patches(torch.randn(1, 8000))
    frames, _ = model.encoder.front_end(torch.zeros(1, 8000))
    assert patches.values.shape == (1, 12, 4 * 64)
    frames, _ = model.encoder.front_end(waveform := torch.randn(1, 8000))
    stacked = model.encoder.patches(waveform).values
    assert torch.equal(model.encoder.patches(waveform).frames, frames[:, :48])
    torch.testing.assert_close(stacked[0, 2].view(64, 4).T, frames[0, 8:12])


def test_noise_is_normal_and_belongs_to_the_clip():
    model = tiny("best_rq_conformer_tiny").eval()
    patches = model.encoder.patches(torch.randn(4, 16000))
    noise = model._noise(patches, 3, torch.tensor([5, 6, 7, 8]))
    assert abs(noise.mean()) < 0.003
    assert abs(noise.std() - 0.1) < 0.003
    assert abs((noise.abs() < 0.1).float().mean() - 0.6827) < 0.01
    again = model._noise(type(patches)(patches.values[:2, :5], patches.lengths[:2], 1), 3, torch.tensor([7, 5]))
    assert torch.equal(again, noise[[2, 0], :5])
    assert not torch.equal(model._noise(patches, 4, torch.tensor([5, 6, 7, 8])), noise)


@pytest.mark.parametrize("recipe", RECIPES)
def test_several_codebooks(recipe):
    model = tiny(recipe, "model.targets.num_codebooks=3")
    output = model(torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]), step=0, index=torch.arange(2))
    assert output.codes.shape[-1] == 3
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_frame_predicts_nothing(recipe):
    model = tiny(recipe)
    samples = model.encoder.min_samples
    output = model(torch.randn(2, samples), torch.tensor([samples, samples]), step=0, index=torch.arange(2))
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_layers():
    encoder = tiny("best_rq_conformer_tiny").encoder.eval()
    waveform = torch.randn(2, 12000)
    final, _ = encoder.encode(waveform)
    last, _ = encoder.encode(waveform, layer=1)
    torch.testing.assert_close(encoder.encoder.norm(last), final, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.1, got 2"):
        encoder.encode(waveform, layer=2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_flops_count_matrix_products(recipe):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny(recipe).eval()
    waveform, lengths = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 16000])
    output = model(waveform, lengths, step=0, index=torch.arange(2))
    frames, settings = output.patches.values.shape[1], model.encoder.encoder.settings
    seen = output.plan.seen.shape[1] if recipe.startswith("best_rq2") else frames
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if seen < frames:
            model.encoder.context(output.patches, output.plan, 0)
        else:
            model.encoder.transform(output.patches.frames)
    # Not seen by the counter: attention. Not in our count: the projection of the position table, once per batch.
    attention = settings.depth * 6.0 * frames * frames * settings.width
    table = settings.depth * 2.0 * (2 * frames - 1) * settings.width**2
    ours = 2 * (model.encoder.flops(seen, frames) - attention) + table
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_published_size():
    with torch.device("meta"):
        model = build_model(load_config("best_rq_conformer_base", TINY[:2]))
    encoder = model.encoder
    assert (encoder.depth, encoder.output_dim, encoder.patch_dim, encoder.hop_size_in_ms) == (12, 576, 320, 40.0)
    assert model.quantizer.projection.shape == (1, 320, 16)
    assert 80e6 < sum(p.numel() for p in encoder.parameters()) < 95e6  # whettenr/bestrq: 83 M


def test_large_is_8x():
    with torch.device("meta"):
        encoder = build_encoder(load_config("best_rq_conformer_large").model)
    assert (encoder.factor, encoder.hop_size_in_ms, encoder.patch_dim) == (8, 80.0, 640)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.norm=rms_norm", "model.encoder.norm: expected the default"),
        ("model.encoder.kind=zipformer", "model.encoder.kind: expected one of .*, got 'zipformer'"),
        ("model.encoder.conformer.chunk_training=nemo", "chunk_training: expected one of .*, got 'nemo'"),
    ],
)
def test_bad_settings_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("best_rq_conformer_tiny", [override])


def test_impossible_kernel_is_a_config_error():
    with pytest.raises(ConfigError, match="kernel_size must be odd"):
        build_model(load_config("best_rq_conformer_tiny", [*TINY, "model.encoder.conformer.kernel_size=4"]))


def test_running_statistics_of_averaged_weights():
    """Promises of docs/fine_tuning.md: update_bn and the conversion for several ranks pass our batch norm by."""
    norm = "conv.conv_norm.running_mean"
    encoder = tiny("best_rq_conformer_tiny", "model.encoder.conformer.conv_norm=batch_norm").encoder.train()
    waveform, lengths = 0.1 * torch.randn(3, 16000), torch.tensor([16000, 12000, 7000])

    def means(module):
        return torch.cat([buffer for name, buffer in module.named_buffers() if name.endswith(norm)])

    swa_utils.update_bn([waveform], encoder)
    assert not means(encoder).any()
    averaged = swa_utils.AveragedModel(encoder, use_buffers=True)
    averaged.update_parameters(encoder)
    with torch.no_grad():
        encoder.encode(waveform, lengths)
    averaged.update_parameters(encoder)
    torch.testing.assert_close(means(averaged), means(encoder) / 2)
    with torch.no_grad():
        for _ in range(100):
            averaged.module.train().encode(waveform, lengths)
    torch.testing.assert_close(means(averaged), means(encoder) * 10, rtol=1e-3, atol=1e-4)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    assert sum(isinstance(module, MaskedBatchNorm) for module in converted.modules()) == 2
