"""The Triton kernel of quantize where rounding could choose between codes: run in the interpreter, with more rounding
errors than a GPU has.
"""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

NEAR_TIES = """
import numpy as np
import interpreter_arithmetic
import torch
from bestrq2 import ops
from quantize_cases import near_ties

exact_product, coarse = interpreter_arithmetic.product, np.random.default_rng(0)

def product(a, b, total):
    # A matrix unit that is off by as much as the proof allows, in any direction: (depth + 2) 2^-22 |row| |column|.
    result = exact_product(a, b, total)
    if a.dtype == np.float16:
        sizes = np.linalg.norm(a.astype(np.float64), axis=-1)[..., :, None] * np.linalg.norm(
            b.astype(np.float64), axis=-2)[..., None, :]
        allowed = (a.shape[-1] + 2) * 2.0**-22 * sizes
        result = (result + coarse.choice([-1.0, 1.0], result.shape) * allowed).astype(total.dtype)
    return result

interpreter_arithmetic.product = product
checked = 0
for seed, (features, dims, codes, offset) in enumerate(((64, 16, 512, 0), (40, 13, 300, 3000), (32, 32, 256, -50))):
    for spread in (1e-2, 1e-4, 1e-6, 1e-8):
        x, projection, codebook = near_ties(16, features, dims, codes, spread, offset, seed)
        for normalize in ("none", "layer_norm"):
            gold = ops.quantize(x, projection, codebook, normalize=normalize, backend="reference")
            ours = ops.quantize(x, projection, codebook, normalize=normalize, backend="triton")
            assert torch.equal(gold, ours), (features, dims, spread, normalize, int((gold != ours).sum()))
            checked += len(x)
print(checked)
"""


def test_interpreted_codes_are_exact_between_near_ties():
    """Equal to the float64 codes, not only within the contract's band of 2^-21."""
    result = subprocess.run(
        [sys.executable, "-c", NEAR_TIES],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "384", result.stdout + result.stderr
