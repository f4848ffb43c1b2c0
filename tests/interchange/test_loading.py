"""The opener: X-ARES files, modules with our interface, and what is refused. Layers of our own encoders in one pass."""

import re

import pytest
import torch
from model_kinds import config_of, model_of

import bestrq2
from bestrq2 import export
from bestrq2.config import ConfigError
from bestrq2.interchange import open_encoder, open_source
from bestrq2.interchange.adapters import cut_windows
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.interchange.xares import write_encoder_module

MODULE = '''
import torch

class Coarse(torch.nn.Module):
    """100 ms energies in two channels."""

    sampling_rate, output_dim, hop_size_in_ms = 16000, 2, 100.0

    def encode(self, waveform, lengths):
        frames = waveform[:, : waveform.shape[1] // 1600 * 1600].unflatten(1, (-1, 1600)).square().mean(2)
        return torch.stack((frames, frames.sqrt()), -1), lengths // 1600

class Layered(Coarse):
    depth = 2

    def encode_layers(self, waveform, lengths=None, layers=None):
        features, counts = self.encode(waveform, lengths)
        return torch.stack([features if layer is None else layer + 2 + features for layer in layers]), counts

class Fast(Coarse):
    hop_size_in_ms = 50.0

class Drifting(Coarse):
    hop_size_in_ms = 25.0
    def encode(self, waveform, lengths):
        count = waveform.shape[1] // 395
        frames = waveform[:, : 395 * count].unflatten(1, (-1, 395)).square().mean(2)[:, :, None]
        return frames.expand(-1, -1, self.output_dim), lengths // 395

class Endless(Coarse):
    def encode(self, waveform, lengths):
        features, counts = super().encode(waveform, lengths)
        return features / 0, counts

class Wide(Coarse):
    output_dim = 3

class Silent(torch.nn.Module):
    sampling_rate, output_dim, hop_size_in_ms = 16000, 2, 100.0

class Alone(Coarse):
    def encode(self, waveform, lengths):
        return super().encode(waveform, lengths)[0]

class Asking(Coarse):
    def __init__(self, width):
        super().__init__()

def number():
    return 3
'''


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "case.py"
    path.write_text(MODULE)
    return path


