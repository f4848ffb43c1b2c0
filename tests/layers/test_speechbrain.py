"""Modules in place of SpeechBrain's, against its formulas and, where it is installed, against itself."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bestrq2.layers import SpeechBrainRandomProjectionQuantizer, SpeechBrainRelPosMHAXL
from bestrq2.ops import ChunkLayout


def sinusoids(frames, width):
    """SpeechBrain's RelPosEncXL: the past reversed, then the future, both functions of the distance."""
    frequency = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angles = torch.arange(frames)[:, None] * frequency
    past = torch.stack((angles.sin(), angles.cos()), -1).flatten(1)
    future = torch.stack((angles.sin(), (-angles).cos()), -1).flatten(1)
    return torch.cat((past.flip(0), future[1:]))[None]


def formula(module, query, key, value, pos_embs, key_padding_mask=None, hidden=None):
    """RelPosMHAXL.forward of SpeechBrain 1.0 with ``hidden`` (T, T) as its boolean attn_mask."""
    batch, frames, heads, size = *query.shape[:2], module.num_heads, module.head_dim
    if query is key and key is value:
        query, key, value = F.linear(query, module.in_proj_weight).view(batch, -1, heads, 3 * size).chunk(3, dim=-1)
    else:
        weights = module.in_proj_weight.chunk(3, dim=0)
        query, key, value = (F.linear(x, w).view(batch, -1, heads, size) for x, w in zip((query, key, value), weights))
    if module.value_bias_weight is not None:
        value = value + module.value_bias_weight.view(1, 1, heads, size)
    p_k = module.linear_pos(pos_embs).view(1, -1, heads, size)
    with_u = (query + module.pos_bias_u.view(1, 1, heads, size)).transpose(1, 2)
    with_v = (query + module.pos_bias_v.view(1, 1, heads, size)).transpose(1, 2)
    scale = 1 / math.sqrt(module.embed_dim)
    content = (with_u * scale) @ key.permute(0, 2, 3, 1)
    shifted = F.pad((with_v * scale) @ p_k.permute(0, 2, 3, 1), (1, 0)).view(batch, heads, -1, frames)
    shifted = shifted[:, :, 1:].view(batch, heads, frames, 2 * frames - 1)[..., :frames]
    score = content + shifted
    for mask in (hidden, None if key_padding_mask is None else key_padding_mask.view(batch, 1, 1, frames)):
        score = score if mask is None else score.masked_fill(mask, -torch.inf)
    weights = score.softmax(-1).nan_to_num(0)
    return module.out_proj((weights @ value.transpose(1, 2)).transpose(1, 2).reshape(batch, frames, -1))


@pytest.mark.parametrize("window", [None, ChunkLayout.from_speechbrain(8, 2)], ids=["full", "chunks"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("vbias", [False, True])
def test_attention_equals_the_formula(window, padded, vbias):
    torch.manual_seed(0)
    module = SpeechBrainRelPosMHAXL(32, 4, vbias=vbias).double()
    if vbias:
        nn.init.normal_(module.value_bias_weight)
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    padding = (torch.arange(40) >= torch.tensor([[40], [23]])) if padded else None
    pos_embs = sinusoids(40, 32).double()
    hidden = None if window is None else ~window.mask(40)
    out, weights = module(x, x, x, pos_embs, key_padding_mask=padding, layout=window)
    expected = formula(module, x, x, x, pos_embs, padding, hidden)
    assert weights is None
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    leaves = [x, *module.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (out, expected))):
        torch.testing.assert_close(ours, theirs)
    others = [torch.randn(2, 40, 32, dtype=torch.float64) for _ in range(3)]
    ours = module(*others, pos_embs, return_attn_weights=False)
    torch.testing.assert_close(ours, formula(module, *others, pos_embs))


def test_attention_refuses_what_it_would_compute_differently():
    with pytest.raises(ValueError, match=r"dropout must be 0, got 0\.1"):
        SpeechBrainRelPosMHAXL(32, 4, dropout=0.1)
    with pytest.raises(ValueError, match="vdim must be None or embed_dim = 32, got 16"):
        SpeechBrainRelPosMHAXL(32, 4, vdim=16)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 30 and 4"):
        SpeechBrainRelPosMHAXL(30, 4)
    module, x = SpeechBrainRelPosMHAXL(32, 4), torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        module(x, x, x, sinusoids(5, 32), attn_mask=torch.zeros(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"pos_embs \(1, 2T - 1, 32\), got .* and \(1, 11, 32\)"):
        module(x, x, x, sinusoids(6, 32))


def test_codes_equal_the_formula():
    torch.manual_seed(0)
    quantizer = SpeechBrainRandomProjectionQuantizer(80, 16, 500)
    torch.manual_seed(0)
    projection = nn.init.xavier_uniform_(torch.empty((80, 16)))
    codebook = F.normalize(torch.randn(500, 16))
    assert torch.equal(quantizer.P, projection)
    assert torch.equal(quantizer.CB, codebook)
    assert list(quantizer.state_dict()) == ["P", "CB"]
    x = torch.randn(3, 50, 80)
    normalised = F.normalize(x.double() @ projection.double(), dim=2)
    distances = torch.linalg.vector_norm(codebook.double().unsqueeze(1) - normalised.unsqueeze(1), dim=-1)
    assert torch.equal(quantizer(x), distances.argmin(dim=1))


def test_equals_speechbrain_itself():
    attention = pytest.importorskip("speechbrain.nnet.attention")
    quantisers = pytest.importorskip("speechbrain.nnet.quantisers")
    x, padding = torch.randn(2, 30, 32), torch.arange(30) >= torch.tensor([[30], [17]])
    pos_embs = attention.RelPosEncXL(32)(x)
    modules = []
    for cls in (attention.RelPosMHAXL, SpeechBrainRelPosMHAXL):
        torch.manual_seed(0)
        modules.append(cls(32, 4, vbias=True, mask_pos_future=True))
    theirs, ours = modules
    states = [module.state_dict() for module in modules]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    window = ChunkLayout.from_speechbrain(8, 1)
    expected, _ = theirs(x, x, x, pos_embs, key_padding_mask=padding, attn_mask=~window.mask(30))
    out, _ = ours(x, x, x, pos_embs, key_padding_mask=padding, layout=window)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)

    quantizers = []
    for cls in (quantisers.RandomProjectionQuantizer, SpeechBrainRandomProjectionQuantizer):
        torch.manual_seed(0)
        quantizers.append(cls(80, 16, 500))
    frames = torch.randn(3, 50, 80)
    assert torch.equal(quantizers[0](frames), quantizers[1](frames))
