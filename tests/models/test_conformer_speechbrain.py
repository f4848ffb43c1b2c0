"""SpeechBrain's Conformer against ours with its weights (where speechbrain is installed), and errors of loading."""

import pytest
import torch

from bestrq2.interchange.speechbrain import NAMES, speechbrain_conformer
from bestrq2.layers.conformer import Conformer, ConformerSettings
from bestrq2.layers.frame_grid import FrameGrid
from bestrq2.ops import ChunkLayout


def peer():
    # exc_type: SpeechBrain imports torchaudio, whose library may not fit the installed torch.
    module = pytest.importorskip(
        "speechbrain.lobes.models.transformer.Conformer", reason="needs speechbrain", exc_type=(ImportError, OSError)
    )
    attention = pytest.importorskip("speechbrain.nnet.attention")
    torch.manual_seed(7)
    model = module.ConformerEncoder(3, 24, 40, 4, kernel_size=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, attention.RelPosEncXL(24)


@torch.no_grad()
def test_full_context():
    model, positions = peer()
    ours = speechbrain_conformer({f"encoder.{k}": v for k, v in model.state_dict().items()}, heads=4)
    x, lengths = torch.randn(3, 21, 24), torch.tensor([21, 13, 4])
    padding = torch.arange(21) >= lengths[:, None]
    # Each clip alone: in a batch SpeechBrain's convolution reads what stands in padded frames.
    alone = [model(clip[None, :n], pos_embs=positions(clip[None, :n]))[0][0] for clip, n in zip(x, lengths.tolist())]
    expected = torch.cat(alone)
    out = ours(x, FrameGrid.whole(21, lengths, x.device), ChunkLayout())
    torch.testing.assert_close(out[~padding], expected, atol=2e-5, rtol=1e-4)
    turned = Conformer(ConformerSettings(24, 3, 4, 40, 5, dropout=0.0)).eval()
    turned.load_state_dict(ours.state_dict())  # signed positions, scale by the head: other numbers
    other = turned(x, FrameGrid.whole(21, lengths, x.device), ChunkLayout())
    assert (other[~padding] - expected).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("chunk", "left"), [(4, 1), (5, 0), (3, None), (30, 2)])
def test_dynamic_chunk_training(chunk, left):
    model, positions = peer()
    training = pytest.importorskip("speechbrain.utils.dynamic_chunk_training")
    ours = speechbrain_conformer(model.state_dict(), heads=4, conv_mode="chunk")
    x, layout = torch.randn(2, 22, 24), ChunkLayout.from_speechbrain(chunk, left)
    config = training.DynChunkTrainConfig(chunk, left)
    expected, _ = model(x, src_mask=~layout.mask(22), pos_embs=positions(x), dynchunktrain_config=config)
    torch.testing.assert_close(ours(x, FrameGrid(22), layout), expected, atol=2e-5, rtol=1e-4)


def their_names(width=8, heads=2):
    """A state dict with SpeechBrain's names, made from our own shapes."""
    torch.manual_seed(1)
    model = Conformer(ConformerSettings(width, 1, heads, 12, 3, dropout=0.0))
    own = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    theirs = {f"norm.norm.{kind}": own[f"norm.{kind}"] for kind in ("weight", "bias")}
    for target, source in NAMES.items():
        for kind in ("weight", "bias"):
            theirs[f"layers.0.{source}.{kind}"] = own[f"blocks.0.{target}.{kind}"]
    qkv = own["blocks.0.attn.qkv.weight"].view(3, heads, width // heads, width)
    theirs["layers.0.mha_layer.in_proj_weight"] = qkv.transpose(0, 1).reshape(3 * width, width)
    theirs["layers.0.mha_layer.linear_pos.weight"] = own["blocks.0.attn.position.weight"]
    for target, source in (("content_bias", "pos_bias_u"), ("position_bias", "pos_bias_v")):
        theirs[f"layers.0.mha_layer.{source}"] = own[f"blocks.0.attn.{target}"].reshape(width // heads, heads)
    bottleneck = "layers.0.convolution_module.bottleneck.0"
    theirs[f"{bottleneck}.weight"] = own["blocks.0.conv.pointwise1.weight"][..., None]
    theirs[f"{bottleneck}.bias"] = own["blocks.0.conv.pointwise1.bias"]
    return own, theirs


def test_every_tensor_finds_its_place():
    own, theirs = their_names()
    loaded = speechbrain_conformer(theirs, heads=2).state_dict()
    own["blocks.0.attn.qkv.bias"] = torch.zeros(24)
    assert loaded.keys() == own.keys()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_what_does_not_fit_is_named():
    _, theirs = their_names()
    with pytest.raises(ValueError, match="expected a SpeechBrain ConformerEncoder"):
        speechbrain_conformer({"a": torch.zeros(1)}, heads=2)
    with pytest.raises(ValueError, match="heads must divide the width 8, got 3"):
        speechbrain_conformer(theirs, heads=3)
    missing = {name: tensor for name, tensor in theirs.items() if "linear_pos" not in name}
    with pytest.raises(ValueError, match=r"no tensor 'layers.0.mha_layer.linear_pos.weight'"):
        speechbrain_conformer(missing, heads=2)
    theirs["norm.norm.weight"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"norm.weight: expected shape \(8,\), found \(9,\)"):
        speechbrain_conformer(theirs, heads=2)
