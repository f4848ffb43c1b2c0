"""Published checkpoints against an independent forward pass; every layout and refusal."""

import pytest
import torch
from published_model import PublishedModel
from safetensors.torch import load_file, save_file

import bestrq2
from bestrq2 import export
from bestrq2.config import ConfigError, load_config
from bestrq2.errors import CheckpointError
from bestrq2.interchange import UnknownLayoutError, load_pretraining, open_source
from bestrq2.interchange.published import to_published
from bestrq2.interchange.tensors import assemble_encoder, write_encoder_file
from bestrq2.layers.masking import MaskPlan
from bestrq2.models import build_model

HEADS = 4


def clips(seconds):
    noise = torch.randn(2, round(16000 * seconds))
    fade = torch.linspace(0.01, 1, noise.shape[1])
    return noise * fade * torch.tensor([[0.1], [0.5]])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write(path, tensors, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None)
    return path


def assert_same(actual, expected, tolerance=2e-4):
    """Relative to the size of the features: two float32 chains that sum in different orders."""
    error = (actual - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


PARTS = ("predictor", "quantizer", "rq_proj", "mask_token", "output_proj")
LAYOUTS = {
    "lightning": lambda name: name,
    "transformers export": lambda name: None if name.startswith(PARTS) else name,
    "transformers prefix": lambda name: None if name.startswith(PARTS) else "model." + name,
    "compiled module": lambda name: "net._orig_mod." + name,
    "flat patch embedding": lambda name: name.replace("patch_embed.patch_embed", "patch_embed"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["two_step", "one_stage"])
def test_features_equal_published_ones(kind, layout, tmp_path):
    model = PublishedModel(kind)
    tensors = {LAYOUTS[layout](name): tensor for name, tensor in state(model).items()}
    tensors.pop(None, None)
    encoder = bestrq2.load(write(tmp_path / "model.safetensors", tensors), heads=HEADS)
    waveform = clips(10)
    features, lengths = encoder.encode(waveform)
    assert lengths.tolist() == [16, 16]
    assert_same(features, model.features(waveform))


@pytest.mark.parametrize("seconds", [1.3, 3, 9.4])
def test_short_clip_fault_behind_its_switch(seconds, tmp_path):
    model, waveform = PublishedModel(), clips(seconds)
    path = write(tmp_path / "model.safetensors", state(model))
    faulty, _ = bestrq2.load(path, heads=HEADS, published_positions=True).encode(waveform)
    right, _ = bestrq2.load(path, heads=HEADS).encode(waveform)
    published = model.features(waveform)
    assert_same(faulty, published)
    assert (right - published).norm() / published.norm() > 1e-2


@pytest.mark.parametrize("kind", ["two_step", "one_stage"])
def test_pretraining_model_predicts_the_same(kind, tmp_path):
    model, waveform = PublishedModel(kind), clips(10)
    ours = load_pretraining(write(tmp_path / "model.safetensors", state(model)), heads=HEADS).eval()
    masked = torch.randperm(128)[:60].sort().values  # frequency-major
    rows, columns = masked // 16, masked % 16
    predicted = (columns * 8 + rows)[None].expand(2, -1)  # time-major
    everything = torch.arange(128)
    seen = everything[~torch.isin(everything, predicted[0])][None].expand(2, -1)
    plan = MaskPlan(seen, predicted, torch.tensor([68, 68]), torch.tensor([60, 60]))
    ours.masking.plan = lambda *arguments: plan
    output = ours(waveform, torch.tensor([160000, 160000]), step=0)
    assert_same(output.hidden @ ours.head.weight[0].T + ours.head.bias[0], model.logits(waveform, masked))
    agreement = (output.codes[..., 0] == model.codes(waveform)[:, masked]).float().mean()
    assert agreement > 0.98  # float32 in another order may tip a tie


def test_strips_by_shape(tmp_path):
    """2.1: everything but hop and window length is read from the shapes."""
    model = PublishedModel("strip", n_fft=1024, hop=160)
    path = write(tmp_path / "model.safetensors", state(model))
    with pytest.raises(ConfigError, match="give hop_length"):
        bestrq2.load(path)
    encoder = bestrq2.load(path, hop_length=160)
    settings = encoder.encoder.settings
    assert (settings.norm, settings.feed_forward, settings.qk_norm, settings.bias) == (
        "rms_norm",
        "swiglu",
        True,
        False,
    )
    assert (settings.heads, encoder.position, encoder.hop_size_in_ms) == (HEADS, "rope", 40.0)
    waveform = clips(2.5)
    assert_same(encoder.encode(waveform)[0], model.features(waveform))


NAMES = {"w1": ("fc1_g", "gate_proj", "w12"), "w3": ("fc1_x", "up_proj", None), "w2": ("fc2", "down_proj", "w3")}


@pytest.mark.parametrize("spelling", [0, 1, 2])
def test_swiglu_spellings(spelling, tmp_path):
    tensors = state(PublishedModel("strip", n_fft=1024, hop=160))
    plain = bestrq2.load(write(tmp_path / "a.safetensors", tensors), hop_length=160)
    renamed = {}
    for name, tensor in tensors.items():
        matrix = next((short for short in NAMES if f".mlp.{short}." in name), None)
        if matrix is None:
            renamed[name] = tensor
        elif (new := NAMES[matrix][spelling]) is not None:
            if new == "w12":
                tensor = torch.cat((tensor, tensors[name.replace(".w1.", ".w3.")]))
            renamed[name.replace(f".{matrix}.", f".{new}.")] = tensor
    other = bestrq2.load(write(tmp_path / "b.safetensors", renamed), hop_length=160)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_two_dimensional_rotary_positions(tmp_path):
    model, waveform = PublishedModel(rope=True), clips(4)
    encoder = bestrq2.load(write(tmp_path / "model.safetensors", state(model)))
    assert_same(encoder.encode(waveform)[0], model.features(waveform))


@pytest.mark.parametrize("build", [{}, {"kind": "one_stage"}, {"rope": True}])
def test_export_gives_the_same_file_back(build, tmp_path, capsys):
    tensors = state(PublishedModel(**build))
    source = write(tmp_path / "in.safetensors", tensors)
    out = tmp_path / "out.safetensors"
    assert export.main([str(source), "--heads", "4", "--published", str(out)]) == 0
    back = load_file(out)
    shared = {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}
    assert set(back) == set(shared)
    for name, tensor in shared.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=2e-6, msg=name)
    # Its metadata says the heads, so nothing needs to be given the second time.
    assert open_source(out).config.model.encoder.heads == HEADS
    assert open_source(out).complete


def test_export_of_a_standardised_strip_model(tmp_path, capsys):
    """The default recipe standardises its input; folded into the kernel, features stay the same."""
    config = load_config("best_rq2_tiny", ["model.front_end.mean=-40", "model.front_end.std=15"])
    weights = build_model(config).state_dict()
    write_encoder_file(tmp_path / "ours.safetensors", config, weights)
    assert export.main([str(tmp_path / "ours.safetensors"), "--published", str(tmp_path / "theirs.safetensors")]) == 0
    assert "folded" in capsys.readouterr().out
    waveform = clips(2.2)
    expected, _ = assemble_encoder(config, weights, tmp_path).encode(waveform)
    read = load_file(tmp_path / "theirs.safetensors")
    assert read["patch_embed.patch_embed.proj.weight"].shape == (128, 1, 64, 4)
    assert_same(bestrq2.load(tmp_path / "theirs.safetensors").encode(waveform)[0], expected, 1e-5)


def test_export_tells_that_published_encoders_average_rows(tmp_path, capsys):
    grid = ["model.encoder.patch_height=16", "model.encoder.depth=1", "model.front_end.normalize=none"]
    for joined in ("average", "concatenate"):
        config = load_config("best_rq2_tiny", [*grid, f"model.encoder.join_rows={joined}"])
        weights = build_model(config).state_dict()
        write_encoder_file(tmp_path / "ours.safetensors", config, weights)
        out = tmp_path / f"{joined}.safetensors"
        assert export.main([str(tmp_path / "ours.safetensors"), "--published", str(out)]) == 0
        told = "join_rows left out: published encoders average the 4 rows" in capsys.readouterr().out
        assert told is (joined == "concatenate")
    waveform = clips(2.2)
    expected, _ = assemble_encoder(config, weights, tmp_path).encode(waveform)
    assert_same(bestrq2.load(out).encode(waveform, rows="concatenate")[0], expected, 1e-5)


def broken(change):
    tensors = state(PublishedModel(depth=1))
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"adapter.weight": torch.ones(1)}), "adapter.weight"),
        (lambda t: t.update({"encoder.blocks.0.ls1.gamma": torch.ones(1)}), "ls1.gamma"),
        (lambda t: t.pop("encoder.blocks.0.attn.qkv.weight"), "no 'encoder.blocks.0.attn.qkv.weight'.*encoder.norm"),
        (lambda t: t.pop("encoder.norm.weight"), "no tensor 'encoder.norm.weight'"),
        (lambda t: t.pop("patch_embed.patch_embed.proj.weight"), "no tensor"),
        (lambda t: t["encoder.pos_embed"].add_(0.1), "learned positions"),
        (lambda t: t["spectrogram.mel_spec.mel_scale.fb"].mul_(2), "HTK filters"),
        (lambda t: t["spectrogram.mel_spec.spectrogram.window"].fill_(1), "Hann"),
        (lambda t: t.update({"encoder.blocks.0.mlp.fc2.weight": torch.ones(64, 60)}), "mlp"),
    ],
)
def test_what_is_not_understood_is_an_error(change, message, tmp_path):
    path = write(tmp_path / "model.safetensors", broken(change))
    with pytest.raises(ConfigError, match=message):
        bestrq2.load(path, heads=HEADS)


