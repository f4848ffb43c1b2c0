"""A predictor whose mask tokens attend to the context alone, on a share of them."""

import pytest
import torch

from bestrq2.config import load_config
from bestrq2.errors import ConfigError
from bestrq2.layers.cross_attention import CrossTransformer
from bestrq2.layers.masking import RandomMasking
from bestrq2.layers.thinning import num_kept, thin
from bestrq2.layers.transformer import TransformerSettings
from bestrq2.models.build import build_model

SIZES = [f"model.{part}.{key}" for part in ("encoder", "predictor") for key in ("width=32", "heads=2", "hidden=48")]
SIZES += ["model.encoder.depth=1", "model.predictor.depth=2"]


def build(*overrides, recipe="best_rq2_tiny"):
    torch.manual_seed(0)
    return build_model(load_config(recipe, [*SIZES, *overrides]))


def waveforms(clips, samples):
    return 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))


def test_a_masked_token_does_not_see_the_others():
    torch.manual_seed(0)
    model = CrossTransformer(TransformerSettings(32, 2, 2, 48)).eval()
    queries, context = torch.randn(2, 9, 32), torch.randn(2, 5, 32)
    together = model(queries, context)
    alone = torch.cat([model(queries[:, i : i + 1], context) for i in range(9)], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - model(queries, torch.randn(2, 5, 32))).abs().max() > 1e-4


@pytest.mark.parametrize("queries", [300, 400, 500])
def test_a_shorter_context_takes_no_query_along(queries):
    """More tokens than the kernel of short clips takes."""
    torch.manual_seed(0)
    model = CrossTransformer(TransformerSettings(16, 1, 2, 24)).eval()
    masks, context = torch.randn(2, queries, 16), torch.randn(2, 400, 16)
    together = model(masks, context, torch.tensor([400, 90]))
    for clip, tokens in enumerate((400, 90)):
        alone = model(masks[clip : clip + 1], context[clip : clip + 1, :tokens])
        assert torch.allclose(together[clip : clip + 1], alone, atol=1e-5)


@pytest.mark.parametrize("recipe", ["best_rq2_tiny", "best_rq2_conformer_tiny"])
def test_ragged_batch_gives_each_clip_what_it_gives_alone(recipe):
    model = build("model.predictor.attention=cross", "model.predictor.share=0.5", recipe=recipe).eval()
    audio, lengths = waveforms(3, 24000), torch.tensor([24000, 16000, 9000])
    together = model(audio, lengths, step=3, index=torch.tensor([4, 5, 6]))
    for clip, samples in enumerate(lengths.tolist()):
        alone = model(audio[clip : clip + 1, :samples], step=3, index=torch.tensor([4 + clip]))
        count = int(alone.plan.predicted_lengths[0])
        assert int(together.plan.predicted_lengths[clip]) == count
        assert torch.equal(together.plan.predicted[clip, :count], alone.plan.predicted[0])
        assert torch.allclose(together.hidden[clip, :count], alone.hidden[0], atol=1e-4)


def test_learns():
    model = build("model.predictor.attention=cross", "model.predictor.depth=1", "model.predictor.share=0.5")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss = model(waveforms(4, 12000), step=step % 3, index=torch.arange(4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    untouched = [name for name, p in model.named_parameters() if optimizer.state.get(p, {}).get("exp_avg") is None]
    assert untouched == []


def test_share_counts_in_loss_weights_and_operations():
    whole, half = build(), build("model.predictor.share=0.5")
    lengths, index = torch.tensor([24000, 16000]), torch.arange(2)
    outputs = [model(waveforms(2, 24000), lengths, step=1, index=index) for model in (whole, half)]
    counts = [int(output.plan.predicted_lengths.sum()) for output in outputs]
    assert counts[1] < 0.6 * counts[0]
    assert [model.num_predicted(lengths, 1) for model in (whole, half)] == counts
    assert torch.equal(outputs[0].plan.seen, outputs[1].plan.seen)
    assert outputs[1].plan.masked_lengths.sum() == counts[0]
    assert half.flops(outputs[1].plan) < whole.flops(outputs[0].plan)


def test_operations_of_a_cross_predictor_are_those_of_its_products():
    model = build("model.predictor.attention=cross")
    counted = 0.0

    def count(module, inputs, output):
        nonlocal counted
        counted += 2.0 * inputs[0].numel() * module.out_features

    for module in model.predictor.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    plan = model(waveforms(1, 24000), step=0).plan
    seen, predicted = int(plan.seen_lengths), int(plan.predicted_lengths)
    scores = 2 * 4.0 * seen * predicted * 32
    assert model.predictor.flops(seen, predicted) == pytest.approx(counted + scores)


def test_thinning_is_uniform_deterministic_and_sorted():
    lengths = torch.tensor([40, 40, 13])
    plan = RandomMasking((0.5, 0.5)).plan(lengths, 0, torch.arange(3), "cpu")
    assert thin(plan, 1.0, 7, 0, torch.arange(3)) is plan
    thinned = thin(plan, 0.4, 7, 0, torch.arange(3))
    assert torch.equal(thinned.predicted, thin(plan, 0.4, 7, 0, torch.arange(3)).predicted)
    assert torch.equal(thinned.predicted_lengths, num_kept(plan.predicted_lengths, 0.4))
    chosen = torch.zeros(20)
    for step in range(400):
        kept = thin(plan, 0.4, 7, step, torch.arange(3))
        for clip, count in enumerate(kept.predicted_lengths.tolist()):
            tokens = kept.predicted[clip, :count]
            assert (tokens.diff() > 0).all()
            assert torch.isin(tokens, plan.predicted[clip, : int(plan.predicted_lengths[clip])]).all()
        chosen += torch.isin(plan.predicted[0], kept.predicted[0]).float()
    assert (chosen / 400 - 0.4).abs().max() < 0.12
    assert num_kept(torch.tensor([0, 1, 2]), 0.1).tolist() == [0, 1, 1]


def test_defaults_keep_parameters_and_old_configurations():
    names = set(build().state_dict())
    assert "predictor.transformer.blocks.0.attn.qkv.weight" in names
    assert names == set(build("model.predictor.attention=full", "model.predictor.share=1").state_dict())


@pytest.mark.parametrize(
    "override", ["model.predictor.attention=half", "model.predictor.share=0", "model.predictor.share=1.5"]
)
def test_impossible_settings_name_the_key(override):
    with pytest.raises(ConfigError, match=override.split(".")[-1].split("=")[0]):
        build(override)
