"""The contract of tests/ops/test_masked_cross_entropy*.py for the Triton backend, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CONTRACT = sorted((Path(__file__).parents[1] / "ops").glob("test_masked_cross_entropy*.py"))
# One program a row makes many rows slow; what does not depend on the kernel is tested on the other backends.
LEFT_OUT = ("bf16", "many_rows", "601", "127", "deterministic", "recompiling", "only_wanted")
SELECTION = " and not ".join(["triton", *LEFT_OUT])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the contract itself: pytest --device cuda")
def test_contract_in_the_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", SELECTION, "-p", "no:cacheprovider", *CONTRACT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout.splitlines()[-1]
