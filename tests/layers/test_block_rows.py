"""The C++ passes between the products of a block, against the plain formulas in fp64."""

import pytest
import torch
from torch import nn

from bestrq2 import ops
from bestrq2.layers.block_rows import gated, residual_norm, split_heads, stochastic_depth
from bestrq2.ops._impl import native

pytestmark = pytest.mark.skipif(native.extension_obstacle() is not None, reason="the C++ extension is not built")
DTYPES = (torch.float32, torch.bfloat16)


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def results(function, inputs, parameters):
    """Outputs and gradients of inputs and parameters, under fixed upstream gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(*x.shape, seed=100 + i).detach().to(x.dtype) for i, x in enumerate(outputs)]
    leaves = [x for x in inputs if x.requires_grad] + parameters
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


def check(function, inputs, modules=()):
    """Kernel error at most twice that of PyTorch in the same dtype, plus rounding of the result."""
    dtype = inputs[0].dtype
    parameters = [p for m in modules for p in m.parameters()]
    ours = results(function, inputs, parameters)
    with ops.use_backend("reference"):
        plain = results(function, inputs, parameters)
        for module in modules:
            module.double()
        exact = results(function, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], parameters)
        for module in modules:
            module.float()
    for mine, theirs, true in zip(ours, plain, exact):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        scale = true.abs().max()
        error, allowed = (mine.double() - true).abs().max() / scale, (theirs.double() - true).abs().max() / scale
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("width", [96, 37])
def test_residual_norm(kind, dtype, width):
    norm = kind(width, eps=1e-5)
    for number, parameter in enumerate(norm.parameters()):
        parameter.data = normal(width, seed=number + 7).detach()
    x, branch = normal(3, 70, width, dtype=dtype), normal(3, 70, width, seed=1, dtype=dtype)
    scale = torch.tensor([0.0, 1.25, 1.0])
    check(lambda x: residual_norm(x, None, norm), [x], [norm])
    check(lambda x, b: residual_norm(x, b, norm), [x, branch], [norm])
    check(lambda x, b: residual_norm(x, b, norm, scale.to(torch.promote_types(x.dtype, scale.dtype)), 0.5),
          [x, branch], [norm])  # fmt: skip


def test_residual_norm_without_the_gradient_of_one_result():
    norm = nn.RMSNorm(16, eps=1e-5)
    x, branch = normal(2, 3, 16), normal(2, 3, 16, seed=1)
    scale = torch.tensor([2.0, 0.0])
    check(lambda x, b: residual_norm(x, b, norm, scale.to(x.dtype))[1], [x, branch], [norm])
    total = residual_norm(x, branch, norm, scale)[0]
    grad_x, grad_branch = torch.autograd.grad(total.sum(), (x, branch))
    assert (grad_x == 1).all()
    assert torch.equal(grad_branch, scale[:, None, None].expand(2, 3, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype):
    check(gated, [(8 * normal(3, 50, 74, dtype=dtype)).detach().requires_grad_()])


def test_gated_far_from_zero():
    x = torch.tensor([[-200.0, -88.5, 0.0, 88.5, 200.0, 1.0, 1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    out = gated(x)
    assert torch.allclose(out, torch.tensor([[0.0, 0.0, 0.0, 88.5, 200.0]]), atol=1e-30)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("clips", [None, 1, 3])  # of the angles; None: no rotation
def test_split_heads(dtype, normed, clips):
    norms = [nn.RMSNorm(24, eps=1e-5) if normed else nn.Identity() for _ in range(2)]
    for norm in norms:
        for parameter in norm.parameters():
            parameter.data = normal(24, seed=3).detach()

    def split(qkv):
        angles = (
            None
            if clips is None
            else normal(clips, 41, 12, seed=4).detach().to(torch.promote_types(qkv.dtype, torch.float32))
        )
        return split_heads(qkv, *norms, None if angles is None else (angles.cos(), angles.sin()))

    check(split, [normal(3, 41, 3, 2, 24, dtype=dtype)], norms)


def test_gradients_do_not_depend_on_threads():
    norm, x = nn.LayerNorm(64), normal(5, 333, 64, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(lambda x: residual_norm(x, None, norm), [x], list(norm.parameters())))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


def test_stochastic_depth():
    assert stochastic_depth([0.0, 0.0], 2, 8, torch.device("cpu")) is None
    torch.manual_seed(0)
    scales = stochastic_depth([0.0, 0.25], 2, 10000, torch.device("cpu"))
    assert scales.shape == (2, 2, 10000)
    assert (scales[0] == 1).all()
    assert scales[1].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(scales[1].mean()) == pytest.approx(1.0, abs=0.02)
