"""Options of pretraining beside the published method: clip target, mixing, dispersion, a teacher, grids with RoPE."""

import copy
import math
import warnings

import pytest
import torch

from bestrq2.config import ConfigError, load_config
from bestrq2.layers import RandomProjectionQuantizer, TransformerSettings
from bestrq2.layers.patches import extract_patches
from bestrq2.models import BestRQ2, build_model
from bestrq2.models.clip_head import ClipHead
from bestrq2.models.teacher import Teacher

TINY = [
    "model.front_end.mean=-45",
    "model.front_end.std=20",
    "model.encoder.width=32",
    "model.encoder.hidden=48",
    "model.predictor.width=32",
    "model.predictor.hidden=32",
    "model.encoder.depth=3",
    "model.predictor.depth=1",
    "model.encoder.heads=4",
    "model.predictor.heads=4",
    "model.encoder.drop_path=0",
    "model.targets.codebook_size=64",
]


def build(*overrides, recipe="best_rq2_tiny", teacher=None):
    torch.manual_seed(3)
    return build_model(load_config(recipe, [*TINY, *overrides]), teacher)


def audio(clips=2, samples=16000):
    generator = torch.Generator().manual_seed(0)
    swell = torch.linspace(0.02, 1, samples) ** 2
    return torch.randn(clips, samples, generator=generator) * 0.1 * swell, torch.full((clips,), samples)


def test_clip_head_is_the_cross_entropy_with_the_codes_of_each_clip():
    torch.manual_seed(0)
    head = ClipHead(8, 16, 2)
    context, seen = torch.randn(3, 5, 8), torch.tensor([5, 3, 4])
    codes = torch.randint(16, (3, 6, 2))
    valid = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    total, count = 0.0, 0
    for clip in range(3):
        pooled = context[clip, : seen[clip]].mean(0)
        for place in range(6):
            if valid[clip, place]:
                for book in range(2):
                    logits = head.weight[book] @ pooled + head.bias[book]
                    total += torch.nn.functional.cross_entropy(logits, codes[clip, place, book])
                    count += 1
    torch.testing.assert_close(head(context, seen, codes, valid), total / count)
    nothing = head(context, seen, codes, torch.zeros_like(valid))
    assert float(nothing.detach()) == 0.0
    # Equal clips without padding take the short way.
    torch.testing.assert_close(
        head(context, torch.full((3,), 5), codes, None),
        head(context, torch.full((3,), 5), codes, torch.ones_like(valid)),
    )


@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq_vit_tiny"], ids=["two-step", "one-stage"])
def test_clip_target_adds_to_the_objective_and_reaches_the_encoder(recipe):
    waveform, lengths = audio()
    plain, model = build(recipe=recipe), build("model.clip_weight=0.5", recipe=recipe)
    before = plain(waveform, lengths, step=0, index=torch.arange(2))
    output = model(waveform, lengths, step=0, index=torch.arange(2))
    assert before.clip_loss is None
    assert before.objective is before.loss
    assert torch.equal(before.loss, output.loss)  # the other parts start from the same weights
    torch.testing.assert_close(output.objective, output.loss + 0.5 * output.clip_loss)
    assert float(output.clip_loss.detach()) == pytest.approx(math.log(64), rel=0.1)
    output.clip_loss.backward()
    assert float(model.encoder.encoder.blocks[0].attn.qkv.weight.grad.abs().max()) > 0
    assert {name for name in model.state_dict() if name not in plain.state_dict()} == {
        "clip_head.weight",
        "clip_head.bias",
    }
    assert model.flops(output.plan) > plain.flops(before.plan)


def test_objective_adds_up_over_parts_of_a_batch():
    model = build("model.clip_weight=1.0").eval()
    waveform, _ = audio(3)
    lengths, index = torch.tensor([16000, 9000, 12000]), torch.arange(3)
    whole = model(waveform, lengths, step=1, index=index)
    parts = [
        model(waveform[k : k + 1, : lengths[k]], lengths[k : k + 1], step=1, index=index[k : k + 1]) for k in range(3)
    ]
    counts = [model.num_predicted(lengths[k : k + 1], 1) for k in range(3)]
    together = sum(count * part.objective for count, part in zip(counts, parts)) / sum(counts)
    torch.testing.assert_close(whole.objective, together)


