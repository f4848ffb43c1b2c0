"""The C++ passes between the products of a block, against the plain formulas in fp64."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from bestrq2 import ops
from bestrq2.layers.block_rows import (
    Branch,
    gated,
    gelu,
    kept_clips,
    linear,
    residual_norm,
    residual_sum,
    split_heads,
    stochastic_depth,
)
from bestrq2.layers.positions import turn
from bestrq2.layers.transformer import Transformer, TransformerSettings, make_norm
from bestrq2.ops.common import native

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drops", [False, True])
def test_branch_with_bias_of_some_clips(dtype, drops):
    norm, bias = nn.LayerNorm(40), nn.Linear(1, 40)
    scale = torch.tensor([1.25, 0.0, 1.0]) if drops else None
    x, branch = normal(3, 9, 40, dtype=dtype), normal(2 if drops else 3, 9, 40, seed=1, dtype=dtype)
    kept = kept_clips(scale, x)
    assert drops == (kept is not None)
    out = kept_clips(torch.tensor([0.0, 0.0, 2.0]), x)

    def pending(x, values):
        scales = None if scale is None else scale.to(torch.promote_types(x.dtype, scale.dtype))
        return Branch(values, bias.bias, scales, 0.5, kept)

    check(lambda x, b: residual_norm(x, pending(x, b), norm, kept=out), [x, branch], [norm])
    check(lambda x, b: residual_sum(x, pending(x, b)), [x, branch])
    leaves = (bias.bias, branch)
    mine = torch.autograd.grad(residual_sum(x, pending(x, branch)).float().square().sum(), leaves)
    with ops.use_backend("reference"):
        plain = torch.autograd.grad(residual_sum(x, pending(x, branch)).float().square().sum(), leaves)
    for one, other in zip(mine, plain):
        assert (one - other).abs().max() <= 2 * torch.finfo(dtype).eps * other.abs().max()


def test_nothing_kept_keeps_one_clip():
    x = torch.zeros(3, 2, 4)
    assert kept_clips(torch.zeros(3), x).place.tolist() == [0, -1, -1]
    assert kept_clips(torch.ones(3), x) is None
    assert kept_clips(None, x) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(dtype):
    layer = nn.Linear(1, 200)
    x = normal(5, 7, 200, dtype=dtype)
    with torch.no_grad():
        x *= 4
    check(lambda x: gelu(x, layer.bias.to(torch.promote_types(x.dtype, torch.float32))), [x])
    far = torch.tensor([-1e30, -40.0, -12.0, 0.0, 12.0, 40.0, 1e30, torch.nan], dtype=torch.float32)
    assert torch.equal(gelu(far).isnan(), far.isnan())
    assert gelu(far)[4:7].tolist() == far[4:7].tolist()
    assert float(gelu(far)[:4].abs().max()) < 1e-30
    gelu(x, layer.bias).float().square().sum().backward()
    found, layer.bias.grad = layer.bias.grad, None
    with ops.use_backend("reference"):
        gelu(x, layer.bias).float().square().sum().backward()
    assert (found - layer.bias.grad).abs().max() <= 2 * torch.finfo(dtype).eps * found.abs().max()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_gelu_on_every_instruction_set(isa):
    extension = native.extension()
    before = extension.isa()
    if not extension.force_isa(isa):
        pytest.skip(f"no {isa} here")
    try:
        x = torch.linspace(-9, 9, 40_001).requires_grad_()
        out = gelu(x)
        (slope,) = torch.autograd.grad(out.sum(), x)
    finally:
        extension.force_isa(before)
    wide = x.detach().double().requires_grad_()
    true = torch.nn.functional.gelu(wide)
    (true_slope,) = torch.autograd.grad(true.sum(), wide)
    assert float(((out.detach() - true.detach()).abs() / true.detach().abs().clamp(min=1)).max()) < 3e-7
    assert float((slope - true_slope).abs().max()) < 4e-7


@pytest.mark.parametrize("autocast", [False, True])
def test_linear(autocast):
    layer, x = nn.Linear(24, 40), normal(3, 50, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mine = linear(layer, x)
        theirs = layer(x)
    assert mine.dtype == theirs.dtype
    leaves = (x, layer.weight, layer.bias)
    pairs = [(mine, theirs)]
    pairs += zip(*(torch.autograd.grad(y.float().square().sum(), leaves) for y in (mine, theirs)))
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= 3 * torch.finfo(mine.dtype).eps * other.abs().max()


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("first", [0, 7])
def test_transformer_is_that_of_plain_pytorch(modern, first):
    """With dropped branches, biases, and the tokens from ``first`` on."""
    variant = {"norm": "rms_norm", "feed_forward": "swiglu", "bias": False, "qk_norm": True} if modern else {}
    results = []
    for backend in (None, "reference"):
        torch.manual_seed(0)
        model = Transformer(TransformerSettings(width=32, depth=3, heads=2, drop_path=0.8, **variant))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.3)
        x, angles = torch.randn(5, 12, 32, requires_grad=True), torch.rand(1, 12, 8) if modern else None
        torch.manual_seed(1)
        with ops.use_backend(backend) if backend else nullcontext():
            out = model(x, angles=angles, first=first)
        assert out.shape == (5, 12 - first, 32)
        out.pow(3).sum().backward()
        results.append([out, x.grad, *[p.grad for p in model.parameters()]])
    for mine, plain in zip(*results):
        assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()


class Doubled(nn.Module):
    """A wrapper that passes on the attributes of what it wraps, as those of PEFT and of accelerate do."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x):
        return self.wrapped(x) * 2


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("scale", [None, torch.tensor([2.0, 0.0])])
@pytest.mark.parametrize("make", [Doubled, lambda norm: nn.GroupNorm(1, 5), lambda norm: nn.Identity()])
def test_a_norm_put_in_place_of_ours_is_used(kind, make, scale):
    """It was taken for a norm over the last dimension, and memory behind its fewer weights was read and written."""
    norm = make(make_norm(kind, 64))
    x, branch = normal(2, 5, 64), normal(2, 5, 64, seed=1)
    total, out = residual_norm(x, branch, norm, scale, 0.5)
    added = branch if scale is None else branch * scale[:, None, None]
    torch.testing.assert_close(total, x + 0.5 * added)
    torch.testing.assert_close(out, norm(total))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((5, 64)), nn.LayerNorm(64, elementwise_affine=False), nn.RMSNorm((5, 64))]
)
def test_norms_of_torch_of_other_shapes(norm):
    x, branch = normal(2, 5, 64), normal(2, 5, 64, seed=1)
    total, out = residual_norm(x, branch, norm)
    torch.testing.assert_close(out, norm(total))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_our_norms_of_several_dimensions(kind):
    norm = type(make_norm(kind, 64))((5, 64))
    plain = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[kind]((5, 64), eps=norm.eps)
    torch.testing.assert_close(norm(normal(2, 5, 64)), plain(normal(2, 5, 64)))


@pytest.mark.parametrize("norms", [(nn.RMSNorm(8, elementwise_affine=False),) * 2, (nn.RMSNorm(8), nn.Identity())])
def test_other_norms_of_queries_and_keys(norms):
    qkv, angles = normal(2, 5, 3, 4, 8), torch.rand(1, 5, 4)
    rotation = angles.cos(), angles.sin()
    results = split_heads(qkv, *norms, rotation)
    expected = [turn(norm(part), *rotation) for norm, part in zip(norms, qkv.permute(2, 0, 3, 1, 4))]
    torch.testing.assert_close([*results[:2]], expected)
