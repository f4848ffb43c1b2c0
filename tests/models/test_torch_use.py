"""Models in the hands of PyTorch: outputs as trees, wrappers of modules, copies, functional calls, tracing."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from model_kinds import features_of, model_of, ragged
from torch.nn.parallel import DistributedDataParallel

from bestrq2.interchange.exportable import exportable
from bestrq2.ops.common.native import extension_obstacle


@pytest.fixture(scope="module", params=["strips", "options"])
def case(request):
    """The model, and its output for one step."""
    model = model_of(request.param)
    return model, model(*ragged(), step=3)


def test_outputs_by_name_and_place(case):
    _, output = case
    names = ["objective", "loss", "accuracy", "codes", "plan", "patches", "hidden"]
    assert list(output.keys()) == names + ["clip_loss"] * (output.clip_loss is not None)
    assert torch.equal(output[0], output.objective)
    assert dict(output)["loss"] is output.loss
    assert output["codes"] is output.codes
    assert output[-1] is (output.hidden if output.clip_loss is None else output.clip_loss)
    assert len(output) == len(tuple(output)) == len(output[:99])
    objective, loss, *_ = output
    assert torch.equal(objective, output.objective)
    assert loss is output.loss
    assert "loss" in output
    assert ("clip_loss" in output) == (output.clip_loss is not None)
    with pytest.raises(KeyError, match="expected one of objective, loss"):
        output["losses"]
    with pytest.raises(IndexError):
        output[9]


def test_outputs_are_trees(case):
    _, output = case
    leaves, form = pytree.tree_flatten(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for tensor in (output.loss, output.hidden, output.codes, output.plan.seen, output.patches.values):
        assert any(leaf is tensor for leaf in tensors)
    assert any(leaf is output.plan.masked_lengths for leaf in tensors)
    again = pytree.tree_unflatten([leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], form)
    assert not again.loss.requires_grad
    assert type(again.plan) is type(output.plan)
    assert (again.patches.rows, again.clip_weight) == (output.patches.rows, output.clip_weight)
    assert torch.equal(again.touching_share(), output.touching_share())


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_distributed_data_parallel(alone, options):
    """Every gradient goes to the other ranks (here: to a hook), in every step."""
    model = model_of("options")
    expected = model_of("options")
    wrapped = DistributedDataParallel(model, **options)
    sent = []

    def send(_, bucket):
        sent.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, send)
    for step in range(3):
        sent.clear()
        for trained in (wrapped, expected):
            trained.zero_grad()
            torch.manual_seed(5)  # stochastic depth
            trained(*ragged(), step=step).objective.backward()
        assert sum(sent) == sum(parameter.numel() for parameter in model.parameters())
        for found, wanted in zip(gradients(model), gradients(expected)):
            torch.testing.assert_close(found, wanted)


def test_copies_and_functional_calls(case):
    model, output = case
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).share_memory()):
        assert torch.equal(other(*ragged(), step=3).codes, output.codes)
    waveform, lengths = ragged()
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
        torch.manual_seed(5)
        wanted = other(waveform, lengths, step=3)
        torch.manual_seed(5)
        found = torch.func.functional_call(model, doubled, (waveform, lengths), {"step": 3})
    # Weights that are no parameters take PyTorch's product with bias, which rounds as another one on some processors.
    torch.testing.assert_close(found.loss, wanted.loss)


@pytest.mark.parametrize("kind", ["strips", "streaming"])
def test_tracing_is_refused_in_words(kind):
    """A trace would hold the lengths of the example."""
    encoder = model_of(kind).eval().encoder
    for trace in (torch.jit.trace, torch.export.export):
        with pytest.raises(Exception, match="bestrq2 export ENCODER --torch-export"):
            trace(encoder, ragged())


@pytest.mark.parametrize("kind", ["strips", "streaming"])
def test_exportable_leaves_the_encoder_alone(kind):
    """Also of a half-precision encoder: the graph is in float32, the encoder stays what and where it was."""
    encoder = model_of(kind).train().to(torch.bfloat16).encoder
    next(encoder.parameters()).grad = torch.ones_like(next(encoder.parameters()))
    before = {name: (tensor, tensor.dtype, tensor.requires_grad) for name, tensor in encoder.state_dict().items()}
    graph = exportable(encoder)
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert next(encoder.parameters()).grad is not None
    after = {name: (tensor, tensor.dtype, tensor.requires_grad) for name, tensor in encoder.state_dict().items()}
    assert all(torch.equal(after[name][0], before[name][0]) and after[name][1:] == before[name][1:] for name in before)
    assert {parameter.dtype for parameter in graph.parameters()} == {torch.float32}
    waveform, lengths = ragged()
    expected = copy.deepcopy(encoder).float().eval().encode(waveform, lengths)[0]
    torch.testing.assert_close(graph(waveform, lengths)[0], expected.detach(), atol=1e-4, rtol=1e-4)


def test_lengths():
    """Integers of any kind; shares of the longest clip, as SpeechBrain has them, would mean clips of one sample."""
    model = model_of("streaming").eval()
    waveform, lengths = ragged()
    expected = features_of(model, waveform, lengths)
    for same in (lengths.int(), lengths.tolist(), tuple(lengths.tolist())):
        assert torch.equal(features_of(model, waveform, same), expected)
    state = model.encoder.start_stream(3)
    for relative in (torch.ones(3), lengths / 40000, [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="multiply relative lengths by the number of samples"):
            model.encoder.encode(waveform, relative)
        with pytest.raises(ValueError, match="multiply relative lengths by the number of samples"):
            model.encoder.stream(waveform, state, relative)
    with pytest.raises(ValueError, match=r"integers, got torch\.bool"):
        model.encoder.encode(waveform, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["options", "streaming"])
def test_a_frozen_encoder_stays_in_evaluation_mode(kind):
    """Trainers call ``model.train()`` on everything they hold."""
    encoder, (waveform, lengths) = model_of(kind).encoder.eval(), ragged()
    expected = encoder.encode(waveform, lengths)[0]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    whole = torch.nn.ModuleList([encoder.requires_grad_(False), torch.nn.Linear(64, 2)]).train()
    assert whole[1].training
    assert not any(module.training for module in encoder.modules())
    assert torch.equal(encoder.encode(waveform, lengths)[0], expected.detach())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    next(iter(encoder.parameters())).requires_grad_()
    assert all(module.training for module in whole.train().modules())


@pytest.mark.parametrize("kind", ["strips", "one_stage", "conformer"])
def test_penalties_of_gradients_are_refused(kind):
    """They left out what passes through the operations, and trained one parameter of forty."""
    model, (waveform, lengths) = model_of(kind).eval(), ragged()
    loss = model(waveform.requires_grad_(), lengths, step=0).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, waveform, create_graph=True)


@pytest.mark.skipif(bool(extension_obstacle()), reason="the C++ extension is not built")
@pytest.mark.parametrize("kind", ["strips", "grid", "conformer"])
def test_penalties_of_gradients_of_features_are_refused(kind):
    encoder, (waveform, lengths) = model_of(kind).encoder.eval(), ragged()
    features, _ = encoder.encode(waveform.requires_grad_(), lengths)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(features.sum(), waveform, create_graph=True)
