"""The only tolerances of the kernel tests: relative to the error that plain PyTorch makes in the same dtype."""

import torch
from torch import Tensor

from bestrq2.ops.chunked_attention.reference import attend, scores


def relative_error(value: Tensor, gold: Tensor) -> float:
    """Root-mean-square error over root-mean-square of ``gold`` (0/0 counts as 0), in float64."""
    value, gold = value.detach().double().cpu(), gold.detach().double().cpu()
    assert value.shape == gold.shape, f"shape {tuple(value.shape)} instead of {tuple(gold.shape)}"
    if gold.numel() == 0:
        return 0.0
    assert torch.isfinite(value).all(), "not finite"
    error = (value - gold).square().mean().sqrt().item()
    scale = gold.square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_no_worse_than_torch(
    name: str, kernel: Tensor, torch_result: Tensor, gold: Tensor, *, factor: float = 2.0, slack_ulps: float = 4.0
) -> None:
    """Require error(kernel) <= factor * error(plain PyTorch in the same dtype) + a few units in the last place.

    ``gold`` is the float64 reference on the same (rounded) inputs. The slack only matters where PyTorch happens to be
    exact. Prints error / tolerance, so a log shows how tight every check is.
    """
    error, baseline = relative_error(kernel, gold), relative_error(torch_result, gold)
    tolerance = factor * baseline + slack_ulps * torch.finfo(kernel.dtype).eps
    print(f"{name}: error {error:.2e}, PyTorch {baseline:.2e}, error/tolerance {error / tolerance:.2f}")
    assert error <= tolerance, f"{name}: relative error {error:.3e} exceeds {tolerance:.3e} (PyTorch: {baseline:.3e})"


def assert_term_matters(name: str, gold: Tensor, without: Tensor, dtype: torch.dtype, *, times: float = 5.0) -> None:
    """Require that dropping a term moves the result by more than ``times`` the rounding of ``dtype``."""
    moved = relative_error(without, gold)
    tolerance = 4.0 * torch.finfo(dtype).eps
    print(f"{name}: dropping it moves the result by {moved:.2e} = {moved / tolerance:.0f} tolerances")
    assert moved > times * tolerance, f"{name} does not matter in this test: {moved:.2e} <= {times} x {tolerance:.2e}"


def eager_attention(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """``ops.chunked_attention`` in plain PyTorch and all in the dtype of its inputs: the baseline of 16-bit kernels.

    The reference itself computes those in fp32, which would be another contract.
    """
    return attend(*scores(query, key, value, **options))
