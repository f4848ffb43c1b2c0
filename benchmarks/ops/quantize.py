"""``quantize``: projection and nearest code, against the published eager form and everything that finds nearest codes.

Shape labels: ``<rows>x<features>-><d>x<codes>``, with ``x<codebooks>`` at the end for several codebooks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Case, Provider, Results, Skip, Work, bestrq2_providers, compiled, seeded

OP = "quantize"
BASELINE = "published eager"

_REFERENCE = "16384x256->16x8192"
_MANY_ROWS = "1000000x256->16x8192"
_SPEECHBRAIN = "4096x320->16x8192"  # 80 mels x 4 frames
_NEMO = "2048x640->16x8192"  # 80 mels x 8 frames, one codebook
_MANY_BOOKS = "2048x256->16x8192x16"
_USM = "1024x320->16x8192x16"  # 16 codebooks on 80 mels x 4 frames
_NEMO_BOOKS = "2048x640->16x8192x4"
_SMALL_CODEBOOK = "4096x320->16x1024"
_SMALL = "128x256->16x8192"  # one 10 s clip of 2.0

SHAPES = {
    "cpu": (_REFERENCE, _SPEECHBRAIN, _NEMO, _MANY_BOOKS, _USM, _NEMO_BOOKS, _SMALL_CODEBOOK, _SMALL),
    "cuda": (_REFERENCE, _SPEECHBRAIN, _NEMO, "16384x256->16x8192x16", _SMALL, _MANY_ROWS),
}
TUNING = {
    "quantize/16": (_MANY_ROWS, "float32"),
    "quantize/16/few": (_REFERENCE, "float32"),
    "quantize/32": ("16384x256->32x8192", "float32"),
    "quantize/64": ("16384x256->64x8192", "float32"),
}
"""Where a configuration is tuned: shape and dtype."""
QUICK_SHAPES = ("2048x256->16x8192", _SMALL)
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}

_BLOCK = 512 * 2**20  # bytes that a provider which would need far more may hold at once
TIE_BAND = 2.0**-21  # cosines closer than this are a tie (the contract of ops.quantize)


def make_case(shape: str, dtype: torch.dtype, device: torch.device) -> Case:
    """Gaussian rows, xavier-uniform projection(s), Gaussian unit codes. Only the rows have ``dtype``."""
    match = re.fullmatch(r"(\d+)x(\d+)->(\d+)x(\d+)(?:x(\d+))?", shape)
    if not match:
        raise ValueError(f"quantize: a shape reads like {_REFERENCE} or {_MANY_BOOKS}, got {shape!r}")
    rows, features, width, codes = (int(number) for number in match.groups()[:4])
    books = int(match[5]) if match[5] else 0
    lead = (books,) if books else ()
    count = books or 1
    bound = (6.0 / (features + width)) ** 0.5
    generator = torch.Generator().manual_seed(1)
    projection = (torch.rand(*lead, features, width, generator=generator) * 2 - 1) * bound
    codebook = F.normalize(torch.randn(*lead, codes, width, generator=generator), dim=-1)
    x = seeded(rows, features, dtype=dtype, device=device)
    projecting = 2.0 * rows * features * width * count
    searching = 2.0 * rows * codes * width * count
    if device.type == "cuda":  # exact codes take three passes of 16-bit products on tensor cores
        flops = {"bfloat16": 3 * (projecting + searching)}
    else:  # every code has to be looked at, but 8 bits can rule out most of them
        flops = {"float32": projecting, "int8": searching}
    constants = 4 * count * width * (features + codes)
    return Case(
        op=OP,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs={"x": x, "projection": projection.to(device), "codebook": codebook.to(device)},
        work=Work(
            flops=flops,
            bytes=x.numel() * x.element_size() + 8.0 * rows * count + constants,
            elementwise=float(rows) * codes * count,
        ),
        gold=_gold,
        check=_wrong_codes,
        tolerance=0.0,
    )


def _stacked(case: Case) -> tuple[Tensor, Tensor]:
    """Projection (G, D, d) and codebook (G, V, d), also for one codebook without the leading dimension."""
    projection, codebook = case.inputs["projection"], case.inputs["codebook"]
    return (projection, codebook) if projection.dim() == 3 else (projection[None], codebook[None])


def _gold(case: Case) -> Results:
    """Unit projected rows (G, N, d), their best cosine (G, N) and the codes (G, V, d), all in fp64."""
    projection, codebook = (value.double() for value in _stacked(case))
    directions = F.normalize(case.inputs["x"].double() @ projection, dim=-1)
    codebook = F.normalize(codebook, dim=-1)
    best = torch.stack(
        [
            torch.cat([(rows @ codes.T).amax(-1) for rows in direction.split(1024)])
            for direction, codes in zip(directions, codebook)
        ]
    )
    return {"directions": directions, "best": best, "codebook": codebook}


def _wrong_codes(results: Results, gold: Results) -> tuple[float, str]:
    """Share of codes whose fp64 cosine is below the best one by more than the tie band."""
    books, rows, _ = gold["directions"].shape
    codes = results["out"].reshape(rows, books).T.long()
    if codes.numel() == 0:
        return 0.0, ""
    size = gold["codebook"].shape[1]
    valid = (codes >= 0) & (codes < size)
    chosen = torch.stack([book[row.clamp(0, size - 1)] for book, row in zip(gold["codebook"], codes)])
    cosine = (chosen * gold["directions"]).sum(-1)
    wrong = int((~valid | (cosine < gold["best"] - TIE_BAND)).sum())
    return wrong / codes.numel(), f"{wrong} of {codes.numel()} codes wrong"


def _published(x: Tensor, projection: Tensor, codebook: Tensor) -> Tensor:
    """The BEST-RQ-2 authors' formula: project, L2-normalise, one score matrix, argmax. In the dtype of x (autocast)."""
    projection, codebook = projection.to(x.dtype), codebook.to(x.dtype)
    if projection.dim() == 2:
        return (F.normalize(x @ projection, dim=-1) @ codebook.T).argmax(-1)
    directions = F.normalize(x @ projection, dim=-1)
    return (directions @ codebook.transpose(1, 2)).argmax(-1).T


