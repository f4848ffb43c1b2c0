"""A classifier with its loss against ``nn.Linear`` and ``F.cross_entropy``."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bestrq2.layers import LinearMaskedCrossEntropy


def test_is_a_linear_layer_with_a_loss():
    torch.manual_seed(0)
    linear = nn.Linear(16, 37)
    head = LinearMaskedCrossEntropy(16, 37, label_smoothing=0.1)
    head.load_state_dict(linear.state_dict())
    hidden, targets, mask = torch.randn(3, 20, 16), torch.randint(37, (3, 20)), torch.rand(3, 20) < 0.5
    targets[0, :5] = -100
    loss, accuracy = head(hidden, targets, mask, return_accuracy=True)
    counts = mask & (targets != -100)
    expected = F.cross_entropy(linear(hidden[counts]), targets[counts], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(head.logits(hidden), linear(hidden))
    torch.testing.assert_close(accuracy, (linear(hidden).argmax(-1) == targets)[counts].float().mean())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(head.weight.grad, linear.weight.grad)
    torch.testing.assert_close(head.bias.grad, linear.bias.grad)


def test_starts_like_a_linear_layer():
    torch.manual_seed(0)
    head = LinearMaskedCrossEntropy(64, 500)
    bound = 1 / 8
    for parameter in (head.weight, head.bias):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert LinearMaskedCrossEntropy(4, 3, bias=False, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert "bias" not in LinearMaskedCrossEntropy(4, 3, bias=False).state_dict()
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        LinearMaskedCrossEntropy(4, 0)


def test_parameters_are_drawn_after_to_empty():
    """FSDP and loaders of large models make layers on the meta device and call this, as of ``nn.Linear``."""
    torch.manual_seed(0)
    expected = LinearMaskedCrossEntropy(64, 500)
    head = LinearMaskedCrossEntropy(64, 500, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    head.reset_parameters()
    assert torch.equal(head.weight, expected.weight)
    assert torch.equal(head.bias, expected.bias)


def test_several_codebooks():
    torch.manual_seed(0)
    head = LinearMaskedCrossEntropy(16, 37, num_codebooks=3, reduction="none")
    hidden, targets = torch.randn(5, 16), torch.randint(37, (5, 3))
    losses = head(hidden, targets)
    expected = F.cross_entropy(head.logits(hidden).flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(losses, expected.view(5, 3))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, targets), losses)
