"""Quantizers of other libraries as arguments of :func:`bestrq2.ops.quantize`, giving the same ids.

Each function takes the state dict of the peer's module (``module.state_dict()``, or a checkpoint entry; ``prefix``
picks a submodule) and returns a :class:`PeerQuantizer`::

    peer = interop.from_speechbrain(model.state_dict(), prefix="Quantizer.")
    ids = ops.quantize(features, **peer._asdict())

Ids are those that the peer's formula gives in exact arithmetic. The peers compute in fp32 (or in whatever autocast
gives them), so their own ids can differ where two codes are nearly as close.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PeerQuantizer", "from_lucidrains", "from_nemo", "from_speechbrain", "from_wenet", "lucidrains_input"]


class PeerQuantizer(NamedTuple):
    """Arguments of :func:`bestrq2.ops.quantize`, under its names."""

    projection: Tensor
    codebook: Tensor
    normalize: str = "none"


def _take(state: Mapping[str, Tensor], prefix: str, names: tuple[str, ...], peer: str) -> tuple[Tensor, ...]:
    missing = [prefix + name for name in names if prefix + name not in state]
    if missing:
        raise ValueError(f"not a quantizer of {peer}: no {', '.join(missing)} among {', '.join(list(state)[:20])}")
    return tuple(state[prefix + name].detach() for name in names)


def from_speechbrain(state: Mapping[str, Tensor], prefix: str = "") -> PeerQuantizer:
    """SpeechBrain ``speechbrain.nnet.quantisers.RandomProjectionQuantizer``.

    P (D, d), CB (V, d) with unit rows; id = argmin |CB - x P / |x P||, hence the largest product. Codes: (...).
    SpeechBrain has this formula since 1.0.3. Up to 1.0.2 it divided every channel of x P by its norm over the time of
    the batch, which gives other ids: no argument here makes them equal.
    """
    projection, codebook = _take(state, prefix, ("P", "CB"), "SpeechBrain")
    return PeerQuantizer(projection, codebook)


def from_nemo(state: Mapping[str, Tensor], prefix: str = "", *, input_norm: bool = False) -> PeerQuantizer:
    """NVIDIA NeMo ``RandomProjectionVectorQuantizer``.

    proj.weight (G d, D) of a Linear without bias, codebooks (G, V, d) with unit rows, often float64; both of its
    distances give the largest product. The caller stacks ``combine_time_steps`` frames, as NeMo does. Codes: (..., G),
    also for one codebook (NeMo's ``squeeze_single=False``).

    Args:
        input_norm: whether the module normalises its input (later versions: a LayerNorm without weights over each
            frame). With ``combine_time_steps`` above 1 that happens before stacking: normalise the frames and leave
            this False.
    """
    weight, codebooks = _take(state, prefix, ("proj.weight", "codebooks"), "NeMo")
    books, _, dims = codebooks.shape
    projection = weight.T.reshape(weight.shape[1], books, dims).transpose(0, 1)
    return PeerQuantizer(projection, codebooks, "layer_norm" if input_norm else "none")


def from_wenet(state: Mapping[str, Tensor], prefix: str = "", *, input_norm: bool = False) -> PeerQuantizer:
    """WeNet ``BestRQModel``.

    projection (D, G d), embeddings (V, G, d) with unit rows; WeNet divides x by its norm over all codebooks together,
    which moves no code. The caller stacks and normalises the frames, as the model does before. Codes: (..., G).

    Args:
        input_norm: True for the versions that apply a LayerNorm (no weights) to the stacked frames.
    """
    projection, embeddings = _take(state, prefix, ("projection", "embeddings"), "WeNet")
    _, books, dims = embeddings.shape
    return PeerQuantizer(
        projection.reshape(-1, books, dims).transpose(0, 1),
        embeddings.transpose(0, 1),
        "layer_norm" if input_norm else "none",
    )


def from_lucidrains(state: Mapping[str, Tensor], prefix: str = "", *, norm: bool = True) -> PeerQuantizer:
    """vector-quantize-pytorch ``RandomProjectionQuantizer``.

    rand_projs (G, D, d); cosine codebook vq._codebook.embed (G, V, e) with unit rows. Codes: (..., G), or (...) for one
    codebook, as there. With several codebooks that module has a second, random Linear with bias between projection and
    codebooks (e = G d). It is folded into one projection (G, D + 1, e) whose last row is the bias: pass
    ``lucidrains_input(x, norm)`` instead of ``x``.

    Args:
        norm: the ``norm`` argument the module was built with (LayerNorm without weights on the input).
    """
    names = ("rand_projs", "vq._codebook.embed")
    projection, codebook = _take(state, prefix, names, "vector-quantize-pytorch")
    books, features, dims = projection.shape
    if prefix + "vq.project_in.weight" in state:
        weight, bias = (state[f"{prefix}vq.project_in.{name}"].detach().double() for name in ("weight", "bias"))
        folded = projection.double().transpose(0, 1).reshape(features, books * dims) @ weight.T
        folded = torch.cat([folded, bias[None]]).reshape(features + 1, books, -1).transpose(0, 1)
        return PeerQuantizer(folded, codebook)
    if books == 1:
        projection, codebook = projection[0], codebook[0]
    return PeerQuantizer(projection, codebook, "layer_norm" if norm else "none")


def lucidrains_input(x: Tensor, norm: bool = True) -> Tensor:
    """``x`` (..., D) as their several-codebook quantizer takes it: (..., D + 1) normalised and a one for the bias."""
    x = torch.nn.functional.layer_norm(x.float(), x.shape[-1:]) if norm else x
    return torch.nn.functional.pad(x, (0, 1), value=1.0)
