"""Modules of a model that users hooked, compiled, wrapped or replaced are called, and nothing goes around them."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bestrq2 import ops
from bestrq2.layers.conformer import Conformer, ConformerSettings
from bestrq2.layers.cross_attention import CrossTransformer
from bestrq2.layers.frame_grid import FrameGrid
from bestrq2.layers.transformer import Transformer, TransformerSettings
from bestrq2.ops import ChunkLayout


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def change(module, how, calls):
    """Change a module, which from then on notes its calls and gives the same results."""
    if how == "hook":
        module.register_forward_hook(lambda *call: calls.append(call))
    elif how == "compile":
        module.compile(backend=lambda graph, inputs: calls.append(inputs) or graph.forward)
    elif how == "forward":
        own = module.forward
        module.forward = lambda *arguments, **options: calls.append(arguments) or own(*arguments, **options)
    else:

        class Replacement(type(module)):
            def forward(self, *arguments, **options):
                calls.append(arguments)
                return super().forward(*arguments, **options)

        module.__class__ = Replacement


class Wrapped(nn.Module):
    """A module in the place of another that has nothing of it but its call, as adapters written by hand are."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *arguments, **options):
        self.calls.append(arguments)
        return self.inner(*arguments, **options)


def parts_of(model):
    return [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]


VARIANTS = {
    "transformer": lambda: Transformer(TransformerSettings(64, 2, 4)),
    "modern": lambda: Transformer(TransformerSettings(64, 2, 4, norm="rms_norm", qk_norm=True)),
    "cross": lambda: CrossTransformer(TransformerSettings(64, 2, 4)),
    "conformer": lambda: Conformer(ConformerSettings(64, 2, 4, 128, conv_mode="chunk", kernel_size=5)),
}


def outputs_of(model):
    x, angles = normal(2, 9, 64), torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(0))
    if isinstance(model, Conformer):
        return model(x, FrameGrid.whole(9, None, x.device), ChunkLayout(4, 8))
    if isinstance(model, CrossTransformer):
        return model(x, normal(2, 5, 64), angles=angles, context_angles=angles[:, :5])
    return model(x, angles=angles)


