"""Local folders of transformers audio models as encoders, one tiny random model of each family."""

import hashlib
import json
import shutil
import socket

import pytest
import torch
from safetensors import safe_open

from bestrq2 import embed, train
from bestrq2.config import ConfigError
from bestrq2.data import tiny_dataset
from bestrq2.errors import CheckpointError
from bestrq2.interchange import open_encoder
from bestrq2.interchange.tensors import module_digest
from bestrq2.models.readout import averaged_rows, parse_layers

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONV = {"conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 2}
LAYER_NORM = {
    **SMALL,
    **CONV,
    "num_conv_pos_embeddings": 16,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
GROUP_NORM = {**SMALL, **CONV, "num_conv_pos_embeddings": 16}


def waveforms(mask):
    return transformers.Wav2Vec2FeatureExtractor(return_attention_mask=mask)


def build(family):
    t = transformers
    if family == "wav2vec2":
        return t.Wav2Vec2Model(t.Wav2Vec2Config(**GROUP_NORM)), waveforms(False)
    if family == "wav2vec2-adapter":
        more = {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 48}
        return t.Wav2Vec2Model(t.Wav2Vec2Config(**LAYER_NORM, **more)), waveforms(True)
    if family == "sew":
        kernels = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        return t.SEWModel(t.SEWConfig(**SMALL, **kernels, conv_dim=(16,) * 13)), waveforms(False)
    if family == "wav2vec2-layer":
        return t.Wav2Vec2Model(t.Wav2Vec2Config(**LAYER_NORM)), waveforms(True)
    if family == "hubert":
        return t.HubertModel(t.HubertConfig(**LAYER_NORM)), waveforms(True)
    if family == "wavlm":
        return t.WavLMModel(t.WavLMConfig(**LAYER_NORM)), waveforms(True)
    if family == "data2vec":
        config = t.Data2VecAudioConfig(**SMALL, **CONV, conv_pos_kernel_size=5)
        return t.Data2VecAudioModel(config), waveforms(True)
    if family == "wav2vec2-bert":
        config = t.Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=160, conv_depthwise_kernel_size=5)
        return t.Wav2Vec2BertModel(config), t.SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2)
    if family == "ast":
        return t.ASTModel(t.ASTConfig(**SMALL)), t.ASTFeatureExtractor()
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    wide = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 50}
    return t.WhisperModel(t.WhisperConfig(**sizes, **tokens, **wide)), t.WhisperFeatureExtractor()


# family: hop in ms, how clips of several lengths go through it, frames of clips of 3 s, 1 s and 1.2 s
FAMILIES = {
    "wav2vec2": (20, "equal", [149, 49, 59]),
    "wav2vec2-layer": (20, "masked", [149, 49, 59]),
    "hubert": (20, "masked", [149, 49, 59]),
    "wavlm": (20, "masked", [149, 49, 59]),
    "data2vec": (20, "equal", [149, 49, 59]),
    "wav2vec2-bert": (20, "equal", [149, 49, 59]),
    "ast": (100, "equal", [30, 10, 12]),
    "whisper": (20, "equal", [150, 50, 60]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    for family in FAMILIES:
        for part in build(family):
            part.save_pretrained(root / family)
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_features(family, folders):
    hop, group, frames = FAMILIES[family]
    encoder = open_encoder(folders / family)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.depth) == (16000, 32, 2)
    assert encoder.hop_size_in_ms == hop
    assert encoder.group == group
    waveform, lengths = 0.1 * torch.randn(3, 48000), torch.tensor([48000, 16000, 19200])
    layers, counts = encoder.encode_layers(waveform, lengths)
    assert counts.tolist() == frames
    assert layers.shape == (3, 3, max(frames), 32)
    assert torch.equal(encoder.encode(waveform, lengths, layer=1)[0], layers[1])
    assert torch.equal(encoder.encode(waveform, lengths)[0], layers[-1])
    assert not layers[:, 1, frames[1] :].any()
    for number, count in enumerate(frames):  # alone as in the batch
        alone, one = encoder.encode_layers(waveform[number : number + 1, : lengths[number]])
        assert one.tolist() == [count]
        torch.testing.assert_close(alone[:, 0], layers[:, number, :count], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "samples", "frames"), [("ast", 81_440, 51), ("whisper", 465_600, 1455)])
def test_frames_do_not_follow_the_default_dtype(family, samples, frames, folders):
    encoder, waveform = open_encoder(folders / family), torch.zeros(1, samples)
    try:
        torch.set_default_dtype(torch.bfloat16)
        counts = encoder.encode(waveform)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert counts.tolist() == [frames]