def _speechbrain(x: Tensor, projection: Tensor, codebook: Tensor) -> Tensor:
    """SpeechBrain's formula: vector norm of the broadcast difference of every row and every code, argmin."""
    directions = F.normalize(x @ projection.to(x.dtype), dim=-1)
    return torch.linalg.vector_norm(directions[:, None] - codebook.to(x.dtype), dim=-1).argmin(-1)


def _call(function: Callable[[Tensor, Tensor, Tensor], Tensor], case: Case) -> Callable[[], Tensor]:
    return lambda: function(case.inputs["x"], case.inputs["projection"], case.inputs["codebook"])


def _in_blocks(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], bytes_per_row: Callable[[Case], float], block: int
) -> Callable[[Case], Callable[[], Tensor]]:
    """Apply a formula to as many rows at a time as ``block`` bytes allow, each codebook by itself."""

    def prepare(case: Case) -> Callable[[], Tensor]:
        projection, codebook = _stacked(case)
        rows = max(1, int(block / bytes_per_row(case)))

        def call() -> Tensor:
            codes = [
                torch.cat([function(part, matrix, book) for part in case.inputs["x"].split(rows)])
                for matrix, book in zip(projection, codebook)
            ]
            return codes[0] if case.inputs["projection"].dim() == 2 else torch.stack(codes, -1)

        return call

    return prepare


def _score_bytes(case: Case) -> float:
    return 4.0 * _stacked(case)[1].shape[1]


def _difference_bytes(case: Case) -> float:
    return 4.0 * _stacked(case)[1][0].numel()


def _vector_quantize_pytorch(case: Case) -> Callable[[], Any]:
    """Its RandomProjectionQuantizer with our projection and codes, without the layer norm (``norm=False``)."""
    from vector_quantize_pytorch import RandomProjectionQuantizer

    projection, codebook = _stacked(case)
    books, features, width = projection.shape
    quantizer = RandomProjectionQuantizer(
        dim=features, codebook_size=codebook.shape[1], codebook_dim=width, num_codebooks=books, norm=False
    ).to(case.device)
    quantizer.eval()
    if quantizer.vq.codebook.shape[-1] != width:
        raise Skip("its form for several codebooks adds a linear layer behind the projection: other codes")
    with torch.no_grad():
        quantizer.rand_projs.copy_(projection)
        quantizer.vq.codebook = codebook if quantizer.vq.codebook.dim() == 3 else codebook[0]
    x = case.inputs["x"].float()[None]

    def call() -> Tensor:
        with torch.no_grad():
            return quantizer(x)[0]

    return call


def _faiss(case: Case) -> Callable[[], Any]:
    """One exact inner-product index per codebook, searched with k = 1 after a torch projection."""
    import faiss

    if case.device.type != "cpu":
        raise Skip("measured on the CPU only (faiss-cpu)")
    faiss.omp_set_num_threads(torch.get_num_threads())
    projection, codebook = _stacked(case)
    indexes = [faiss.IndexFlatIP(codebook.shape[-1]) for _ in codebook]
    for index, codes in zip(indexes, codebook):
        index.add(codes.numpy())

    def call() -> Tensor:
        x = case.inputs["x"].float()
        found = [index.search((x @ matrix).numpy(), 1)[1] for matrix, index in zip(projection, indexes)]
        return torch.cat([torch.from_numpy(codes) for codes in found], dim=1)

    return call


def _flash_kmeans(case: Case) -> Callable[[], Any]:
    """Its assignment step: the nearest unit code in L2 is that of the largest cosine. Projection by torch, in fp32."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    projection, codebook = _stacked(case)

    def call() -> Tensor:
        rows = case.inputs["x"].float() @ projection  # (G, N, d)
        codes = euclid_assign_triton(rows, codebook, rows.square().sum(-1))
        return codes[0].long() if case.inputs["projection"].dim() == 2 else codes.T.long()

    return call


PROVIDERS = [
    *bestrq2_providers(OP),
    Provider(BASELINE, lambda case: _call(_published, case)),
    Provider("torch.compile", lambda case: _call(compiled(_published), case)),
    Provider(
        "torch.compile max-autotune",
        lambda case: _call(compiled(_published, mode="max-autotune-no-cudagraphs"), case),
        on=("cuda",),
    ),
    Provider(
        "eager in row blocks",
        _in_blocks(_published, _score_bytes, 16 * 2**20),
        note="score blocks of 16 MB",
    ),
    Provider(
        "SpeechBrain formula",
        _in_blocks(_speechbrain, _difference_bytes, _BLOCK),
        note="in row blocks of 512 MB",
    ),
    Provider("vector-quantize-pytorch", _vector_quantize_pytorch, needs="vector_quantize_pytorch"),
    Provider("faiss IndexFlatIP", _faiss, needs="faiss"),
    Provider("flash-kmeans", _flash_kmeans, needs="flash_kmeans", on=("cuda",), note="projection by torch, fp32"),
]
