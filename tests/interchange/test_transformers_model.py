"""The exported transformers model does what models of that library do. Parts need peft and accelerate."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bestrq2
from bestrq2 import BestRQError, export
from bestrq2.config import ConfigError

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")
RATE = 16000
KIND = pytest.mark.parametrize("encoder_file", ["strips", "conformer"], indirect=True)
pytestmark = [KIND, pytest.mark.usefixtures("transformers_modules")]


@pytest.fixture(scope="module")
def exported(encoder_file, tmp_path_factory):
    """Folder, our encoder, a ragged batch and its inputs for the model."""
    folder = tmp_path_factory.mktemp("exported") / "my-encoder"
    assert export.main([str(encoder_file), "--hf", str(folder)]) == 0
    lengths = torch.tensor([30000, 23456, 5000])
    waveform = 0.1 * torch.randn(3, 30000, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(30000) < lengths[:, None]).long()
    inputs = {"input_values": waveform * mask, "attention_mask": mask}
    return SimpleNamespace(folder=folder, own=bestrq2.load(folder), lengths=lengths, inputs=inputs)


def open_model(folder, **options):
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def open_extractor(folder):
    return transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)


def error_of(found, expected):
    return float((found.detach().float() - expected).norm() / expected.norm())


@torch.no_grad()
def test_hidden_states_and_tuples(exported):
    model = open_model(exported.folder)
    waveform, lengths, depth = exported.inputs["input_values"], exported.lengths, exported.own.depth
    layers = ["embeddings", *range(depth), None]
    expected, frames = exported.own.encode_layers(waveform, lengths, layers)
    output = model(**exported.inputs, output_hidden_states=True)
    assert isinstance(output, transformers.utils.ModelOutput)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(torch.stack(output.hidden_states), expected[:-1])
    assert torch.equal(output[0], expected[-1])
    assert torch.equal(output["last_hidden_state"], output[0])
    assert output.attention_mask.sum(1).tolist() == frames.tolist()
    assert list(dict(output)) == ["last_hidden_state", "pooler_output", "attention_mask", "hidden_states"]
    assert model(**exported.inputs).hidden_states is None
    plain = model(**exported.inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 3
    assert len(model(**exported.inputs, return_dict=False, output_hidden_states=True)[3]) == depth + 1
    model.config.output_hidden_states = True
    assert len(model(**exported.inputs).hidden_states) == depth + 1
    assert model(**exported.inputs, output_hidden_states=False).hidden_states is None
    model.config.return_dict = False
    assert isinstance(model(**exported.inputs), tuple)
    assert len(open_model(exported.folder, output_hidden_states=True)(**exported.inputs).hidden_states) == depth + 1


def test_arguments_that_cannot_be_used(exported):
    model = open_model(exported.folder)
    waveform, mask = exported.inputs["input_values"], exported.inputs["attention_mask"]
    for wrong, message in (
        (mask[:, :-1], r"attention_mask: expected a tensor like input_values, \(3, 30000\), got \(3, 29999\)"),
        (mask[0], "expected a tensor like input_values"),
        (mask.tolist(), "got list"),
        (mask.flip(1), "pad clips at their end, not before"),
        ((mask - 1) * 1e4, "expected ones and zeros"),
        (mask * torch.tensor([[1], [0], [1]]), "at least one sample in every row"),
    ):
        with pytest.raises(ValueError, match=message):
            model(waveform, attention_mask=wrong)
    with pytest.raises(TypeError, match="attention_maks"):
        model(waveform, attention_maks=mask)
    with pytest.raises(ValueError, match="output_attentions"):
        model(waveform, output_attentions=True)
    with pytest.raises(ValueError, match="divide samples of int16"):
        model((waveform * 32768).short())
    with pytest.raises(ValueError, match=r"expected a floating waveform \(B, S\)"):
        model(waveform[0])
    expected = model(**exported.inputs)[0]
    for kind in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        assert torch.equal(model(waveform, mask.to(kind))[0], expected)


class Decoder:
    """Stand-in for the decoder of datasets 4, which is no mapping."""

    def __init__(self, array, sampling_rate):
        self.values = {"array": array, "sampling_rate": sampling_rate}

    def __getitem__(self, name):
        return self.values[name]

    def get_all_samples(self):
        raise AssertionError("several channels, in torchcodec's form")


def test_feature_extractor(exported):
    extractor = open_extractor(exported.folder)
    clips = [row[:length].numpy() for row, length in zip(exported.inputs["input_values"], exported.lengths)]
    forms = {
        "arrays": clips,
        "float64": [clip.astype(np.float64) for clip in clips],
        "tensors": [torch.from_numpy(clip) for clip in clips],
        "lists": [clip.tolist() for clip in clips],
        "tuple": tuple(clips),
        "datasets": [{"array": clip, "sampling_rate": RATE, "path": "a.wav"} for clip in clips],
        "datasets 4": [Decoder(clip, RATE) for clip in clips],
    }
    for name, form in forms.items():
        inputs = extractor(form, sampling_rate=RATE, return_tensors="pt")
        for key, expected in exported.inputs.items():
            assert torch.equal(inputs[key].to(expected.dtype), expected), (name, key)
    single = exported.inputs["input_values"][:1]
    for one in (single[0], single[0].numpy(), single[0].tolist(), single, single.numpy(), [single[0].numpy()]):
        assert torch.equal(extractor(one, return_tensors="pt")["input_values"], single)
    cut = extractor(clips, max_length=8000, truncation=True, padding="max_length", return_tensors="np")
    assert cut["input_values"].shape == (3, 8000)
    assert cut["attention_mask"].sum(1).tolist() == [8000, 8000, 5000]
    for wrong, message in (
        ([], "at least one waveform"),
        ([np.zeros(0)], r"at least one sample, got shape \(0,\)"),
        (np.zeros((1, 2, 100)), r"mono waveforms \(S,\)"),
        (np.zeros((16000, 2), np.float32), "samples x channels as soundfile reads them"),
        (torch.zeros(9, 8), r"got shape \(9, 8\)"),
        (np.zeros(100, np.int16), "divide int16 by 32768"),
        ([0, 300, -20], "divide int16 by 32768"),
        (Decoder(clips[0], 8000), "16000 Hz, got 8000"),
        (np.array([0.0, np.nan]), "finite"),
        ({"array": clips[0], "sampling_rate": 8000}, "16000 Hz, got 8000"),
    ):
        with pytest.raises(ValueError, match=message):
            extractor(wrong)


@pytest.mark.parametrize("shard", ["50GB", "60KB"])
def test_saved_again(exported, shard, tmp_path):
    model = open_model(exported.folder)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    open_extractor(exported.folder).save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "60KB")
    expected = model(**exported.inputs)[0]
    assert torch.equal(open_model(tmp_path)(**exported.inputs)[0], expected)
    assert torch.equal(open_extractor(tmp_path)([0.5], return_tensors="pt")["input_values"], torch.tensor([[0.5]]))
    features, _ = bestrq2.load(tmp_path).encode(exported.inputs["input_values"], exported.lengths)
    assert torch.equal(features, expected.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(exported, dtype, tmp_path):
    expected, _ = exported.own.encode(exported.inputs["input_values"], exported.lengths)
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-5}[dtype]
    front = dict(exported.own.front_end.named_buffers())
    converted = {
        "from_pretrained": open_model(exported.folder, dtype=dtype),
        "to": open_model(exported.folder).to(dtype),
    }
    for model in converted.values():
        assert model.dtype == dtype
        assert {p.dtype for p in model.parameters()} == {dtype}
        for name, buffer in model.encoder.front_end.named_buffers():
            assert buffer.dtype == front[name].dtype
            assert torch.equal(buffer, front[name]), name
        output = model(**exported.inputs, output_hidden_states=True)
        assert {output[0].dtype, output.pooler_output.dtype, output.hidden_states[0].dtype} == {dtype}
        assert error_of(output.last_hidden_state, expected) < limit
        output.pooler_output.sum().backward()
    model.save_pretrained(tmp_path)
    again = open_model(tmp_path, dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(again(**exported.inputs)[0], output[0])
    assert (
        error_of(bestrq2.load(tmp_path).encode(exported.inputs["input_values"], exported.lengths)[0], expected) < limit
    )


def test_from_config_and_subclass(exported):
    """A model without weights can be trained from scratch, and a subclass's new layer is initialised."""
    config = transformers.AutoConfig.from_pretrained(exported.folder, trust_remote_code=True)
    fresh = transformers.AutoModel.from_config(config, trust_remote_code=True)
    assert torch.equal(fresh.encoder.front_end.window, exported.own.front_end.window)
    assert fresh(**exported.inputs)[0].isfinite().all()
    base = type(fresh)

    class WithHead(base):
        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(config.hidden_size, 3)
            self.post_init()

    model = WithHead.from_pretrained(exported.folder)
    assert 0 < float(model.head.weight.detach().abs().max()) < 1
    assert not model.head.bias.any()
    assert torch.equal(model(**exported.inputs)[0], open_model(exported.folder)(**exported.inputs)[0])