@pytest.mark.parametrize("family", ["wav2vec2-layer", "wav2vec2-bert", "ast", "whisper"])
def test_features_are_those_of_the_model(family, folders):
    """The model called as its own documentation says, without our code."""
    model = transformers.AutoModel.from_pretrained(folders / family).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folders / family)
    waveform = 0.1 * torch.randn(24000)
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        output = (model.get_encoder() if family == "whisper" else model)(**inputs, output_hidden_states=True)
    layers, counts = open_encoder(folders / family).encode_layers(waveform[None])
    for number, state in ((0, output.hidden_states[1]), (2, output.last_hidden_state)):
        if family == "ast":
            # 12 frequency rows by 101 columns of 100 ms behind two other tokens; 148 frames of audio reach column 14.
            state = state[:, 2:].reshape(1, 12, 101, 32).mean(1)
        torch.testing.assert_close(layers[number, 0], state[0, : int(counts)], atol=1e-6, rtol=0)
    assert int(counts) == {"wav2vec2-layer": 74, "wav2vec2-bert": 74, "ast": 15, "whisper": 75}[family]


def test_a_hop_that_four_seconds_are_no_multiple_of(tmp_path):
    """Moonshine's 384 samples: measured over 4 s they were 385.5, so that each window of 30 s lost five frames."""
    sizes = {
        f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("num_hidden_layers", "num_attention_heads")
    }
    config = transformers.MoonshineConfig(hidden_size=32, intermediate_size=48, vocab_size=50, **sizes)
    for part in (transformers.MoonshineModel(config), waveforms(True)):
        part.save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    assert encoder.hop_size_in_ms == 24
    samples = 16000 * 95 + 5000
    assert encoder.encode(torch.zeros(1, samples))[1].tolist() == [(((samples - 127) // 64 - 6) // 3 - 2) // 2 + 1]


@pytest.mark.parametrize("family", ["wav2vec2-adapter", "sew"])
def test_blocks_with_other_frames_than_the_final_output(family, tmp_path):
    """They cannot stand beside it: --layers all ended with an error of torch.stack."""
    for part in build(family):
        part.save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    assert (encoder.depth, encoder.output_dim) == (0, 48 if family == "wav2vec2-adapter" else 32)
    waveform = 0.1 * torch.randn(1, 32000)
    assert torch.equal(encoder.encode(waveform, layers="all")[0], encoder.encode(waveform)[0])
    with pytest.raises(ConfigError, match="no blocks in this encoder"):
        parse_layers("0,final", encoder.depth)


def test_no_choice_of_rows_is_offered(folders):
    """The rows of AST are averaged whatever is asked for: neither notes nor index.csv may say otherwise."""
    encoder, clip = open_encoder(folders / "ast"), 0.1 * torch.randn(1, 16000)
    assert encoder.encode(clip, rows="concatenate")[0].shape == encoder.encode(clip)[0].shape
    assert averaged_rows(encoder, None) is None
    assert getattr(encoder, "rows", 1) == 1


@pytest.mark.parametrize("family", ["wav2vec2-layer", "ast", "whisper"])
def test_long_clips_go_through_in_windows(family, folders):
    encoder = open_encoder(folders / family)
    window, hop = encoder.window_frames, round(encoder.hop_samples)
    samples = (2 * window + 7) * hop + 3
    waveform = 0.1 * torch.randn(1, samples)
    features, counts = encoder.encode(waveform)
    assert abs(int(counts) * hop - samples) <= 2 * hop
    first, _ = encoder.encode(waveform[:, : window * hop + encoder.context_samples])
    torch.testing.assert_close(features[:, :window], first[:, :window], atol=1e-5, rtol=1e-4)
    # The last window reaches back: its frames stand where the audio that they describe does.
    back = -(-samples // hop) - window
    last, _ = encoder.encode(waveform[:, back * hop :])
    kept = int(counts) - 2 * window
    torch.testing.assert_close(features[:, -kept:], last[:, -kept:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type(folders, dtype):
    encoder, clip = open_encoder(folders / "wav2vec2"), 0.1 * torch.randn(1, 16000)
    expected, frames = encoder.encode(clip)
    features, found = encoder.to(dtype).encode(clip)
    assert torch.equal(found, frames)
    assert features.dtype == torch.float32
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-4}[dtype]
    assert (features - expected).abs().max() < tolerance * expected.abs().max()


def test_short_clips_are_extended_with_silence(folders):
    for family in FAMILIES:
        features, counts = open_encoder(folders / family).encode(0.1 * torch.randn(2, 300), torch.tensor([300, 1]))
        assert int(counts.min()) >= 1, family
        assert features.isfinite().all(), family


HEAD = ["model.predictor.depth=1", "model.predictor.width=64", "model.predictor.hidden=96", "train.batch_size=4"]
QUICK = [*HEAD, "train.steps=2", "train.log_every=2", "train.save_every=2", "model.targets.codebook_size=32"]


@pytest.mark.usefixtures("plain_training")
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_head_changes_nothing(family, folders, tmp_path):
    folder = folders / family
    before, digest = contents(folder), module_digest(open_encoder(folder))
    overrides = [*QUICK, "model.front_end.mean=-47", "model.front_end.std=31"]
    assert train.main(["--runs", str(tmp_path), "--name", "head", "--frozen-encoder", str(folder), *overrides]) == 0
    assert contents(folder) == before
    proof = json.loads((tmp_path / "head" / "frozen.json").read_text())
    assert proof["sha256_before"] == proof["sha256_after"] == digest
    cached = next((tmp_path / "head" / "embeddings").rglob("*.safetensors"))
    with safe_open(cached, framework="pt") as file:
        assert file.get_slice("context").get_shape()[1] == 32
        # One embedding per target column of 40 ms, whatever the model's rate.
        assert file.get_slice("context").get_shape()[0] == file.get_slice("codes").get_shape()[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_reaches_it(family, folders):
    encoder = open_encoder(folders / family)
    before = module_digest(encoder)
    waveform = (0.1 * torch.randn(1, 16000)).requires_grad_()
    features, _ = encoder.train().encode(waveform)
    assert not encoder.model.training
    scale = torch.ones(32, requires_grad=True)
    (features * scale).square().mean().backward()
    assert scale.grad is not None
    assert waveform.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    assert module_digest(encoder) == before


def test_weights_that_the_file_lacks(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(folders / "wav2vec2", folder)
    tensors = load_file(folder / "model.safetensors")
    # Published fine-tuned models lack the embedding of masked frames; it is drawn alike every time.
    del tensors["masked_spec_embed"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert module_digest(open_encoder(folder)) == module_digest(open_encoder(folder))
    del tensors["encoder.layers.0.attention.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of the encoder: encoder\.layers\.0\.attention\.k_proj"):
        open_encoder(folder)


CODE = """
from pathlib import Path
from transformers import Wav2Vec2Model
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
class Own(Wav2Vec2Model):
    pass
"""


def test_code_of_a_folder_runs_only_where_trusted(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder, marker = tmp_path / "own", tmp_path / "marker"
    shutil.copytree(folders / "wav2vec2", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    own = CODE + "from transformers import Wav2Vec2Config\nclass OwnConfig(Wav2Vec2Config):\n"
    own += "    model_type = 'unheard_of'\nOwn.config_class = OwnConfig\n"
    (folder / "own.py").write_text(own.format(marker=str(marker)))
    arguments = [str(folder), tiny_dataset()[0].path, "--out", str(tmp_path / "out")]
    assert embed.main(arguments) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()
    assert embed.main([*arguments, "--trust-remote-code"]) == 0
    assert marker.exists()


def test_refusals(folders, tmp_path, monkeypatch):
    folder = tmp_path / "pickled"
    shutil.copytree(folders / "wav2vec2", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="never opened here"):
        open_encoder(folder)
    shutil.copytree(folders / "wav2vec2", tmp_path / "no_extractor")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "no_extractor" / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="transformers cannot open it"):
        open_encoder(tmp_path / "no_extractor")
    text = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=9))
    text.save_pretrained(tmp_path / "text")
    waveforms(True).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="BertModel gives no frame features"):
        open_encoder(tmp_path / "text")
    with pytest.raises(ValueError, match="layer must lie in"):
        open_encoder(folders / "hubert").encode(torch.randn(1, 16000), layer=2)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'bestrq2\[transformers\]'"):
        open_encoder(folders / "wav2vec2")


@pytest.mark.parametrize(("content", "told"), [(b"version https://git-lfs", "git lfs pull"), (b"\1" * 9, "damaged")])
def test_what_is_there_instead_of_weights(folders, tmp_path, content, told):
    shutil.copytree(folders / "wav2vec2", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        open_encoder(tmp_path / "broken")


def test_weights_that_are_not_finite_are_refused(folders, tmp_path):
    model = transformers.AutoModel.from_pretrained(folders / "wav2vec2")
    with torch.no_grad():
        model.encoder.layers[1].final_layer_norm.bias[0] = float("nan")
    shutil.copytree(folders / "wav2vec2", tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"layers\.1\.final_layer_norm\.bias' holds NaN or infinity in 1 of 32"):
        open_encoder(tmp_path / "broken")