@pytest.mark.parametrize(
    "grid", [[], ["model.encoder.patch_height=16"], ["model.front_end.normalize=none"]], ids=["strips", "grid", "raw"]
)
def test_mixing_changes_the_input_and_the_codes_in_training_only(grid):
    # One clip is loud where the other is quiet.
    waveform, lengths = audio()
    waveform[1] = waveform[1].flip(0)
    options = ["model.mixing.share=1.0", "model.mixing.level_db=[0,0]", "model.mixing.span=[1,1]"]
    plain, model = build(*grid), build(*grid, *options)
    index = torch.tensor([8, 9])
    single, mixed = plain(waveform, lengths, step=0, index=index), model(waveform, lengths, step=0, index=index)
    assert torch.equal(single.plan.predicted, mixed.plan.predicted)
    changed = (single.codes != mixed.codes).squeeze(-1)
    swapped = model.target_codes(
        waveform.flip(0),
        lengths,
        single.patches.__class__(single.patches.values.flip(0), single.patches.lengths, single.patches.rows),
        single.plan.predicted,
    )
    assert torch.equal(mixed.codes[changed], swapped[changed])
    assert 0.2 < float(changed.float().mean()) < 0.8
    # Power is added, never taken away.
    assert float((mixed.patches.values - single.patches.values).min()) > -1e-4
    assert float((mixed.patches.values - single.patches.values).mean()) > 0.01
    model.eval()
    assert torch.equal(model(waveform, lengths, step=0, index=index).codes, single.codes)


def test_dispersion_masks_what_varies():
    model = build("model.masking.dispersion=2.0", "model.front_end.normalize=none")
    waveform, lengths = audio(16)
    waveform[:, :8000] = 0.0
    output = model(waveform, lengths, step=0, index=torch.arange(16))
    late = output.plan.predicted >= output.patches.values.shape[1] // 2
    assert float(late.float().mean()) > 0.85


