"""Configuration: recipes, overrides, and errors that name the key."""

import pytest
import torch

from bestrq2.config import ConfigError, config_from_dict, config_to_dict, load_config, recipe_names, with_overrides
from bestrq2.config.loading import chosen_keys
from bestrq2.config.rules import unused_values
from bestrq2.models import build_model


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_build(name):
    with torch.device("meta"):
        model = build_model(load_config(name, ["model.front_end.mean=0", "model.front_end.std=1"]))
    assert sum(p.numel() for p in model.parameters()) > 0


def test_round_trip():
    config = load_config("best_rq2_small", ["train.steps=7", "model.masking.ratio=[0.3,0.4]"])
    assert config_from_dict(config_to_dict(config)) == config
    assert config.train.steps == 7
    assert config.recipe == "best_rq2_small"


def test_yaml_file_based_on_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("based_on: best_rq2_tiny\ntrain: {steps: 3}\n")
    config = load_config(str(path))
    assert (config.recipe, config.train.steps, config.model.encoder.width) == ("mine", 3, 128)


def test_the_name_that_a_yaml_file_gives_itself(tmp_path):
    path, second = tmp_path / "mine.yaml", tmp_path / "second.yaml"
    path.write_text("based_on: best_rq2_tiny\nrecipe: birds\n")
    second.write_text("based_on: mine.yaml\n")
    assert load_config(str(path)).recipe == "birds"
    assert load_config(str(second)).recipe == "second"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 3", r"recipe mine: train: expected a section of settings \(key: value lines\), got 3"),
        ("train.steps: 3", r"recipe mine: train\.steps: expected sections .*, as train: \{steps: \.\.\.\}, got a name"),
        ("model: {encoder.width: 64}", r"mine: model\.encoder\.width: expected sections .* encoder: \{width: \.\.\.\}"),
        ("train:", "recipe mine: train: expected a section of settings .*, got nothing"),
        ("model: {encoder: [1]}", r"recipe mine: model\.encoder: expected a section of settings .*, got \[1\]"),
        ("train: {steps: 1.5}", r"recipe mine: train\.steps: .*1\.5"),
    ],
)
def test_a_section_is_a_section(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"based_on: best_rq2_tiny\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_whole_numbers_may_have_an_exponent(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("based_on: best_rq2_tiny\ntrain: {steps: 2e3}\n")
    overrides = ["train.save_every=1e2", "model.encoder.conformer.channels=[6.4e1, 32]", "optimizer.learning_rate=1"]
    config = load_config(str(path), overrides)
    values = [config.train.steps, config.train.save_every, *config.model.encoder.conformer.channels]
    assert (values, {type(value) for value in values}) == ([2000, 100, 64, 32], {int})
    assert isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "unknown configuration key 'train.step'; did you mean 'train.steps'"),
        ("foo=1", "unknown configuration key 'foo'; known sections: model, data, optimizer, train"),
        ("train.steps=abc", "train.steps: expected a whole number, got 'abc'"),
        ("train.steps=1.5", "train.steps: expected a whole number, got 1.5"),
        ("train.steps=null", "train.steps: expected a whole number, got nothing"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: expected a number, got 'fast'"),
        ("train.compile=maybe", "train.compile: expected true or false, got 'maybe'"),
        ("train.device=[1]", r"train.device: expected text, got \[1\]"),
        ("optimizer.betas=0.9", "optimizer.betas: expected a list of numbers, got 0.9"),
        ("optimizer.betas=[a, b]", r"optimizer.betas: expected a list of numbers, got \['a', 'b'\]"),
        ("model.encoder.transformer.width=3", "did you mean 'model.encoder.width'"),
        ("optimizer.lr=1", "did you mean 'optimizer.learning_rate'"),
        ("train.steps=0", "train.steps: expected at least 1, got 0"),
        ("model.targets.codebook_size=1", "model.targets.codebook_size: expected at least 2 codes, got 1"),
        ("train.precision=fp8", "train.precision: expected one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("steps", "expected overrides as key=value, got 'steps'"),
        ("train.init_from=", "train.init_from: nothing behind the '='; write train.init_from=null for none"),
        ("data.batch_seconds= ", "data.batch_seconds: nothing behind the '='"),
        ("model.masking.ratio=[0.5]", "model.masking.ratio: expected two numbers"),
        ("data.source=5", "data.source: expected a name or a list of names, got 5"),
        ("data.source=[]", r"data.source: expected a name or a list of names; null: the packaged clips, got \[\]"),
        ("data.source=[a,2]", "data.source: expected a name or a list of names"),
        ("data.batching=rows", "data.batching: expected one of .*, got 'rows'"),
        ("data.batch_seconds=60", "data.batch_seconds: expected null with data.batching=crops"),
        ("data.domain_weights={speech: -1}", "data.domain_weights: expected numbers >= 0"),
        ("data.domain_weights={speech: 0}", "data.domain_weights: expected a positive weight for some domain"),
        ("data.domain_weights=[a]", r"data.domain_weights: expected names with numbers, .* got \['a'\]"),
        ("data.domain_weights={speech:1,speech: 2}", "data.domain_weights=.*: the key 'speech' is there twice"),
        ("data.domain_weights.speech=null", "data.domain_weights: expected names .*, got {'speech': None}"),
        ("data.domain_weights.a.b=1", "data.domain_weights: expected names with numbers, .* got {'a': {'b': 1}}"),
        (
            "data.domain_weights={speech: much}",
            "data.domain_weights: expected names with numbers, .* got {'speech': 'much'}",
        ),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: expected a finite number, got inf"),
        ("optimizer.weight_decay=nan", "optimizer.weight_decay: expected 0 or more, got nan"),
        ("optimizer.betas=[nan,0.9]", "optimizer.betas: expected a finite number, got nan"),
        ("data.min_seconds=nan", "data.min_seconds: expected 0 or more seconds, got nan"),
        ("model.front_end.f_max=-.inf", "model.front_end.f_max: expected a finite number, got -inf"),
        ("optimizer.max_grad_norm=0", "optimizer.max_grad_norm: expected a positive number, or null for no clipping"),
        ("model.front_end.mean=-40", "model.front_end.mean: expected a number with model.front_end.std, and null"),
        ("model.front_end.std=12", "model.front_end.mean: expected a number with model.front_end.std, .* got None"),
        ("model.mixing.span=[0.5]", r"model.mixing.span: expected two numbers \[low, high\]"),
        ("optimizer.max_grad_norm=nan", "optimizer.max_grad_norm: expected a positive number, .* got nan"),
    ],
)
def test_bad_overrides_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("best_rq2_tiny", [override])