CHANGES = {
    "flat": lambda tensor: tensor.flatten(),
    "one dimension more": lambda tensor: tensor[None],
    "transposed": lambda tensor: tensor.T if tensor.dim() == 2 else tensor,
    "cut": lambda tensor: tensor[:-1],
    "one number": lambda tensor: torch.tensor(1.0),
    "integers": lambda tensor: tensor.long(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", [{"rope": True}, {"kind": "one_stage"}, {"kind": "strip", "n_fft": 1024, "hop": 160}])
def test_tensors_of_other_shapes_are_refused_by_name(build, change, tmp_path):
    model = PublishedModel(depth=1, **build)
    for name, tensor in state(model).items():
        tensors = state(model) | {name: CHANGES[change](tensor)}
        path = write(tmp_path / "model.safetensors", tensors)
        if tensors[name].shape == tensor.shape and tensors[name].is_floating_point():
            continue
        if name.startswith(("encoder.", "patch_embed")):
            with pytest.raises(ConfigError, match=str(path)):
                bestrq2.load(path, heads=HEADS, hop_length=model.hop)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [{}, {"rope": True}, {"kind": "strip", "n_fft": 1024, "hop": 160}])
def test_files_in_half_precision(build, dtype, tmp_path):
    """Window, filters and tables are the only ones there are, up to their rounding; the exact ones are used."""
    model = PublishedModel(**build)
    rounded = {name: tensor.to(dtype) for name, tensor in state(model).items()}
    encoder = bestrq2.load(write(tmp_path / "model.safetensors", rounded), heads=HEADS, hop_length=model.hop)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    exact = {name: t if name.endswith("pos_embed") else rounded[name].float() for name, t in state(model).items()}
    exact |= {name: t for name, t in state(model).items() if "spectrogram" in name or "inv_freq" in name}
    model.load_state_dict(exact)
    waveform = clips(10)
    assert_same(encoder.encode(waveform)[0], model.features(waveform))


NUMBERS = [("heads", "0"), ("heads", "-4"), ("hop_length", "-1"), ("window_seconds", "nan"), ("window_seconds", "0")]


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_numbers_in_metadata_that_mean_nothing(name, value, tmp_path):
    path = write(tmp_path / "model.safetensors", state(PublishedModel(depth=1)), **{name: value})
    with pytest.raises(ConfigError, match=f"{name}: expected a positive number, got"):
        bestrq2.load(path)


@pytest.mark.parametrize(("option", "number"), [("--heads", "0"), ("--heads", "-4"), ("--hop-length", "0")])
def test_numbers_of_the_command_that_mean_nothing(option, number, tmp_path, capsys):
    path = write(tmp_path / "model.safetensors", state(PublishedModel(depth=1)))
    assert export.main([str(path), option, number, "--published", str(tmp_path / "out.safetensors")]) == 2
    assert f"expected a positive number, got {number}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["heads", "hop_length"])
def test_what_a_file_states_is_not_chosen_anew(option, tmp_path):
    stated = {"heads": HEADS, "hop_length": 500}
    tensors = state(PublishedModel(depth=1))
    path = write(tmp_path / "model.safetensors", tensors, **{name: str(value) for name, value in stated.items()})
    assert bestrq2.load(path, **stated).hop_size_in_ms == 500
    with pytest.raises(ConfigError, match=f"{option}=2: it states {option}={stated[option]} itself"):
        bestrq2.load(path, **{option: 2})


def test_a_transform_that_no_table_of_filters_shows_is_refused():
    """An odd n_fft would be read again as the even one below it."""
    front = ["model.front_end.n_fft=401", "model.front_end.win_length=400", "model.front_end.num_mels=64"]
    config = load_config("best_rq2_tiny", front)
    with pytest.raises(ConfigError, match=r"expected an even model\.front_end\.n_fft, got 401"):
        to_published(config, build_model(config).state_dict())


def test_files_of_others(tmp_path):
    path = write(
        tmp_path / "wav2vec2.safetensors", {"wav2vec2.encoder.layers.0.attention.k_proj.weight": torch.ones(2)}
    )
    with pytest.raises(UnknownLayoutError, match="k_proj"):
        bestrq2.load(path)
    with pytest.raises(ConfigError, match="heads"):
        bestrq2.load(write(tmp_path / "model.safetensors", state(PublishedModel(width=48))))
    (tmp_path / "noise.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="safetensors"):
        bestrq2.load(tmp_path / "noise.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer .* git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (b"", "an empty file"),
    ],
)
def test_what_is_there_instead_of_a_model(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        bestrq2.load(tmp_path / name)


@pytest.mark.parametrize("name", ["last.ckpt", "model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_unopened(name, tmp_path):
    path = tmp_path / name
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ConfigError, match=r"never opened.*safetensors"):
        bestrq2.load(path)
