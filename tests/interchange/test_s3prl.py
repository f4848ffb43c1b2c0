"""The s3prl upstream: its interface exactly, and s3prl itself where installed."""

import subprocess
import sys
import types

import pytest
import torch

import bestrq2
from bestrq2 import export
from bestrq2.config import load_config
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.models import build_model


@pytest.fixture(scope="module")
def folder(encoder_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("s3prl") / "tiny_encoder"
    assert export.main([str(encoder_file), "--s3prl", str(out)]) == 0
    return out


@pytest.fixture
def upstream(folder):
    # What `torch.hub.load(folder, "tiny_encoder", source="local")` does, without its cache.
    return torch.hub._load_local(str(folder), "tiny_encoder")


def test_interface(upstream, encoder_file):
    encoder = bestrq2.load(encoder_file)
    wavs = [0.1 * torch.randn(samples) for samples in (16000, 40000, 23456, 800)]
    rate = upstream.get_downsample_rates("hidden_states")
    assert isinstance(rate, int)
    assert rate == encoder.hop_size_in_ms * 16
    with torch.no_grad():
        output = upstream(wavs)
    states = output["hidden_states"]
    assert isinstance(states, list)
    assert len(states) == encoder.depth + 1
    assert torch.equal(output["last_hidden_state"], states[-1])
    frames = -(-40000 // rate)
    for state in states:
        assert state.shape == (4, frames, encoder.output_dim)
        assert state.dtype == torch.float32
    for number, wav in enumerate(wavs):
        for layer, state in zip([*range(encoder.depth), None], states):
            expected = encoder.encode(wav[None], layer=layer)[0][0]
            own = -(-len(wav) // rate)
            kept = min(own, len(expected))
            torch.testing.assert_close(state[number, :kept], expected[:kept], atol=1e-5, rtol=1e-5)
            for extra in range(kept, own):  # a frame more than ours at most, the last one again
                assert torch.equal(state[number, extra], state[number, kept - 1])
            assert own - kept <= 1
            assert not state[number, own:].any()


def test_audio_in_another_type(upstream):
    """Half precision has lost quiet sounds already, and integers have another full scale: neither passes unsaid."""
    wav = 0.1 * torch.randn(9000)
    with pytest.warns(UserWarning, match="the waveform is float16"):
        upstream.half()([wav.half()])
    with pytest.raises(ValueError, match=r"divide samples of int16 by 2\*\*15"):
        upstream([(wav * 2**15).short()])


def test_can_be_finetuned(upstream):
    assert all(parameter.requires_grad for parameter in upstream.parameters())
    upstream.train()([torch.randn(9000), torch.randn(5000)])["hidden_states"][-1].square().mean().backward()
    used = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in upstream.parameters()]
    assert sum(used) > len(used) // 2


def test_folder_is_found_as_a_package(folder, encoder_file):
    """As s3prl/hub.py does: `from s3prl.upstream.NAME.hubconf import *` gives the entry and no other name."""
    if "strips" not in str(encoder_file):
        pytest.skip("one encoder suffices")
    code = (
        "from tiny_encoder.hubconf import *; import torch\n"
        "m = tiny_encoder(ckpt=None, model_config=None, refresh=False)\n"
        "print([n for n in dir() if not n.startswith('_') and n not in ('m', 'torch')], type(m).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder.parent, check=False
    )
    assert result.stdout.strip() == "['tiny_encoder'] UpstreamExpert", result.stderr


def test_refusals(encoder_file, tmp_path, capsys):
    assert export.main([str(encoder_file), "--s3prl", str(tmp_path / "no-name")]) == 2
    assert "function in hubconf.py" in capsys.readouterr().err
    config = load_config("best_rq2_tiny", ["model.front_end.sampling_rate=8000", "model.front_end.f_max=4000"])
    write_encoder_file(tmp_path / "slow.safetensors", config, build_model(config).state_dict())
    assert export.main([str(tmp_path / "slow.safetensors"), "--s3prl", str(tmp_path / "slow")]) == 2
    assert "16000 Hz, but this encoder expects 8000 Hz" in capsys.readouterr().err


def test_s3prl_itself(folder, upstream, monkeypatch):
    torchaudio = pytest.importorskip("torchaudio")
    # s3prl 0.4.18 names both at import, and torchaudio has had neither since 2.9.
    monkeypatch.setattr(torchaudio, "set_audio_backend", lambda name: None, raising=False)
    effects = types.ModuleType("torchaudio.sox_effects")
    effects.apply_effects_tensor = None
    monkeypatch.setitem(sys.modules, "torchaudio.sox_effects", effects)
    nn = pytest.importorskip("s3prl.nn")
    hub = pytest.importorskip("s3prl.hub")
    monkeypatch.setattr(hub, "tiny_encoder", lambda **options: upstream, raising=False)
    model = nn.S3PRLUpstream("tiny_encoder").eval()
    for samples in ([16000, 9000], [700, 300], [31999, 32001]):
        wavs = torch.randn(2, max(samples))
        states, lengths = model(wavs, torch.tensor(samples))
        assert len(states) == model.num_layers
        features, _ = nn.Featurizer(model)(states, lengths)
        assert features.isfinite().all()
