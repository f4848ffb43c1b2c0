"""torch.compile: blocks once for all layers and lengths, the whole model once for all steps; the update left out."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from bestrq2.config import load_config
from bestrq2.models.build import build_model
from bestrq2.training.compilation import compile_blocks, compiles
from bestrq2.training.optimizer import step_if_finite

SIZES = [f"model.{part}.{key}" for part in ("encoder", "predictor") for key in ("width=32", "heads=2", "hidden=48")]
SIZES += ["model.encoder.depth=5", "model.predictor.depth=2", "model.encoder.drop_path=0.2"]


@pytest.fixture
def model(request):
    torch.compiler.reset()
    torch.manual_seed(0)
    yield build_model(load_config("best_rq2_tiny", [*SIZES, *getattr(request, "param", [])]))
    torch.compiler.reset()


def losses(model, steps, samples=(8000, 16000, 12000)):
    found = []
    for step in range(steps):
        length = samples[step % len(samples)]
        waveform = 0.1 * torch.randn(3, length, generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        loss = model(waveform, step=step, index=torch.arange(3)).loss
        loss.backward()
        found.append(loss.item())
    return found


def test_blocks_are_compiled_once_for_all_layers_and_lengths(model):
    plain = losses(model, 4)
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    assert losses(model, 4) == pytest.approx(plain, rel=1e-5)
    assert counter.frame_count <= 2  # blocks with and without stochastic depth: encoder and predictor


@pytest.mark.parametrize("model", [["model.encoder.depth=1", "model.predictor.depth=1"]], indirect=True)
def test_whole_model_is_not_compiled_in_every_step(model):
    plain = losses(model, 6)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    assert losses(compiled, 3) == pytest.approx(plain[:3], rel=1e-5)
    done = counter.frame_count
    assert losses(compiled, 6) == pytest.approx(plain, rel=1e-5)
    assert counter.frame_count == done


@pytest.mark.parametrize(("setting", "device", "expected"), [
    (None, "cpu", False), (None, "cuda", True), (True, "cpu", True), (False, "cuda", False),
])  # fmt: skip
def test_default(setting, device, expected):
    assert compiles(setting, torch.device(device)) is expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_update_is_left_out_where_a_value_is_not_finite(bad):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], 0.1, fused=True)
    weight.grad = torch.ones(4)
    step_if_finite(optimizer, torch.tensor([1.0, 2.0]))
    before, moment = weight.detach().clone(), optimizer.state[weight]["exp_avg"].clone()
    assert (before < 1).all()
    weight.grad = torch.full((4,), bad)
    step_if_finite(optimizer, torch.tensor([1.0, bad]))
    assert torch.equal(weight.detach(), before)
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)
    assert optimizer.state[weight]["step"] == 1
