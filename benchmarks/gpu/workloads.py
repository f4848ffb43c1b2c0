"""Calls to time on a GPU, the most valuable first: operation, shape, dtype. No import of torch."""

Workload = tuple[str, str, str]

GROUPS: tuple[Workload, ...] = (
    ("chunked_attention", "B8H12T6000d64-c16l128r0", "bfloat16"),
    ("masked_cross_entropy", "16384x768->8192", "bfloat16"),
    ("quantize", "1000000x256->16x8192", "float32"),
    ("quantize", "16384x256->16x8192", "float32"),
    ("chunked_attention", "B16H8T1500d64-c64l256r0", "bfloat16"),
    ("masked_cross_entropy", "8192of16384x768->8192", "bfloat16"),
    ("chunked_attention", "B16H8T1500d72-c16l64r0", "bfloat16"),
)
TINY: tuple[Workload, ...] = (
    ("quantize", "40x16->16x64", "float32"),
    ("chunked_attention", "B1H1T20d16-c8l8r0", "float32"),
)
"""Of a rehearsal."""
