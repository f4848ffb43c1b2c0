"""Masked cross-entropy on a GPU; ``launch`` imports triton, this package does not.

| file | kernels |
|---|---|
| ``softmax_gradient.py`` | logits -> gradient, loss and accuracy, in place |
| ``products.py`` | the three matrix products over a number of rows that only the device knows |
| ``loss.py`` | losses and accuracy without logits, where no gradient is wanted |
| ``launch.py`` | which of them runs, chunk by chunk |
"""

_PRODUCTS = {
    16: ((64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 32, 8), (128, 128, 64, 8), (128, 256, 64, 8)),
    32: ((32, 64, 32, 4), (64, 32, 32, 4), (64, 64, 32, 8)),
}  # (BM, BN, BK, warps) by the bits of the operands

CANDIDATES = {
    "softmax_gradient": [
        {"BLOCK_V": block, "num_warps": warps, "num_stages": 1}
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))
    ],
    # Logits held at once: more than 48 MiB would no longer stay in the L2 cache of any GPU of today.
    "chunk": [{"bytes": mebibytes * 2**20, "rows_multiple": 128} for mebibytes in (8, 12, 16, 24, 32, 48)],
    **{
        f"{kernel}/{bits}": [
            {"BM": rows, "BN": columns, "BK": depth, "num_warps": warps, "num_stages": stages}
            for rows, columns, depth, warps in tiles
            for stages in ((3, 4) if bits == 16 else (2,))
        ]
        for bits, tiles in _PRODUCTS.items()
        for kernel in ("logits", "hidden_gradient", "weight_gradient", "loss")
    },
}
"""What benchmarks/tune.py tries; a choice that does not fit a GPU fails there and is passed over."""