def test_gradient_checkpointing(exported):
    model = open_model(exported.folder)
    model(**exported.inputs).pooler_output.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.train()(**exported.inputs).pooler_output.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


class Classifier(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_values, attention_mask=None, labels=None):
        logits = self.head(self.encoder(input_values, attention_mask=attention_mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_trainer(exported, tmp_path):
    pytest.importorskip("accelerate")
    noise = torch.Generator().manual_seed(0)
    rows = [
        {"input_values": 0.2 * (label + 0.2) * torch.randn(16000, generator=noise), "labels": label}
        for label in (0, 1) * 4
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-4, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(Classifier(open_model(exported.folder)), arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert trainer.predict(rows).predictions.shape == (8, 2)


def test_peft(exported, tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["qkv", "proj"] if hasattr(exported.own, "patch_embed") else ["qkv", "fc1", "pointwise1"]
    model = peft.get_peft_model(open_model(exported.folder), peft.LoraConfig(r=4, target_modules=targets))
    before = model(**exported.inputs)[0]
    # Layers in a wrapper take PyTorch's product with bias, which rounds as another one on some processors.
    torch.testing.assert_close(before, open_model(exported.folder)(**exported.inputs)[0], rtol=1e-4, atol=1e-4)
    model(**exported.inputs).pooler_output.square().mean().backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02)
    tuned = model(**exported.inputs)[0].detach()
    assert error_of(tuned, before.detach()) > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BestRQError, match="merge_and_unload"):
        bestrq2.load(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(open_model(exported.folder), tmp_path / "adapter")
    torch.testing.assert_close(again(**exported.inputs)[0], tuned)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    features, _ = bestrq2.load(tmp_path / "merged").encode(exported.inputs["input_values"], exported.lengths)
    torch.testing.assert_close(features, tuned, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantisation(exported):
    model = open_model(exported.folder)
    expected = model(**exported.inputs)[0].detach()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert any("quantized" in type(module).__module__ for module in quantized.modules())
    with torch.no_grad():
        assert error_of(quantized(**exported.inputs)[0], expected) < 0.1


def test_accelerate(exported):
    accelerate = pytest.importorskip("accelerate")
    model = open_model(exported.folder)
    expected = model(**exported.inputs)[0]
    assert torch.equal(open_model(exported.folder, device_map="cpu")(**exported.inputs)[0], expected)
    assert torch.equal(open_model(exported.folder, low_cpu_mem_usage=True)(**exported.inputs)[0], expected)
    for buffers in (False, True):
        with accelerate.init_empty_weights(include_buffers=buffers):
            empty = transformers.AutoModel.from_config(model.config, trust_remote_code=True)
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert torch.equal(empty.eval()(**exported.inputs)[0], expected)
    with accelerate.init_empty_weights():
        empty = transformers.AutoModel.from_config(model.config, trust_remote_code=True)
    filled = accelerate.load_checkpoint_and_dispatch(empty, exported.folder, device_map={"": "cpu"})
    assert torch.equal(filled.eval()(**exported.inputs)[0], expected)


def damaged(folder, place, change):
    """A copy of the folder whose tensors are changed."""
    shutil.copytree(folder, place)
    save_file(change(load_file(place / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
    return place


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"ignore_mismatched_sizes": True}])
def test_a_damaged_file_is_refused(exported, tmp_path, options):
    def without(tensors, *names):
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(names)}

    def with_one(tensors, name, value):
        tensors[name].view(-1)[-1:] = value
        return tensors

    lost = ("front_end.mean", "front_end.std")
    place = damaged(exported.folder, tmp_path / "lost", lambda tensors: without(tensors, *lost))
    with pytest.raises(ConfigError, match=r"without 2 of them: encoder\.front_end\.mean, encoder\.front_end\.std"):
        open_model(place, **options)
    place = damaged(exported.folder, tmp_path / "empty", lambda tensors: {"encoder.front_end.mean": torch.zeros(())})
    with pytest.raises(ConfigError, match=r"expected all tensors of the encoder.*, \.\.\.$"):
        open_model(place, **(options | {"ignore_mismatched_sizes": True}))
    names = list(load_file(exported.folder / "model.safetensors"))
    for number, (name, value) in enumerate(((names[0], torch.nan), ("encoder.front_end.std", torch.inf))):
        place = damaged(exported.folder, tmp_path / str(number), lambda t, n=name, v=value: with_one(t, n, v))
        with pytest.raises(ConfigError, match=f"{name}' holds NaN or infinity in 1 of"):
            open_model(place, **options)


def test_tensors_of_other_shapes_are_initialised_where_they_can_be(exported, tmp_path):
    def changed(tensors):
        return {n: torch.zeros(3) if n.endswith(("running_var", "norm.weight")) else t for n, t in tensors.items()}

    place = damaged(exported.folder, tmp_path / "other", changed)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        open_model(place)
    model, info = open_model(place, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"]
    assert all((v == 1).all() for n, v in model.state_dict().items() if n.endswith("running_var"))
    place = damaged(exported.folder, tmp_path / "mean", lambda t: t | {"encoder.front_end.mean": torch.zeros(3)})
    with pytest.raises(ConfigError, match=r"without 1 of them: encoder\.front_end\.mean"):
        open_model(place, ignore_mismatched_sizes=True)