def test_frozen_or_trainable(module, tmp_path):
    path = tmp_path / "encoder.safetensors"
    write_encoder_file(path, config_of("strips"), model_of("strips").state_dict())
    frozen, trained = bestrq2.load(path), bestrq2.load(path, trainable=True)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert trained.training
    trained.encode(0.1 * torch.randn(2, 16000))[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize("given", [{"trainable": True}, {"published_positions": True}, {"heads": 3}, {"hop_length": 9}])
def test_arguments_without_a_use_are_refused(given, module, tmp_path):
    name, value = next(iter(given.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} needs an encoder of bestrq2, got ModuleAdapter"):
        bestrq2.load(f"{module}:Coarse", **given)
    if name == "trainable":
        return
    path = tmp_path / "encoder.safetensors"
    write_encoder_file(path, config_of("conformer"), model_of("conformer").state_dict())
    with pytest.raises(ConfigError, match=f"{name}.*(states {name}=|ViT)"):
        bestrq2.load(path, **given)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path, capsys):
    path, weights = tmp_path / "encoder.safetensors", model_of("strips").state_dict()
    name = next(name for name in weights if name.endswith("qkv.weight"))
    weights[name] = weights[name].clone()
    weights[name][3, 1] = value
    write_encoder_file(path, config_of("strips"), weights)
    said = f"{name.removeprefix('encoder.')}' holds NaN or infinity in 1 of {weights[name].numel()} values"
    with pytest.raises(ConfigError, match=said):
        bestrq2.load(path)
    assert export.main([str(path), "--published", str(tmp_path / "out.safetensors")]) == 2
    assert "NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_modules_by_file_and_by_name(module, monkeypatch):
    waveform, lengths = 0.1 * torch.randn(2, 8000), torch.tensor([8000, 5000])
    energies = waveform.unflatten(1, (5, 1600)).square().mean(2)
    monkeypatch.syspath_prepend(str(module.parent))
    for source in (f"{module}:Coarse", "case:Coarse"):
        encoder = open_encoder(source)
        features, counts = encoder.encode(waveform, lengths)
        assert counts.tolist() == [5, 3]
        torch.testing.assert_close(features[0, :, 0], energies[0])
        torch.testing.assert_close(features[1, :3, 0], energies[1, :3])
        assert not features[1, 3:].any()
        with pytest.raises(ValueError, match="shows no layers"):
            encoder.encode(waveform, layer=0)
    layers, _ = open_encoder(f"{module}:Layered").encode_layers(waveform, lengths)
    torch.testing.assert_close(layers[:2, 0] - layers[2, 0], torch.tensor([2.0, 3.0])[:, None, None].expand(2, 5, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Fast", r"hop_size_in_ms is 50, but 2 more seconds of audio give 20 more frames, expected about 40"),
        ("Drifting", "hop_size_in_ms is 25, but 8 more seconds of audio give 324 more frames, expected about 320"),
        ("Endless", "not finite"),
        (
            "Wide",
            r"fails on 1 s of noise: expected features \(1, frames, output_dim = 3\) of one clip, got \(1, 10, 2\)",
        ),
        ("Alone", r"fails on 1 s of noise: expected encode to return \(features, lengths\), got Tensor"),
        ("Asking", "Asking: expected a class or function that needs no arguments, but: missing .*'width'"),
        ("Silent", "has no encode"),
        ("number", r"expected a torch\.nn\.Module, got int"),
        ("Absent", "Absent"),
    ],
)
def test_modules_that_are_not_what_they_say(name, message, module):
    with pytest.raises(ConfigError, match=message):
        open_encoder(f"{module}:{name}")


def test_sources_that_do_not_exist(module, tmp_path):
    with pytest.raises(ConfigError, match="expected one name ending in 'Encoder', found 0"):
        open_encoder(module)
    with pytest.raises(ConfigError, match="no such file"):
        open_encoder(tmp_path / "absent.py")
    with pytest.raises(ConfigError, match="No module named 'nowhere'"):
        open_encoder("nowhere:Encoder")


def test_names_that_a_file_does_not_have(module, tmp_path):
    offered = "Coarse, Layered, Fast, Drifting, Endless, Wide, Silent, Alone, Asking, number"
    for name, told in (("Coarze", "no 'Coarze'"), ("torch", "no class or function 'torch'")):
        with pytest.raises(ConfigError, match=f"^{re.escape(str(module))} has {told}; it has {offered}$"):
            open_encoder(f"{module}:{name}")
    with pytest.raises(ConfigError, match=r"^torch\.nn has no 'Liner'; it has .*Linear"):
        open_encoder("torch.nn:Liner")


def test_load_names_the_opener_of_other_models(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ConfigError, match=r"cannot be read|wav2vec2|transformers"):
        bestrq2.load(tmp_path)
    assert export.main([str(tmp_path), "--onnx", str(tmp_path / "a.onnx")]) == 2
    assert "another model" in capsys.readouterr().err


def test_xares_file(encoder_file, tmp_path):
    source = open_source(encoder_file)
    write_encoder_module(tmp_path / "mine.py", source.config, source.weights, "xares")
    waveform, lengths = 0.1 * torch.randn(2, 40000), torch.tensor([40000, 23000])
    features, counts = open_encoder(tmp_path / "mine.py").encode(waveform, lengths)
    expected, expected_counts = bestrq2.load(encoder_file).encode(waveform, lengths)
    assert counts.tolist() == expected_counts.tolist()
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_layers_of_our_own_encoders(encoder_file):
    encoder = open_encoder(encoder_file)
    waveform, lengths = 0.1 * torch.randn(2, 70000), torch.tensor([70000, 23000])
    layers, counts = encoder.encode_layers(waveform, lengths)
    assert len(layers) == encoder.depth + 1
    for number in [*range(encoder.depth), None]:
        expected, expected_counts = encoder.encode(waveform, lengths, layer=number)
        assert torch.equal(layers[-1 if number is None else number], expected)
        assert torch.equal(counts, expected_counts)
    assert not torch.equal(layers[0], layers[1])
    two, _ = encoder.encode_layers(waveform, lengths, [None, 0])
    assert torch.equal(two[0], layers[-1])
    assert torch.equal(two[1], layers[0])
    with pytest.raises(ValueError, match="at least one layer"):
        encoder.encode_layers(waveform, layers=[])


@pytest.mark.parametrize("length", [1, 99, 100, 105, 106, 199, 200, 203, 207, 1234])
def test_windows_cover_a_clip_once(length):
    frames, hop, context = 10, 10, 5
    windows = cut_windows([length], hop, frames, context)
    assert windows[0].begin == 0
    assert windows[-1].end == length
    place = 0
    for window in windows:
        assert window.first == place  # frames follow each other
        assert window.begin == (window.first - window.skip) * hop  # and stand where their audio does
        assert window.end - window.begin <= frames * hop + context
        place += window.keep or 0
    if len(windows) > 1:
        assert windows[-1].end - windows[-1].begin > (frames - 1) * hop  # no short window
        assert windows[-1].skip < frames
