"""Calls to time on a GPU, the most valuable first: operation, shape, dtype. No import of torch."""

Workload = tuple[str, str, str]

GROUPS: tuple[Workload, ...] = (
    ("chunked_attention", "B8H12T6000d64-c16l128r0", "bfloat16"),
    ("masked_cross_entropy", "16384x768->8192", "bfloat16"),
    ("quantize", "1000000x256->16x8192", "float32"),
    ("short_attention", "B256H12N64d64", "bfloat16"),
    ("quantize", "16384x256->16x8192", "float32"),
    ("chunked_attention", "B16H8T1500d64-c64l256r0", "bfloat16"),
)
MORE: tuple[Workload, ...] = (
    ("short_attention", "B256H12N128d64-ragged", "bfloat16"),
    ("masked_cross_entropy", "8192of16384x768->8192", "bfloat16"),
    ("chunked_attention", "B16H8T1500d72-c16l64r0", "bfloat16"),
)
"""Where the others have left time."""
TINY: tuple[Workload, ...] = (
    ("quantize", "40x16->16x64", "float32"),
    ("chunked_attention", "B1H1T20d16-c8l8r0", "float32"),
)
"""Of a rehearsal."""

FIRST: dict[str, tuple[str, ...]] = {
    "chunked_attention": (
        *("bestrq2", "FlexAttention", "FlexAttention, no positions", "cuDNN, no positions", "torch.compile"),
        *("Transformer-XL, materialised", "SDPA + position mask", "bestrq2 graph"),
    ),
    "masked_cross_entropy": (
        *("bestrq2", "liger-kernel", "cut-cross-entropy", "torch.compile", "eager", "liger-kernel fp32"),
        *("cut-cross-entropy exact", "bestrq2 graph"),
    ),
    "quantize": (
        *("bestrq2", "published eager", "torch.compile", "vector-quantize-pytorch", "flash-kmeans", "bestrq2 graph"),
    ),
    "short_attention": (
        *("bestrq2", "SDPA, cuDNN", "SDPA, flash", "SDPA, efficient", "FlexAttention", "stored scores"),
        *("torch.compile", "bestrq2 graph"),
    ),
    "step": (*("ours, blocks compiled", "published, eager", "published, SDPA", "published, torch.compile", "bestrq2"),),
}
"""Providers by the value of their rows: time that runs out costs the last ones."""
COMPILED = (
    "bestrq2",
    "FlexAttention",
    "FlexAttention, no positions",
    "torch.compile",
    "liger-kernel",
    "cut-cross-entropy",
)
"""Providers that compile something, of which the caches on disk keep the result."""