@pytest.mark.parametrize("how", ["hook", "compile", "replace", "forward"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_that_were_changed_are_called(variant, how):
    """Every module of a model, one by one: PyTorch calls each of them, so tools that hook or wrap them rely on it."""
    model = VARIANTS[variant]().eval()
    expected = outputs_of(model)
    for part in parts_of(model):
        changed = copy.deepcopy(model)
        module, calls = changed.get_submodule(part), []
        # torch.compile leaves modules of torch by themselves as they are.
        if how == "compile":
            torch.compiler.reset()  # or else the limit of recompilations is reached
            if type(module).__module__.startswith("torch.") or "blocks.1" in part:
                continue
        change(module, how, calls)
        torch.testing.assert_close(outputs_of(changed), expected, msg=lambda text, part=part: f"{part}: {text}")
        assert calls, part


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_that_were_wrapped_are_called(variant):
    """As adapters written by hand do, which have no ``weight``."""
    model = VARIANTS[variant]().eval()
    expected = outputs_of(model)
    for part in filter(None, parts_of(model)):
        module, calls = model.get_submodule(part), []
        model.set_submodule(part, Wrapped(module, calls))
        torch.testing.assert_close(outputs_of(model), expected)
        assert calls, part
        model.set_submodule(part, module)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrappers_may_cast_all_that_a_block_gets(variant):
    """As FSDP with mixed precision does: angles and factors of stochastic depth, too, which are float32."""
    make = {"transformer": Transformer, "modern": Transformer, "cross": CrossTransformer, "conformer": Conformer}[
        variant
    ]
    settings = VARIANTS[variant]().settings
    torch.manual_seed(0)
    model = make(replace(settings, drop_path=0.5)).bfloat16().train()

    def cast(module, arguments, options):
        def of(value):
            return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tree_map(of, arguments), tree_map(of, options)

    def outputs(context):
        torch.manual_seed(1)
        with context:
            return outputs_of(model).float()

    for module in (model, *model.blocks):
        module.register_forward_pre_hook(cast, with_kwargs=True)
    torch.testing.assert_close(outputs(nullcontext()), outputs(ops.use_backend("reference")), atol=0.06, rtol=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_classes_that_were_given_another_forward_are_called(variant, monkeypatch):
    """As quantizers, adapters and profilers patch ``nn.Linear.forward``, and Liger classes of a model."""
    model = VARIANTS[variant]().eval()
    expected = outputs_of(model)
    for kind in {type(module) for module in model.modules()} - {nn.ModuleList}:
        own, calls = kind.forward, set()

        def forward(self, *arguments, own=own, calls=calls, **options):
            calls.add(self)
            return own(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", forward)
            torch.testing.assert_close(outputs_of(model), expected)
        assert calls == {module for module in model.modules() if type(module) is kind}, kind


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_of_all_modules_see_every_module(variant, kind):
    model = VARIANTS[variant]().eval()
    expected, calls = outputs_of(model), set()
    handle = getattr(torch_module, f"register_module_{kind}")(lambda module, *values: calls.add(module))
    try:
        found = outputs_of(model)
        found.sum().backward()
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected)
    assert [part for part in parts_of(model) if model.get_submodule(part) not in calls] == []


@pytest.mark.parametrize("angles", [False, True])
def test_identities_in_place_of_norms_of_queries_and_keys_are_called_when_hooked(angles):
    model, calls = Transformer(TransformerSettings(64, 1, 4)).eval(), []
    for norm in (model.blocks[0].attn.q_norm, model.blocks[0].attn.k_norm):
        norm.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    model(normal(2, 9, 64), angles=torch.rand(1, 9, 8) if angles else None)
    assert calls == [(2, 4, 9, 16)] * 2


class Arriving(torch.autograd.Function):
    """Results and gradients of a layer as ``parallelize_module`` makes them: tensors that have no address."""

    @staticmethod
    def forward(ctx, x):
        return AsyncCollectiveTensor(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return AsyncCollectiveTensor(grad.clone())


class Split(nn.Linear):
    def forward(self, x):
        return Arriving.apply(super().forward(Arriving.apply(x)))


def gradients_of(model):
    model.zero_grad()
    output = outputs_of(model)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_of_collectives_are_waited_for(variant):
    model = VARIANTS[variant]().eval()
    expected = gradients_of(model)
    for part, module in [*model.named_modules()]:
        if type(module) is nn.Linear:
            split = copy.deepcopy(model)
            split.get_submodule(part).__class__ = Split
            for found, wanted in zip(gradients_of(split), expected):
                torch.testing.assert_close(found, wanted, msg=lambda text, part=part: f"{part}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_that_a_checkpoint_saves_stay_as_they_are(variant):
    """Selective activation checkpointing hands the saved products to the second forward pass."""

    def policy(ctx, operator, *_, **__):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    model = VARIANTS[variant]().eval()
    for parameter in model.parameters():  # biases begin at zero
        nn.init.normal_(parameter, std=0.1)
    expected = gradients_of(model)
    model.zero_grad()
    output = checkpoint(
        outputs_of, model, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    output.square().sum().backward()
    for found, wanted in zip((output.detach(), *(parameter.grad for parameter in model.parameters())), expected):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("change_of_depth", [1, -1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_that_were_added_or_taken_away(variant, change_of_depth):
    """The blocks that are there run, in training and in evaluation, and stochastic depth rises over them."""
    made = VARIANTS[variant]()
    model = type(made)(replace(made.settings, drop_path=0.01))
    added = nn.ModuleList([*model.blocks, copy.deepcopy(model.blocks[0])])
    model.blocks = added if change_of_depth > 0 else model.blocks[:-1]
    for training in (True, False):
        model.train(training).zero_grad()
        outputs_of(model).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.blocks.parameters())