# Seeds, levels in dB, text, true and false.
TAKE_MINUS_ONE = {
    *("train.seed", "model.targets.seed", "model.front_end.floor_db", "model.targets.mean", "model.targets.digest"),
    *("train.compile", "train.wandb", "data.cache", "validation.source", "frozen.source", "frozen.cache"),
    "train.init_from",
    *(f"probe.{key}" for key in ("manifest", "events", "group", "split", "rows")),
}
SMALL = [f"model.{part}.{key}" for part in ("encoder", "predictor") for key in ("width=32", "heads=2", "depth=1")]


def numbers(values, prefix=""):
    """Keys of whatever -1 can be given to: numbers, lists and null."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}.")
        elif not isinstance(value, bool | str):
            yield prefix + key


def test_no_number_may_be_negative_unless_it_means_something():
    accepted, words = set(), {}
    unused = {"best_rq2_tiny": "model.encoder.conformer.", "best_rq_conformer_tiny": "model.predictor."}
    for recipe, left_out in unused.items():
        for key in numbers(config_to_dict(load_config(recipe))):
            if key.startswith(left_out) or (recipe != "best_rq2_tiny" and not key.startswith("model.")):
                continue
            try:
                build_model(load_config(recipe, [*SMALL, f"{key}=-1"]))
            except ConfigError as error:
                words[key] = str(error)
            else:
                accepted.add(key)
    assert accepted == TAKE_MINUS_ONE
    assert {key: text for key, text in words.items() if key.split(".")[-1] not in text} == {}


def test_never_is_infinity():
    config = load_config("best_rq2_tiny", ["optimizer.max_grad_norm=inf", "train.save_minutes=inf"])
    assert config.optimizer.max_grad_norm == config.train.save_minutes == float("inf")


def test_values_without_a_use_are_told():
    for recipe in recipe_names():
        assert unused_values(load_config(recipe, [])) == []
    useless = ["probe.manifest=a.csv", "validation.every=7", "frozen.every_frame=true", "optimizer.cooldown=0.5"]
    useless.insert(3, "model.encoder.conformer.kernel_size=15")
    told = [text.split()[0] for text in unused_values(load_config("best_rq2_tiny", useless))]
    assert told == [text.split("=")[0] for text in useless]
    assert unused_values(load_config("best_rq2_base", ["model.front_end.mean=-9", "model.front_end.std=3"])) == [
        "model.front_end.mean is not used without model.front_end.normalize=global"
    ]
    useless.pop(3)
    use = ["probe.every=9", "validation.source=a", "optimizer.schedule=stable"]
    assert unused_values(load_config("best_rq2_tiny", [*useless, *use])) == [
        "frozen.every_frame is not used without frozen.source"
    ]


def test_values_of_steps_that_are_left_out_are_told():
    useless = ["optimizer.final_ratio=0.1", "model.mixing.level_db=[0,1]", "model.mixing.span=[0.1,1]"]
    useless += ["model.masking.noise_std=1", "model.targets.fit_clips=3"]
    switches = ["optimizer.schedule=constant"]
    told = [text.split()[0] for text in unused_values(load_config("best_rq2_tiny", [*useless, *switches]))]
    assert told == [text.split("=")[0] for text in useless]
    use = ["model.mixing.share=0.5", "model.targets.seed_candidates=2"]
    assert unused_values(load_config("best_rq_conformer_tiny", [*useless, *use])) == []


def test_keys_that_the_model_does_not_read_are_told(tmp_path):
    """A note names what the user set: one-stage recipes of the package are based on two-stage ones, with predictor."""
    path = tmp_path / "mine.yaml"
    path.write_text("based_on: best_rq2_small\nmodel: {name: best_rq, predictor: {width: 64}}\n")
    (tmp_path / "other.yaml").write_text("based_on: mine.yaml\ntrain: {steps: 9}\n")
    two = tmp_path / "two.yaml"
    two.write_text("based_on: other.yaml\nmodel: {name: best_rq2}\n")

    def told(recipe, *overrides):
        config, chosen = load_config(str(recipe), overrides), chosen_keys(str(recipe), overrides)
        return [text.split()[0] for text in unused_values(config, chosen)]

    assert told("best_rq_vit_small") == []
    assert told("best_rq_vit_small", "model.predictor.depth=3") == ["model.predictor.depth"]
    assert told(tmp_path / "other.yaml") == told(path) == ["model.predictor.width"]
    assert told(two, "model.predictor.depth=3") == []
    frozen = ["frozen.source=x", "model.encoder.depth=3", "model.masking.ratio=[0.4,0.5]", "model.predictor.depth=3"]
    assert told("best_rq2_tiny", *frozen) == ["model.encoder.depth"]
    assert told("best_rq2_tiny", *frozen, "frozen.every_frame=true") == ["model.encoder.depth", "model.masking.ratio"]


def test_domain_weights_take_any_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("based_on: best_rq2_tiny\ndata: {domain_weights: {speech: 0.45, field recording: 0.2}}\n")
    config = load_config(
        str(path), ["data.domain_weights.music=0.35", "data.batching=buckets", "data.batch_seconds=60"]
    )
    assert config.data.domain_weights == {"speech": 0.45, "field recording": 0.2, "music": 0.35}
    assert config_from_dict(config_to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"data.join_short: expected false with data.batching=buckets"):
        load_config(str(path), ["data.batching=buckets", "data.join_short=true"])
    with pytest.raises(ConfigError, match=r"data.batch_seconds: expected at least data.crop_seconds = 10, got 5"):
        load_config("best_rq2_base", ["data.batching=buckets", "data.batch_seconds=5"])


def test_domain_weights_are_replaced_as_a_whole_or_changed_one_by_one(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("based_on: best_rq2_tiny\ndata: {domain_weights: {speech: 0.45, env: 0.2}}\n")
    for overrides, expected in (
        (["data.domain_weights={}"], {}),
        (["data.domain_weights=null"], {}),
        (["data={domain_weights: {}}"], {}),
        (["data.domain_weights={speech:1,'a: b':2e-1, c: 3}"], {"speech": 1.0, "a: b": 0.2, "c": 3.0}),
        (["data.domain_weights.speech=2"], {"speech": 2.0, "env": 0.2}),
        (["data.domain_weights={music: 1}", "data.domain_weights.env=2"], {"music": 1.0, "env": 2.0}),
        (["data.domain_weights.music=1", "data.domain_weights={}"], {}),
        (["data.crop_seconds=2"], {"speech": 0.45, "env": 0.2}),
    ):
        assert load_config(str(path), overrides).data.domain_weights == expected, overrides
        assert with_overrides(load_config(str(path)), overrides).data.domain_weights == expected, overrides
    second = tmp_path / "second.yaml"
    for text, left in (("{domain_weights: {music: 1}}", {"music": 1.0}), ("{domain_weights: }", {})):
        second.write_text(f"based_on: mine.yaml\ndata: {text}\n")
        assert load_config(str(second)).data.domain_weights == left
    assert load_config(str(path), values={"data.domain_weights": {"a:1": 2}}).data.domain_weights == {"a:1": 2.0}


@pytest.mark.parametrize(
    "override",
    [
        "model.encoder.heads=5",
        "model.predictor.heads=5",
        "model.masking.ratio=[0.5,1.0]",
        "model.targets.normalize=layer",
        "model.encoder.norm=x",
    ],
)
def test_bad_model_settings_are_config_errors(override):
    with pytest.raises(ConfigError, match="model"):
        build_model(load_config("best_rq2_tiny", [override, "model.front_end.mean=0", "model.front_end.std=1"]))


def test_a_one_stage_model_does_not_use_its_predictor_section():
    build_model(
        load_config("best_rq_vit_tiny", ["model.predictor.heads=5", "model.front_end.mean=0", "model.front_end.std=1"])
    )


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"nothing.*best_rq2_base"):
        load_config("nothing")
    with pytest.raises(ConfigError, match="did you mean 'best_rq2_transfer_small'"):
        load_config("best_rq2_transfer_grid_small")  # its former name
    with pytest.raises(ConfigError, match="no such file"):
        load_config("nothing.yaml")


def test_configurations_of_one_recipe_share_nothing():
    first, second = load_config("best_rq2_base"), load_config("best_rq2_base")
    first.data.domain_weights["birds"] = 2.0
    first.model.masking.ratio[0] = 0.1
    first.optimizer.betas.append(0.5)
    assert second == load_config("best_rq2_base") != first
