"""Encoder files for X-ARES and XARES-LLM: our check, theirs where installed, and files that must fail."""

import pickle
import sys
from dataclasses import replace

import pytest
import torch

import bestrq2
from bestrq2 import export
from bestrq2.config import ConfigError
from bestrq2.errors import CheckpointError
from bestrq2.interchange.xares import _open_class, check_encoder_module, write_encoder_module


@pytest.fixture(scope="module", params=["xares", "xares-llm"])
def module_file(request, encoder_file, tmp_path_factory):
    out = (
        tmp_path_factory.mktemp(request.param) / "encoders" / f"{encoder_file.parent.name.rstrip('0123456789')}_mine.py"
    )
    source = bestrq2.interchange.open_source(encoder_file)
    out.parent.mkdir()
    write_encoder_module(out, source.config, source.weights, request.param)
    return out


def test_own_check(module_file):
    assert check_encoder_module(module_file, spawn=False) == []


def test_features_are_those_of_the_encoder(encoder_file, module_file):
    module, encoder = _open_class(module_file)(), bestrq2.load(encoder_file)
    audio, lengths = 0.1 * torch.randn(2, 30000), torch.tensor([30000, 17000])
    if "llm" not in module_file.parent.parent.name:
        assert torch.equal(module(audio), encoder.encode(audio)[0])
        assert torch.equal(module(audio[0]), module(audio[:1]))
        return
    mask = (torch.arange(30000) < lengths[:, None]).int()
    features, frames = module(audio, mask)
    expected, expected_frames = encoder.encode(audio, lengths)
    assert torch.equal(features, expected)
    assert frames.dtype == mask.dtype
    assert frames.sum(1).tolist() == expected_frames.tolist()
    assert module(audio)[1].all()
    with pytest.raises(ValueError, match="behind padding"):
        module(audio, mask.flip(1))
    with pytest.raises(ValueError, match="shape"):
        module(audio, mask[:, 1:])


def test_pickled_by_file(module_file):
    module = _open_class(module_file)()
    again = pickle.loads(pickle.dumps(module))
    assert type(again).__name__ == type(module).__name__
    assert not again.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.slow
def test_command_checks_in_a_spawned_process(encoder_file, tmp_path, capsys):
    if "strips" not in str(encoder_file):
        pytest.skip("one encoder suffices")
    assert (
        export.main([str(encoder_file), "--xares", str(tmp_path / "a.py"), "--xares-llm", str(tmp_path / "b.py")]) == 0
    )
    assert capsys.readouterr().out.count("checked for") == 2


def test_checker_of_xares(module_file, monkeypatch):
    checker = pytest.importorskip("xares.audio_encoder_checker")
    from xares.utils import attr_from_py_path

    if "llm" in module_file.parent.parent.name:
        pytest.skip("the other interface")
    # As `python -m xares.run encoders/mine.py` does from the folder above.
    monkeypatch.chdir(module_file.parent.parent)
    monkeypatch.syspath_prepend(str(module_file.parent.parent))
    for name in [name for name in sys.modules if name.split(".")[0] == "encoders"]:
        monkeypatch.delitem(sys.modules, name)
    encoder = attr_from_py_path(f"encoders/{module_file.name}", endswith="Encoder")()
    assert checker.check_audio_encoder(encoder)


def test_checker_of_xares_llm(module_file):
    checker = pytest.importorskip("xares_llm.audio_encoder_checker")
    if "llm" not in module_file.parent.parent.name:
        pytest.skip("the other interface")
    checker.check_audio_encoder(_open_class(module_file)())


FAULTS = {
    "data type": "return super().forward(audio).bfloat16()",
    "hop": "return super().forward(audio)[:, ::2]",
    "not finite": "return super().forward(audio) / audio.new_zeros(1)",
    "batch": "x = super().forward(audio); return x + x.mean(0)",
    "gradients": None,
}
MESSAGES = {
    "data type": "bfloat16",
    "hop": "frames of",
    "not finite": "finite",
    "batch": "alone and in a batch",
    "gradients": "takes gradients",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_own_check_finds_what_theirs_misses(fault, encoder_file, tmp_path):
    if "strips" not in str(encoder_file):
        pytest.skip("one encoder suffices")
    source = bestrq2.interchange.open_source(encoder_file)
    out = tmp_path / "broken.py"
    write_encoder_module(out, source.config, source.weights, "xares")
    if fault == "gradients":
        method = "def __init__(self):\n        super().__init__(); self.requires_grad_(True)\n"
    else:
        method = f"def forward(self, audio):\n        {FAULTS[fault]}\n"
    out.write_text(f"{out.read_text()}\n    {method}")
    problems = check_encoder_module(out, spawn=False)
    assert any(MESSAGES[fault] in problem for problem in problems), problems


def test_names(encoder_file, tmp_path):
    source = bestrq2.interchange.open_source(encoder_file)
    with pytest.raises(ConfigError, match="identifier"):
        write_encoder_module(tmp_path / "my-encoder.py", source.config, source.weights, "xares")
    write_encoder_module(tmp_path / "a.py", source.config, source.weights, "xares")
    write_encoder_module(tmp_path / "b.py", source.config, source.weights, "xares")
    name = next(iter(source.weights))
    write_encoder_module(tmp_path / "c.py", source.config, {**source.weights, name: source.weights[name] + 1}, "xares")
    own = source.config.model.encoder
    other = replace(own, join_rows="concatenate" if own.join_rows == "average" else "average")
    config = replace(source.config, model=replace(source.config.model, encoder=other))
    write_encoder_module(tmp_path / "d.py", config, source.weights, "xares")
    lower = replace(source.config.model.front_end, floor_db=source.config.model.front_end.floor_db - 10)
    config = replace(source.config, model=replace(source.config.model, front_end=lower))
    write_encoder_module(tmp_path / "e.py", config, source.weights, "xares")
    names = [_open_class(tmp_path / f"{letter}.py").__name__ for letter in "abcde"]
    assert names[0] == names[1]  # the same features, the same cache of X-ARES
    assert len(set(names)) == 4  # other weights, or other features of the same weights: another
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        _open_class(tmp_path / "a.py")()