def test_blocks_reach_the_grid_of_patches():
    grid = ["model.encoder.patch_height=16", "model.masking.block_rows=null", "model.masking.block_columns=3"]
    output = build(*grid)(*audio(), step=0, index=torch.arange(2))
    columns = torch.bincount(output.plan.predicted[0] // 4)
    assert sum(0 < count < 4 for count in columns.tolist()) <= 1  # the last span is cut where the count is reached
    assert 4 in columns
    assert 0 < float(output.touching_share()) < 1


@pytest.mark.parametrize("kind", ["vit", "conformer"])
def test_teacher_features_are_quantized_in_place_of_patches(kind):
    recipe = {"vit": "best_rq2_tiny", "conformer": "best_rq2_conformer_tiny"}[kind]
    source = build(recipe=recipe).encoder
    teacher = Teacher(source, 1)
    settings = ["model.targets.encoder=somewhere", "model.targets.normalize=patch"]
    model = build(*settings, teacher=teacher)
    waveform, _ = audio()
    lengths = torch.tensor([16000, 11000])
    output = model(waveform, lengths, step=0, index=torch.arange(2))
    features, counts = source.encode(waveform, lengths, 1)
    assert features.shape[1] == output.patches.values.shape[1]
    for clip in range(2):
        count = int(output.plan.predicted_lengths[clip])
        places = output.plan.predicted[clip, :count]
        codes = model.quantizer(features[clip : clip + 1, : counts[clip]])[0, places]
        assert torch.equal(output.codes[clip, :count], codes)
    output.objective.backward()
    assert all(parameter.grad is None for parameter in teacher.encoder.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert model.quantizer.patch_dim == 32
    # Training mode of the model is not the teacher's.
    assert model.train().teacher.encoder.training is False


@pytest.mark.parametrize("height", [16, 64], ids=["grid", "strips"])
def test_tokens_of_a_grid_are_targets_of_a_grid_and_their_mean_of_strips(height):
    source = build("model.encoder.patch_height=16").encoder
    model = build("model.targets.encoder=x", f"model.encoder.patch_height={height}", teacher=Teacher(source, 1))
    waveform, _ = audio()
    lengths = torch.tensor([16000, 11000])
    patches = model.encoder.patches(waveform, lengths)
    values = model.target_values(waveform, lengths, patches)
    tokens = source.patches(waveform, lengths)
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        embedded = source.embed(tokens.values, tokens.positions()[None])
        source.transform(embedded, tokens.positions()[None], tokens.lengths, outputs)
    expected = outputs[1]
    if height == 64:
        expected = expected.unflatten(1, (-1, 4)).mean(2)
    for clip, count in enumerate(patches.lengths.tolist()):
        torch.testing.assert_close(values[clip, :count], expected[clip, :count])
        assert not values[clip, count:].any()
    output = model(waveform, lengths, step=0, index=torch.arange(2))
    assert output.codes.shape[1] == output.plan.predicted.shape[1]


def test_work_of_a_teacher_is_counted_once():
    waveform, lengths = audio()
    plain, source = build(), build("model.encoder.patch_height=16").encoder
    model = build("model.targets.encoder=x", teacher=Teacher(source, 1))
    plan = model(waveform, lengths, step=0, index=torch.arange(2)).plan
    columns = source.output_length(16000)
    assert model.flops(plan) == plain.flops(plan) + 2 * source.flops(4 * columns, 4 * columns)


def test_a_teacher_with_fewer_frames_repeats_its_last_one():
    # 40 ms from 4 frames of 10 ms and from 2 frames of 20 ms: clips exist whose last token only the second has.
    coarse = build("model.front_end.hop_length=320", "model.encoder.patch_width=2").encoder
    fine = build().encoder
    samples = next(n for n in range(8000, 9000) if coarse.output_length(n) == fine.output_length(n) + 1)
    model = build(
        "model.targets.encoder=x",
        "model.front_end.hop_length=320",
        "model.encoder.patch_width=2",
        teacher=Teacher(fine, 0),
    )
    waveform, lengths = audio(2, samples)
    patches = model.encoder.patches(waveform, lengths)
    values = model.target_values(waveform, lengths, patches)
    frames, counts = fine.encode(waveform, lengths, 0)
    assert values.shape[1] == int(counts[0]) + 1
    assert torch.equal(values[:, :-1], frames)
    assert torch.equal(values[:, -1], frames[:, -1])


def test_times_of_teacher_and_tokens_are_equal():
    """A click is in the same frame of the teacher as in the patches of the model."""
    model = build("model.targets.encoder=x", teacher=Teacher(build().encoder, 0))
    for place in (3000, 9000):
        waveform = torch.zeros(1, 16000)
        waveform[:, place : place + 40] = 0.5
        silence, lengths = torch.zeros(1, 16000), torch.tensor([16000])
        patches = [model.encoder.patches(x, lengths) for x in (waveform, silence)]
        values = [model.target_values(x, lengths, p) for x, p in zip((waveform, silence), patches)]
        by_patch = (patches[0].values - patches[1].values).norm(dim=-1)[0].argmax()
        by_teacher = (values[0] - values[1]).norm(dim=-1)[0].argmax()
        assert int(by_patch) == int(by_teacher) == place // 640


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.front_end.hop_length=320"],
            "every 80 ms, like the tokens of the model, got one with a frame every 40",
        ),
        (
            ["model.front_end.sampling_rate=8000", "model.front_end.f_max=null"],
            "expected a teacher for 8000 Hz.*got one for 16000 Hz",
        ),
        (
            ["model.encoder.patch_height=16"],
            "expected a teacher with 4 rows of patches, like the model, got one with 1",
        ),
    ],
)
def test_teachers_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build("model.targets.encoder=x", *overrides, teacher=Teacher(build().encoder, 1))


def test_an_encoder_is_not_its_own_teacher():
    source = build()
    with pytest.raises(ValueError, match=r"a teacher with weights of its own.*copy\.deepcopy\(encoder\)"):
        BestRQ2(source.encoder, source.quantizer, source.masking, teacher=Teacher(source.encoder, 1))
    source.encoder.requires_grad_(True).train()
    teacher = Teacher(copy.deepcopy(source.encoder), 1)
    quantizer = RandomProjectionQuantizer(teacher.width, 64)
    model = BestRQ2(source.encoder, quantizer, source.masking, TransformerSettings(32, 1, 4), teacher=teacher)
    model(*audio(), step=0).loss.backward()
    assert model.encoder.patch_embed.proj.weight.grad.any()


