"""BestRQ2 and BestRQ: sizes, what the encoder sees, padding, gradients."""

import pytest
import torch

from bestrq2 import ops
from bestrq2.config import load_config
from bestrq2.layers.masking import RandomMasking
from bestrq2.models import build_model

TINY = [
    "model.front_end.mean=-45",
    "model.front_end.std=20",
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.predictor.width=24",
    "model.predictor.hidden=32",
    "model.encoder.depth=2",
    "model.predictor.depth=1",
    "model.targets.codebook_size=64",
]
GRID = [
    "model.encoder.patch_height=16",
    "model.encoder.patch_width=8",
    "model.encoder.position=sincos",
    "model.encoder.norm=layer_norm",
    "model.encoder.feed_forward=gelu",
    "model.encoder.bias=true",
    "model.encoder.qk_norm=false",
]


def tiny(recipe="best_rq2_tiny", *overrides):
    torch.manual_seed(3)
    return build_model(load_config(recipe, [*TINY, *overrides]))


def test_published_sizes():
    with torch.device("meta"):
        model = build_model(load_config("best_rq2_base"))
    assert sum(p.numel() for p in model.encoder.parameters()) == 85_253_376
    assert sum(p.numel() for p in model.parameters()) == 120_497_408
    assert sum(p.numel() for p in model.predictor.transformer.parameters()) == 28_353_024


def test_ten_seconds_are_128_tokens_of_625_ms():
    config = load_config("best_rq2_base", ["model.encoder.depth=1", "model.predictor.depth=1"])
    encoder = build_model(config).encoder
    patches = encoder.patches(torch.randn(1, 160000) * 0.1)
    assert patches.values.shape == (1, 128, 256)
    assert encoder.hop_size_in_ms == 625
    assert encoder.output_length(160000) == 16
    assert encoder.min_samples == 9375


@pytest.fixture(params=["best_rq2_tiny", "best_rq_vit_tiny"], ids=["two-step", "one-stage"])
def recipe(request):
    return request.param


@pytest.mark.parametrize("grid", [[], GRID], ids=["strips-rope", "grid-sincos"])
def test_padding_changes_nothing(recipe, grid):
    model = tiny(recipe, *grid).eval()
    waveform = torch.randn(3, 16000) * 0.1
    lengths = torch.tensor([16000, 9000, 5000])
    index = torch.tensor([4, 5, 6])
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


def test_no_masked_patch_reaches_the_context():
    model = tiny().eval()
    waveform, lengths, index = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 16000]), torch.arange(2)
    output = model(waveform, lengths, step=0, index=index)
    calls = []
    handle = model.encoder.encoder.register_forward_hook(lambda *call: calls.append(call[2]))
    patches = output.patches.values.clone()
    for values in (patches, patches.scatter(1, output.plan.predicted[..., None].expand(-1, -1, patches.shape[2]), 1e3)):
        changed = type(output.patches)(values, output.patches.lengths, output.patches.rows)
        model.encoder.patches = lambda *_, changed=changed: changed
        model(waveform, lengths, step=0, index=index)
    handle.remove()
    assert torch.equal(calls[0], calls[1])
    assert calls[0].shape[1] == output.plan.seen.shape[1] < patches.shape[1]


def test_targets_come_from_masked_patches_only():
    model = tiny().eval()
    output = model(torch.randn(2, 16000) * 0.1, torch.tensor([16000, 12000]), step=0, index=torch.arange(2))
    everywhere = model.quantizer(output.patches.values)
    for row, count in enumerate(output.plan.predicted_lengths.tolist()):
        rows = output.plan.predicted[row, :count]
        assert torch.equal(output.codes[row, :count], everywhere[row, rows])
        assert int(rows.max()) < int(output.patches.lengths[row])


def test_gradients_reach_everything_but_the_quantizer(recipe):
    model = tiny(recipe)
    before = {name: buffer.clone() for name, buffer in model.quantizer.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        model(
            torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]), step=step, index=torch.arange(2)
        ).loss.backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert missing == []
        optimizer.step()
    for name, buffer in model.quantizer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_published_predictor_positions():
    # Context tokens enter the predictor without a position vector of its own; mask tokens carry one.
    model = tiny("best_rq2_tiny", *GRID).eval()
    seen = []
    model.predictor.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    waveform, lengths = torch.randn(1, 16000) * 0.1, torch.tensor([16000])
    context = []
    model.encoder.encoder.register_forward_hook(lambda *call: context.append(call[2]))
    output = model(waveform, lengths, step=0, index=torch.arange(1))
    count = output.plan.seen.shape[1]
    torch.testing.assert_close(seen[0][:, :count], model.predictor.input_proj(context[0]))
    masks = seen[0][0, count:] - model.predictor.mask_token[0]
    assert masks.std(0).max() > 0.1


