"""Chunked attention with relative positions on GPUs; ``launch`` imports triton, this package does not."""

from typing import Any

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    key: [
        {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": stages}
        for rows in (16, 32, 64, 128)
        for columns in (32, 64)
        for warps in (4, 8)
        for stages in ((1, 2) if kernel == "forward" else (1,))
        if rows <= (64 if key.endswith("fp32") else 128)
    ]
    for kernel in ("forward", "backward_query", "backward_key")
    for key in (f"{kernel}/64", f"{kernel}/128", f"{kernel}/64/fp32")
}
CANDIDATES |= {
    f"{kernel}/128/fp32": [
        {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": 1, "PRECISION": precision}
        for precision in ("tf32x3", "ieee")
        for rows in (16, 32)
        for columns in (16, 32, 64)
        for warps in (4, 8)
    ]
    for kernel in ("forward", "backward_query", "backward_key")
}
"""Candidates of benchmarks/tune.py; one that does not fit a GPU fails there and is skipped."""
