"""AdamW and the gradient norm in C++, against PyTorch's in float64."""

import contextlib

import pytest
import torch
from torch import nn

from bestrq2 import ops
from bestrq2.config import OptimizerConfig, load_config
from bestrq2.layers.transformer import Block, TransformerSettings
from bestrq2.ops.common import native
from bestrq2.training.optimizer import (
    accept_bf16_gradients,
    clip_gradients,
    make_optimizer,
    set_schedule,
)

pytestmark = pytest.mark.skipif(native.extension_obstacle() is not None, reason="the C++ extension is not built")
CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.3, decay_all=False, warmup=0.0)


def model(dtype=torch.float32):
    # More than one piece of 65,536 elements, a tail of less than a vector, and a single element.
    torch.manual_seed(0)
    module = nn.Module()
    for name, shape in {"large": (300, 301), "odd": (7,), "one": (1,)}.items():
        module.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))
    return module


def gradients(module, step, bf16=False):
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step - 2)
        p.grad = (grad.bfloat16() if bf16 else grad).to(p.dtype if not bf16 or p.dtype == torch.float64 else grad.dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_adamw_is_that_of_pytorch(threads):
    mine, plain, exact = model(), model(), model(torch.float64)
    optimizers = [make_optimizer(m, CONFIG) for m in (mine, plain, exact)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(4):
            for module, optimizer in zip((mine, plain, exact), optimizers):
                set_schedule(optimizer, step, 100, CONFIG)
                gradients(module, step)
                with ops.use_backend("reference" if module is plain else "cpu"):
                    optimizer.step()
    finally:
        torch.set_num_threads(before)
    for p, q, true in zip(mine.parameters(), plain.parameters(), exact.parameters()):
        error, allowed = (p - true).abs().max(), (q - true).abs().max()
        assert error <= 2 * allowed + 1e-7 * true.abs().max()
        state, other = optimizers[0].state[p], optimizers[1].state[q]
        assert state.keys() == other.keys()
        assert float(state["step"]) == float(other["step"]) == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert (state[key] - other[key]).abs().max() <= 1e-6 * other[key].abs().max()


def test_bits_do_not_depend_on_threads():
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        module = model()
        optimizer = make_optimizer(module, CONFIG)
        torch.set_num_threads(threads)
        try:
            gradients(module, 1)
            norm = clip_gradients(module, None)
            optimizer.step()
        finally:
            torch.set_num_threads(before)
        found.append([norm, *module.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("most", [None, 1.0, 1e6])
def test_norm_and_clipping(most):
    mine, plain = model(), model()
    gradients(mine, 2), gradients(plain, 2)
    norm = clip_gradients(mine, most)
    true = torch.cat([p.grad.flatten() for p in plain.parameters()]).double().norm()
    assert abs(float(norm) - float(true)) <= 1e-6 * float(true)
    if most is not None:
        nn.utils.clip_grad_norm_(plain.parameters(), most)
    for p, q in zip(mine.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6)
    gradients(mine, 2)
    mine.odd.grad[3] = torch.inf
    assert not clip_gradients(mine, None).isfinite()


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has one dtype for a tensor and its grad"
)
@pytest.mark.parametrize("most", [None, 0.01])
def test_bf16_gradients_change_no_result(most):
    results, norms = [], []
    for accept in (False, True):
        torch.manual_seed(0)
        block = Block(TransformerSettings(width=64, depth=1, heads=2))
        if accept:
            accept_bf16_gradients(block, load_config("best_rq2_tiny", []), torch.bfloat16, 1)
        optimizer = make_optimizer(block, CONFIG)
        x = torch.randn(2, 20, 64)
        for step in range(3):
            set_schedule(optimizer, step, 10, CONFIG)
            with torch.autocast("cpu", torch.bfloat16):
                loss = block(x).float().square().mean()
            loss.backward()
            assert (block.mlp.fc1.weight.grad.dtype == torch.bfloat16) == accept
            assert block.mlp.fc1.bias.grad.dtype == torch.float32
            norm = clip_gradients(block, most, optimizer=optimizer)
            assert (optimizer.gradient_factor < 1) == (most is not None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        norms.append(norm)
        results.append([loss, *block.parameters()])
    for a, b in zip(*results):
        assert torch.equal(a, b) if most is None else torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*norms)  # squares of the two dtypes are added in another order


@pytest.mark.parametrize("backend", [None, "reference"], ids=["fused", "torch"])
def test_update_clips_gradients(backend):
    """The update applies the factor to the gradients of its step alone, also where torch computes it."""
    mine, plain = model(), model()
    optimizers = [make_optimizer(m, CONFIG) for m in (mine, plain)]
    for seed, most in ((1, 0.5), (2, None), (3, 0.1)):
        optimizers[0].gradient_factor = 0.0  # of an update that was skipped
        for module, optimizer in zip((mine, plain), optimizers):
            gradients(module, seed)
            norm = clip_gradients(module, None if module is plain else most, optimizer=optimizer)
        if most is not None:
            nn.utils.clip_grads_with_norm_(plain.parameters(), most, norm)
            assert optimizers[0].gradient_factor < 1
        with contextlib.nullcontext() if backend is None else ops.use_backend(backend):
            for optimizer in optimizers:
                optimizer.step()
        assert optimizers[0].gradient_factor == 1.0
    for p, q in zip(mine.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_where_bf16_gradients_change_no_result():
    def taken(*overrides, autocast=torch.bfloat16, ranks=1):
        config = load_config("best_rq2_tiny", overrides)
        return accept_bf16_gradients(Block(TransformerSettings(width=8, depth=1, heads=2)), config, autocast, ranks)

    assert taken("optimizer.max_grad_norm=null") == hasattr(torch.Tensor, "grad_dtype")
    assert taken("optimizer.max_grad_norm=1") == hasattr(torch.Tensor, "grad_dtype")
    assert not taken("optimizer.max_grad_norm=null", "train.accumulate=2")
    assert not taken("optimizer.max_grad_norm=null", autocast=None)
    assert not taken("optimizer.max_grad_norm=null", ranks=2)