def test_nothing_predicted_gives_zero_loss_and_gradients():
    model = tiny()
    samples = model.encoder.min_samples  # one token: it is seen, nothing is predicted
    output = model(torch.randn(2, samples), torch.tensor([samples, samples]), step=0, index=torch.arange(2))
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_several_codebooks():
    model = tiny("best_rq2_tiny", "model.targets.num_codebooks=3")
    output = model(torch.randn(2, 16000) * 0.1, torch.tensor([16000, 9000]), step=0, index=torch.arange(2))
    assert output.codes.shape[-1] == 3
    valid = output.plan.predicted_valid()
    each = [
        torch.nn.functional.cross_entropy(
            output.hidden[valid] @ model.head.weight[g].T + model.head.bias[g], output.codes[valid][:, g]
        )
        for g in range(3)
    ]
    torch.testing.assert_close(output.loss, torch.stack(each).mean())
    assert model.head.predictions(output.hidden).shape == output.codes.shape


def test_shared_masks_as_published():
    model = tiny("best_rq2_tiny", "model.masking.shared_per_batch=true")
    assert isinstance(model.masking, RandomMasking)
    output = model(torch.randn(3, 16000) * 0.1, torch.full((3,), 16000), step=0, index=torch.arange(3))
    assert (output.plan.predicted == output.plan.predicted[0]).all()


def test_flops_count_matrix_products():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("best_rq_vit_tiny").eval()
    waveform, lengths = torch.randn(2, 16000) * 0.1, torch.tensor([16000, 16000])
    output = model(waveform, lengths, step=0, index=torch.arange(2))
    tokens = torch.randn(2, output.patches.values.shape[1], 32, requires_grad=True)
    positions = output.patches.positions()[None]
    transformer, angles = model.encoder.encoder, model.encoder.angles(positions)
    for first in (0, 5):
        with (
            ops.use_backend("reference"),  # the counter sees PyTorch's operators only
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            # Its hooks of all modules want to see each of them called, on all tokens.
            counter.mod_tracker._fw_pre_handle.remove()
            counter.mod_tracker._fw_post_handle.remove()
            transformer(tokens, angles=angles, first=first).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * transformer.flops(tokens.shape[1], tokens.shape[1] - first)


@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq_conformer_tiny"])  # with a mask token, and with noise
def test_numbers_of_clips_may_be_of_any_integer_type(recipe):
    model = build_model(load_config(recipe)).eval()
    waveform = 0.1 * torch.randn(3, 16000)
    expected = model(waveform, step=2, index=torch.tensor([5, 0, 9])).loss
    for index in ([5, 0, 9], *(torch.tensor([5, 0, 9], dtype=kind) for kind in (torch.int32, torch.uint8))):
        assert model(waveform, step=2, index=index).loss == expected


@pytest.mark.parametrize(
    ("step", "index", "error", "words"),
    [
        # 2^24 + 1 is not in float32: it would have the mask of the clip before.
        (0, torch.tensor([2.0**24, 2.0**24 + 1]), TypeError, r"index must hold integers, .*, got torch\.float32"),
        (0, torch.tensor([True, False]), TypeError, r"index must hold integers"),
        (0, torch.arange(3), ValueError, r"expected one index per clip, \(2,\), got \(3,\)"),
        (0, [[0, 1]], ValueError, r"expected one index per clip, \(2,\), got \(1, 2\)"),
        (0.5, None, TypeError, r"step must be an integer, got 0\.5"),
        (torch.tensor(3), None, TypeError, r"step must be an integer, got .*Tensor"),
    ],
)
@pytest.mark.parametrize("function", ["forward", "prepare"])
def test_wrong_steps_and_numbers_of_clips_are_refused(function, step, index, error, words):
    model, waveform = tiny(), 0.1 * torch.randn(2, 16000)
    with pytest.raises(error, match=words):
        getattr(model, function)(waveform, None, step=step, index=index)


def test_lengths_may_be_a_list():
    model, waveform = tiny(), 0.1 * torch.randn(2, 16000)
    expected = model(waveform, torch.tensor([16000, 9000]), step=0).loss
    assert model(waveform, [16000, 9000], step=0).loss == expected


def test_a_single_waveform_is_refused_before_its_number():
    with pytest.raises(ValueError, match=r"expected a floating waveform \(B, S\), got torch\.float32 \(16000,\)"):
        tiny()(torch.randn(16000), None, step=0, index=torch.arange(1))
