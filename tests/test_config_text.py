"""Text of users in configurations: every string in every field survives YAML and the command line."""

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bestrq2.config import Config, ConfigError, config_from_yaml, config_to_yaml, load_config
from bestrq2.config.text import PATHS, read_override, read_yaml, write_yaml

# Also half of a surrogate pair: a byte of a file name that is not UTF-8.
TEXT = st.text() | st.text(
    st.sampled_from("${}[]:'\"#?*&!|>%@`~,-. \t\n\r\0\\é\u2028😀\udc80\udcff1e_nullyes"), max_size=12
)
OTHER_TEXT = {
    "train.device",
    "train.wandb",
    "model.targets.digest",
    "probe.kind",
    "probe.label",
    "probe.group",
    "probe.split",
    "probe.head",
    "probe.layers",
    "probe.combine",
    "probe.rows",
    "probe.pooling",
    "recipe",
}


def text_fields(section: Any, prefix: str = "") -> list[str]:
    """Dotted keys of all fields that take any text."""
    hints = get_type_hints(type(section))
    found = []
    for entry in fields(section):
        value, name = getattr(section, entry.name), prefix + entry.name
        if is_dataclass(value):
            found += text_fields(value, name + ".")
        elif hints[entry.name] in (str, str | None, Any):
            found.append(name)
    return found


KEYS = text_fields(Config())


def changed(config: Any, key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    return replace(config, **{first: changed(getattr(config, first), rest, value) if rest else value})


def test_every_text_is_a_path_or_known_not_to_be():
    """Whoever adds a field of text decides whether it is a path, relative to the file that it stands in."""
    assert set(PATHS) <= set(KEYS)
    assert set(KEYS) - set(PATHS) == OTHER_TEXT


@settings(
    derandomize=True, deadline=None, max_examples=25
)  # of 23 strings each: a round trip takes a tenth of a second
@given(st.fixed_dictionaries(dict.fromkeys(KEYS, TEXT)), st.lists(TEXT, max_size=8), TEXT)
@example({"data.source": "${oc.env:HOME}", "recipe": "???"}, ["2026-11-27", "1:30", "0o7", "1_000", "null"], "~")
@example(
    {"frozen.cache": "\x85", "data.cache": "a\x85b", "train.init_from": "\u2028x", "recipe": "x\u2029"}, [], "\x85"
)
def test_yaml_gives_every_string_back(values, sources, domain):
    config = Config()
    for key, value in values.items():
        config = changed(config, key, value)
    config = changed(config, "data.domain_weights", {domain: 1.0})
    config = changed(config, "validation.source", None)
    config = changed(config, "frozen.source", None)  # it excludes weights of domains, and other weights
    if len(sources) > 1:
        config = changed(config, "data.source", sources)
    text = config_to_yaml(config)
    text.encode()  # it can be written
    assert config_from_yaml(text) == config


@pytest.mark.parametrize(
    ("override", "got"),
    [
        ("train.steps=${x}", "expected a whole number, got '${x}'"),
        ("train.steps=???", "expected a whole number, got '???'"),
        ("train.device=['${x}']", "expected text, got ['${x}']"),
        ("train=['${x}']", "(key: value lines), got ['${x}']"),
        ("data.domain_weights=['${x}']", "got ['${x}']"),
        ("data.domain_weights={a: '${x}'}", "got {'a': '${x}'}"),
    ],
)
def test_refused_text_is_shown_as_it_was_written(override, got):
    with pytest.raises(ConfigError) as error:
        load_config("best_rq2_tiny", [override])
    assert str(error.value).endswith(got)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.sampled_from(PATHS), TEXT)
def test_names_of_files_are_taken_as_written(key, name):
    name = f"/folder {name}"
    config: Any = load_config("best_rq2_tiny", values={key: name})
    for part in key.split("."):
        config = getattr(config, part)
    assert config == name
    assert read_override(f"{key}={name}") == (key, name)


@pytest.mark.parametrize("key", [key for key in PATHS if key != "frozen.source"])
def test_paths_of_a_recipe_are_relative_to_it(key, tmp_path, monkeypatch):
    section, _, last = key.rpartition(".")
    outer = section.split(".")
    text = "based_on: best_rq2_tiny\n" + "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(outer))
    folder = tmp_path / "recipes of mine"
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"{text}{'  ' * len(outer)}{last}: audio/a.csv\n")
    monkeypatch.chdir(tmp_path)
    config: Any = load_config("recipes of mine/mine.yaml")
    for part in key.split("."):
        config = getattr(config, part)
    assert config == os.path.join(folder, "audio/a.csv")


def test_numbers_and_keys_of_yaml():
    """YAML 1.1 would read 010 as 8, 1:30 as 90 and the keys no and 2024 as no text."""
    text = "a: 010\nb: 1:30\nc: -0x1F\nd: 1_000\ne: 0o17\nno: 1\n2024: 2\n1.5: {on: 3, ~: 4}\n"
    found = read_yaml(text, "x")
    assert found == {
        "a": 10, "b": "1:30", "c": -31, "d": 1000, "e": 15, "no": 1, "2024": 2, "1.5": {"on": 3, "~": 4},
    }  # fmt: skip
    assert read_yaml(write_yaml(found), "x") == found
    assert read_override("train.steps=0100") == ("train.steps", 100)
