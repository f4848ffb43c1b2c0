"""Masked cross-entropy on a GPU; ``launch`` imports triton, this package does not.

| file | kernels |
|---|---|
| ``softmax_gradient.py`` | logits -> gradient, loss and accuracy, in place |
| ``products.py`` | the three matrix products over a number of rows that is read on the device |
| ``loss.py`` | losses and accuracy without logits, where no gradient is wanted |
| ``scale.py`` | gradients times the upstream gradient, in place |
| ``launch.py`` | which of them runs, chunk by chunk |
"""

# (BM, BN, BK, warps, stages) by kernel and bits of the operands. None spills on sm_80, sm_90 or sm_100; larger ones do.
_TILES_16 = tuple(
    (*tile, stages)
    for tile in ((64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 32, 8), (128, 128, 64, 8))
    for stages in (3, 4)
)
_TILES_32 = ((32, 64, 32, 4, 2), (64, 32, 32, 4, 2), (64, 64, 32, 8, 2))
_TILES = {
    "logits/16": (*_TILES_16, (128, 256, 64, 8, 3)),
    "logits/32": _TILES_32,
    "hidden_gradient/16": (*_TILES_16, (128, 256, 64, 8, 3)),
    "hidden_gradient/32": _TILES_32,
    "weight_gradient/16": _TILES_16,
    "weight_gradient/32": _TILES_32,
    "loss/16": ((64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 3), (128, 64, 64, 8, 3), (128, 64, 64, 8, 4)),
    "loss/32": ((32, 32, 32, 4, 2), (64, 32, 32, 8, 2)),
}

CANDIDATES = {
    "softmax_gradient": [
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    ],
    "softmax_gradient/whole": [
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((8192, 8), (8192, 16), (4096, 4), (4096, 8), (16384, 16))
    ],
    "softmax_gradient/summed": [
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((8192, 16), (8192, 32), (4096, 16), (16384, 32))
    ],
    # Logits held at once. Small chunks stay in the L2 cache; large ones fill whole waves of multiprocessors: the
    # gradient of 2816 rows of 768 features (48 MiB of 8192 classes) is 132 tiles of 128 x 128, one for each of an H100.
    "chunk": [{"bytes": mebibytes * 2**20, "rows_multiple": 128} for mebibytes in (12, 24, 32, 48, 64, 96, 128)],
    **{
        kernel: [
            {"BM": rows, "BN": columns, "BK": depth, "num_warps": warps, "num_stages": stages}
            for rows, columns, depth, warps, stages in tiles
        ]
        for kernel, tiles in _TILES.items()
    },
}
"""Candidates of benchmarks/tune.py; one that does not fit a GPU fails there and is skipped."""
