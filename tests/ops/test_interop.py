"""Ids of other libraries' quantizers: their formulas restated in float64, and the real modules where installed."""

import pytest
import torch
from torch.nn.functional import layer_norm
from torch.nn.functional import normalize as unit

from bestrq2 import ops
from bestrq2.ops import interop


def ids(x, peer):
    return ops.quantize(x, **peer._asdict())


def assert_same(ours, theirs, most=0.0):
    assert ours.shape == theirs.shape
    different = (ours != theirs).double().mean().item()
    print(f"{different:.2%} of the ids differ")
    assert different <= most


def test_speechbrain_formula():
    x = torch.randn(2, 50, 40)
    state = {"P": torch.randn(40, 16), "CB": unit(torch.randn(200, 16), dim=1)}
    point = unit(x.double() @ state["P"].double(), dim=2)
    gold = torch.cdist(point, state["CB"].double().expand(2, -1, -1), compute_mode="donot_use_mm_for_euclid_dist")
    assert_same(ids(x, interop.from_speechbrain(state)), gold.argmin(-1))


@pytest.mark.parametrize("books", [1, 3])
def test_nemo_formula(books):
    """Squared distance of every projected part, normalised on its own, to the codes of its book."""
    x = torch.randn(2, 50, 40)
    state = {
        "q.proj.weight": torch.randn(books * 16, 40),
        "q.codebooks": unit(torch.randn(books, 200, 16, dtype=torch.float64), dim=-1),
    }
    for normed in (False, True):
        rows = layer_norm(x.double(), (40,)) if normed else x.double()
        parts = unit((rows @ state["q.proj.weight"].double().T).unflatten(-1, (books, 16)), dim=-1)
        distance = (parts[..., None, :] - state["q.codebooks"]).square().sum(-1)
        assert_same(ids(x, interop.from_nemo(state, "q.", input_norm=normed)), distance.argmin(-1))


@pytest.mark.parametrize("books", [1, 4])
def test_wenet_formula(books):
    """Expanded squared distance after one norm over all books together."""
    x = torch.randn(2, 50, 40)
    state = {"projection": torch.randn(40, books * 16), "embeddings": unit(torch.randn(200, books, 16), dim=-1)}
    point = x.double() @ state["projection"].double()
    parts = (point / (point.norm(dim=-1, keepdim=True) + 1e-8)).unflatten(-1, (books, 16))
    codes = state["embeddings"].double()
    distance = parts.square().sum(-1)[..., None] - 2 * torch.einsum("btgd,vgd->btgv", parts, codes)
    distance = distance + codes.square().sum(-1).T
    assert_same(ids(x, interop.from_wenet(state)), distance.argmin(-1))


@pytest.mark.parametrize("books", [1, 3])
def test_lucidrains_formula(books):
    x = torch.randn(2, 50, 40)
    state = {"rand_projs": torch.randn(books, 40, 16), "vq._codebook.embed": unit(torch.randn(books, 200, 16), dim=-1)}
    parts = torch.einsum("btd,gde->btge", layer_norm(x.double(), (40,)), state["rand_projs"].double())
    gold = torch.einsum("btge,gve->btgv", unit(parts, dim=-1), state["vq._codebook.embed"].double()).argmax(-1)
    assert_same(ids(x, interop.from_lucidrains(state)), gold if books > 1 else gold.squeeze(-1))


def test_lucidrains_formula_with_second_projection():
    """Several codebooks: all projected parts go through one Linear with bias before they are split again."""
    x = torch.randn(2, 50, 40)
    state = {
        "rand_projs": torch.randn(3, 40, 16),
        "vq.project_in.weight": torch.randn(3 * 48, 48) / 7,
        "vq.project_in.bias": torch.randn(3 * 48),
        "vq._codebook.embed": unit(torch.randn(3, 200, 48), dim=-1),
    }
    parts = torch.einsum("btd,gde->btge", layer_norm(x.double(), (40,)), state["rand_projs"].double()).flatten(2)
    parts = parts @ state["vq.project_in.weight"].double().T + state["vq.project_in.bias"].double()
    gold = torch.einsum("btge,gve->btgv", parts.unflatten(-1, (3, 48)), state["vq._codebook.embed"].double()).argmax(-1)
    assert_same(ids(interop.lucidrains_input(x), interop.from_lucidrains(state)), gold)


def test_names_what_is_missing():
    with pytest.raises(ValueError, match="not a quantizer of SpeechBrain: no P, CB among weight"):
        interop.from_speechbrain({"weight": torch.zeros(1)})


def test_real_speechbrain():
    quantisers = pytest.importorskip("speechbrain.nnet.quantisers")
    module = quantisers.RandomProjectionQuantizer(80, 16, 512)
    x = torch.randn(4, 100, 80)
    assert_same(ids(x, interop.from_speechbrain(module.state_dict())), module(x), most=0.005)


@pytest.mark.parametrize("books", [1, 4])
def test_real_lucidrains(books):
    peer = pytest.importorskip("vector_quantize_pytorch")
    module = peer.RandomProjectionQuantizer(dim=80, codebook_size=512, codebook_dim=16, num_codebooks=books)
    x = torch.randn(4, 100, 80)
    taken = x if books == 1 else interop.lucidrains_input(x)
    assert_same(ids(taken, interop.from_lucidrains(module.state_dict())), module(x), most=0.005)