def test_an_encoder_that_takes_no_gradients_gives_a_warning():
    source = build()
    settings = TransformerSettings(32, 1, 4)
    with pytest.warns(UserWarning, match=r"no parameter of ViTEncoder takes a gradient.*trainable=True"):
        BestRQ2(source.encoder.requires_grad_(False), source.quantizer, source.masking, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.encoder.encoder.blocks[-1].requires_grad_(True)
        BestRQ2(source.encoder, source.quantizer, source.masking, settings)


def test_mixing_reaches_the_frames_of_a_conformer():
    options = ["model.mixing.share=1.0", "model.mixing.level_db=[0,0]"]
    model = build_model(load_config("best_rq_conformer_tiny", options))
    waveform, lengths = audio()
    output = model(waveform, lengths, step=0, index=torch.tensor([8, 9]))
    single = model.encoder.patches(waveform, lengths)
    assert not torch.equal(output.patches.values, single.values)
    again = extract_patches(output.patches.frames, lengths, single.frames.shape[2], model.encoder.factor)
    assert torch.equal(again.values, output.patches.values)
    assert torch.equal(single.replaced(single.values).frames, single.frames)


def test_missing_teachers_and_layers_are_refused():
    with pytest.raises(ConfigError, match=r"model.targets.encoder: the targets are made by .*runs/a, which has"):
        build("model.targets.encoder=runs/a")
    with pytest.raises(ValueError, match=r"0..2, got 3"):
        Teacher(build().encoder, 3)
    with pytest.raises(ConfigError, match=r"model.targets.layer: expected null without model.targets.encoder, got 2"):
        build("model.targets.layer=2")


def test_digest_is_that_of_weights_and_layer():
    first, second = Teacher(build().encoder, 1), Teacher(build().encoder, 1)
    assert first.digest() == second.digest()
    assert Teacher(build().encoder, 2).digest() != first.digest()
    with torch.no_grad():
        second.encoder.patch_embed.proj.bias[0] += 1e-3
    assert second.digest() != first.digest()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mixing.share=0.5", "train.batch_size=6", "train.accumulate=2"], "pairs of clips in each of 2 micro"),
        (["model.mixing.share=0.5", "data.batching=buckets"], "model.mixing.share: expected 0 with data.batching"),
        (["model.mixing.share=2"], "model.mixing.share: expected a share"),
        (["model.clip_weight=-1"], "clip_weight must be"),
        (["model.masking.block_columns=3", "model.masking.span_length=2"], "spans or blocks"),
        (["model.targets.projection=lda"], "expected one of .*whitened_pca"),
        (["model.targets.seed_candidates=0"], "seed_candidates: expected at least 1"),
        (["frozen.source=x", "model.targets.projection=pca"], "null with model.targets.projection"),
        (
            ["model.targets.encoder=x", "model.targets.normalize=global"],
            "^model.targets.normalize: expected none, patch or utterance with model.targets.encoder, or its mean",
        ),
        (
            ["model.predictor.width=36", "model.predictor.heads=4"],
            "^model: rotary positions need a head width .* got 9",
        ),
        (["model.encoder.position=sincos", "model.encoder.width=30", "model.encoder.heads=2"], "multiple of 4, got 30"),
    ],
)
def test_impossible_options_name_their_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(*overrides)


@pytest.mark.parametrize(
    ("height", "width", "hop", "mels"), [(16, 4, 160, 128), (128, 4, 160, 128), (128, 1, 640, 128)]
)
def test_tokens_of_40_ms_with_rotary_positions_learn(height, width, hop, mels):
    """16 x 4 patches and strips at 40 ms: a few steps on one batch lower the loss."""
    model = build(
        f"model.front_end.num_mels={mels}",
        f"model.front_end.hop_length={hop}",
        f"model.encoder.patch_height={height}",
        f"model.encoder.patch_width={width}",
        recipe="best_rq2_1_base",
    )
    assert model.encoder.hop_size_in_ms == 40
    assert model.encoder.rows == mels // height
    waveform, lengths = audio(4)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(30):
        output = model(waveform, lengths, step=0, index=torch.arange(4))
        optimizer.zero_grad()
        output.objective.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0] - 0.3
