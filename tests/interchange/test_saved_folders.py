"""Folders that another library wrote: shards, other dtypes, prefixes; and what is refused. Without transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bestrq2
from bestrq2 import BestRQError, export


@pytest.fixture
def folder(encoder_file, tmp_path):
    assert export.main([str(encoder_file), "--hf", str(tmp_path / "folder")]) == 0
    return tmp_path / "folder"


def features_of(path):
    waveform = 0.1 * torch.randn(2, 30000, generator=torch.Generator().manual_seed(0))
    return bestrq2.load(path).encode(waveform, torch.tensor([30000, 20000]))[0]


def split(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), variant=""):
    """Shards as save_pretrained(max_shard_size=...) writes them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: names[number % 2] for number, name in enumerate(tensors)}
    for shard in names:
        if "/" not in shard:
            save_file({n: t for n, t in tensors.items() if place[n] == shard}, folder / shard, {"format": "pt"})
    index = folder / f"model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    return index


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def test_weights_may_be_read_by_whoever_may_read_the_rest(folder):
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards(folder, variant):
    expected = features_of(folder)
    split(folder, variant=variant)
    assert torch.equal(features_of(folder), expected)


def test_metadata_is_not_needed(folder):
    expected = features_of(folder)
    rewrite(folder, lambda tensors: tensors)
    assert torch.equal(features_of(folder), expected)
    assert torch.equal(features_of(folder / "model.safetensors"), expected)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    assert torch.equal(features_of(folder), expected)


def test_the_encoder_of_a_larger_model(folder):
    expected = features_of(folder)
    rewrite(folder, lambda tensors: {f"bestrq2.{n}": t for n, t in tensors.items()} | {"head.weight": torch.ones(3, 3)})
    assert torch.equal(features_of(folder), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_keep_exact_statistics(folder, dtype):
    """A file converted as a whole: features are those of the rounded weights with the exact mean and deviation."""
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if "front_end" in n}
    rewrite(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    encoder = bestrq2.load(folder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    for name, tensor in kept.items():
        assert torch.equal(encoder.state_dict()[name.removeprefix("encoder.")], tensor)
    rewrite(folder, lambda tensors: {n: t * 1.5 if n.endswith("front_end.std") else t for n, t in tensors.items()})
    with pytest.raises(BestRQError, match=r"front_end\.std' is torch\.\w+16, expected float32"):
        bestrq2.load(folder)


def broken_config(text):
    return lambda folder: (folder / "config.json").write_text(text)


def outside(folder):
    split(folder, names=("model-00001-of-00002.safetensors", "../elsewhere.safetensors"))


def lost_shard(folder):
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def repeated_tensor(folder):
    split(folder)
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors")


def two_variants(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    (folder / "model.bf16.safetensors").write_bytes((folder / "model.fp16.safetensors").read_bytes())


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without_one(folder):
    rewrite(folder, lambda tensors: dict(list(tensors.items())[1:]))


def one_more(folder):
    rewrite(folder, lambda tensors: {**tensors, "encoder.further": torch.ones(2)})


def of_integers(folder):
    def change(tensors):
        name = next(name for name, tensor in tensors.items() if "front_end" not in name and tensor.dim() == 2)
        return {**tensors, name: tensors[name].to(torch.int8)}

    rewrite(folder, change)


def of_another_shape(folder):
    def change(tensors):
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
        return {**tensors, name: tensors[name].T.contiguous()[:-1].clone()}

    rewrite(folder, change)


FAULTS = {
    "no configuration": (broken_config('{"model_type": "bestrq2"}'), "expected bestrq2_config"),
    "an unusable one": (
        broken_config('{"model_type": "bestrq2", "bestrq2_config": {"model": {"encoder": {"width": "wide"}}}}'),
        "bestrq2_config cannot be used",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "expected model.safetensors"),
    "an index of nothing": (lambda folder: split(folder).write_text("[]"), "cannot be read as an index"),
    "a shard elsewhere": (outside, "files in this folder, got '../elsewhere.safetensors'"),
    "a lost shard": (lost_shard, "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
    "a tensor twice": (repeated_tensor, "is in another shard, too"),
    "two variants": (two_variants, "expected the weights of one variant, got model.bf16.safetensors"),
    "a file cut short": (cut, "cannot be read as safetensors"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read as safetensors"),
    "a tensor missing": (without_one, "no tensor '"),
    "a tensor too many": (one_more, "unexpected tensor 'further'"),
    "integers": (of_integers, r"is torch\.int8, expected a floating tensor"),
    "another shape": (of_another_shape, "has shape .*, expected"),
}


@pytest.mark.parametrize("encoder_file", ["strips"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_error(folder, fault):
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(BestRQError, match=message):
        bestrq2.load(folder)


def test_an_adapter_is_explained(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BestRQError, match=r"merge_and_unload\(\)"):
        bestrq2.load(tmp_path)
