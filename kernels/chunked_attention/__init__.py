"""Chunked attention with relative positions on GPUs; ``launch`` imports triton, this package does not.

| file | kernels |
|---|---|
| ``position.py`` | the band of position scores; the gradient of the table |
| ``forward.py`` | output and log-sum-exp |
| ``backward.py`` | query gradient with score gradients; key and value gradients |
| ``launch.py`` | segment by segment, so that the band has a bound |
"""

from typing import Any

_KERNELS = ("forward", "backward_query", "backward_key", "band", "table_gradient")

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    key: [
        {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": stages}
        for rows in (16, 32, 64, 128)
        for columns in (32, 64)
        for warps in (4, 8)
        for stages in (1, 2)
        if rows <= (64 if key.endswith("fp32") else 128)
    ]
    for kernel in _KERNELS
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
    for kernel in _KERNELS
}
"""Candidates of benchmarks/tune.py; one that does not fit a GPU fails there and is skipped."""
