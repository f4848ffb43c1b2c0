"""The transformers folder: the same features by AutoModel, by bestrq2.load, and from the file it was made of."""

import json

import numpy as np
import pytest
import torch

import bestrq2
from bestrq2 import export


@pytest.fixture(scope="module")
def folder(encoder_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder") / "my-encoder"
    assert export.main([str(encoder_file), "--hf", str(folder)]) == 0
    return folder


def ragged():
    waveform = 0.1 * torch.randn(3, 40000)
    lengths = torch.tensor([40000, 23456, 3000])
    for clip, length in zip(waveform, lengths):
        clip[length:] = 0
    return waveform, lengths


def test_opens_without_transformers(encoder_file, folder):
    waveform, lengths = ragged()
    expected, expected_lengths = bestrq2.load(encoder_file).encode(waveform, lengths)
    features, frames = bestrq2.load(folder).encode(waveform, lengths)
    assert torch.equal(frames, expected_lengths)
    assert torch.equal(features, expected)
    document = json.loads((folder / "config.json").read_text())
    assert document["hidden_size"] == expected.shape[2]
    assert set(document["auto_map"]) == {"AutoConfig", "AutoModel"}
    for name in (*document["auto_map"].values(), "feature_extraction_bestrq2.BestRQ2FeatureExtractor"):
        module, attribute = name.split(".")
        assert f"class {attribute}(" in (folder / f"{module}.py").read_text()


@pytest.mark.usefixtures("transformers_modules")
def test_auto_model(encoder_file, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    waveform, lengths = ragged()
    expected, frames = bestrq2.load(encoder_file).encode(waveform, lengths)
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not model.training
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    clips = [clip[:length].numpy() for clip, length in zip(waveform, lengths)]
    inputs = extractor(clips, sampling_rate=16000, return_tensors="pt")
    assert inputs["attention_mask"].sum(1).tolist() == lengths.tolist()
    output = model(**inputs)
    np.testing.assert_allclose(output.last_hidden_state.detach(), expected, atol=1e-5)
    assert output.attention_mask.sum(1).tolist() == frames.tolist()
    means = torch.stack([row[:count].mean(0) for row, count in zip(expected, frames)])
    np.testing.assert_allclose(output.pooler_output.detach(), means, atol=1e-5)
    output.pooler_output.sum().backward()  # it can be fine-tuned
    assert torch.equal(model(**inputs, output_hidden_states=None).last_hidden_state, output.last_hidden_state)
    assert sum(p.grad is not None for p in model.parameters()) == len(list(model.parameters()))

    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    torch.testing.assert_close(again(**inputs).last_hidden_state, output.last_hidden_state)
    with pytest.raises(ValueError, match="16000 Hz, got 8000"):
        extractor(clips, sampling_rate=8000)
