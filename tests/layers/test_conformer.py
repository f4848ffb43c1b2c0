"""Conformer layers against literal definitions: convolution, batch norm, subsampling, positions, absent frames."""

import copy

import pytest
import torch

from bestrq2.layers.conformer import Conformer, ConformerSettings
from bestrq2.layers.conformer_attention import relative_sinusoids
from bestrq2.layers.conformer_convolution import MaskedBatchNorm, depthwise_convolution, past_frames
from bestrq2.layers.conformer_subsampling import ConvSubsampling
from bestrq2.layers.frame_grid import FrameGrid
from bestrq2.layers.masking import RandomMasking
from bestrq2.ops import ChunkLayout

SMALL = {"width": 16, "depth": 2, "heads": 2, "hidden": 24, "kernel_size": 5, "dropout": 0.0}


def literal_convolution(x, weight, bias, mode, chunk):
    """Double loop over output and input frames."""
    num_frames = x.shape[1]
    kernel = weight.shape[-1]
    shift = kernel - 1 if mode == "causal" else kernel // 2
    out = torch.zeros_like(x) + bias
    for i in range(num_frames):
        for tap in range(kernel):
            j = i - shift + tap
            beyond = mode == "chunk" and chunk is not None and j >= (i // chunk + 1) * chunk
            if 0 <= j < num_frames and not beyond:
                out[:, i] += weight[:, 0, tap] * x[:, j]
    return out


@pytest.mark.parametrize("mode", ["full", "causal", "chunk"])
@pytest.mark.parametrize(
    ("frames", "kernel", "chunk"),
    [(1, 3, 2), (7, 5, 3), (12, 5, 4), (13, 7, 1), (9, 31, 4), (5, 3, 8), (8, 1, 3), (6, 3, None)],
    ids=lambda value: str(value),
)
def test_convolution_matches_the_double_loop(mode, frames, kernel, chunk):
    x = torch.randn(2, frames, 3, dtype=torch.float64)
    layer = torch.nn.Conv1d(3, 3, kernel, groups=3, dtype=torch.float64)
    expected = literal_convolution(x, layer.weight, layer.bias, mode, chunk)
    torch.testing.assert_close(depthwise_convolution(x, layer, layer.kernel_size[0], mode, chunk), expected)


@pytest.mark.parametrize("mode", ["causal", "chunk"])
def test_convolution_continues_from_its_past(mode):
    x, layer = torch.randn(2, 22, 3, dtype=torch.float64), torch.nn.Conv1d(3, 3, 9, groups=3, dtype=torch.float64)
    whole = depthwise_convolution(x, layer, layer.kernel_size[0], mode, 4)
    past = x.new_zeros(2, past_frames(9, mode), 3)
    for begin, end in ((0, 4), (4, 16), (16, 22)):
        part = depthwise_convolution(x[:, begin:end], layer, layer.kernel_size[0], mode, 4, past)
        torch.testing.assert_close(part, whole[:, begin:end])
        past = torch.cat((past, x[:, begin:end]), 1)[:, -past.shape[1] :]


def test_batch_norm_leaves_out_padding():
    ours, torchs = MaskedBatchNorm(4), torch.nn.BatchNorm1d(4)
    x, valid = torch.randn(3, 6, 4) * 3 + 1, torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    for _ in range(3):
        torch.testing.assert_close(ours(x, valid)[valid], torchs(x[valid]))
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(x, valid)[valid], torchs(x[valid]))
    torch.testing.assert_close(ours.running_var, torchs.running_var)


def test_batch_norm_forgets_a_batch_that_is_not_finite():
    norm = MaskedBatchNorm(4)
    norm(torch.randn(3, 6, 4), None)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.full((3, 6, 4), float("inf")), None)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, var)


@pytest.mark.parametrize("channels", [(4, 3), (4, 4, 3)], ids=["4x", "8x"])
def test_subsampling_reads_its_own_frames_and_a_few_before(channels):
    layer = ConvSubsampling(10, 6, channels)
    factor = 2 ** len(channels)
    assert layer.factor == factor
    frames = torch.randn(1, 4 * factor, 10, requires_grad=True)
    tokens = layer(frames)
    assert tokens.shape == (1, 4, 6)
    for n in range(4):
        (gradient,) = torch.autograd.grad(tokens[0, n].square().sum(), frames, retain_graph=True)
        touched = gradient[0].abs().sum(1).nonzero().flatten().tolist()
        assert touched[-1] <= factor * (n + 1) - 1
        assert touched[0] >= factor * n - (factor - 1)


def test_subsampling_in_pieces():
    layer = ConvSubsampling(8, 6, (4, 3))
    frames = torch.randn(2, 28, 8)
    past = layer.start_past(2, frames)
    parts = [layer(frames[:, a:b], None, past) for a, b in ((0, 4), (4, 20), (20, 28))]
    torch.testing.assert_close(torch.cat(parts, 1), layer(frames), atol=1e-6, rtol=1e-5)


def test_sinusoids_know_the_direction():
    table = relative_sinusoids(-3, 5, 8, False, torch.device("cpu"))
    assert table.shape == (9, 8)
    torch.testing.assert_close(table[3], torch.tensor([0.0, 1.0] * 4))  # offset 0
    torch.testing.assert_close(table[5, 0], torch.tensor(2.0).sin())  # offset 2, fastest channel
    torch.testing.assert_close(table[1, 0::2], -table[5, 0::2])
    both = relative_sinusoids(-3, 5, 8, True, torch.device("cpu"))
    assert torch.equal(both[1], both[5])


def conformer(**settings):
    torch.manual_seed(2)
    model = Conformer(ConformerSettings(**{**SMALL, **settings})).eval()
    for parameter in model.parameters():  # the small initial weights would hide differences
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("mode", ["full", "chunk"])
@pytest.mark.parametrize("layout", [ChunkLayout(), ChunkLayout(4, 4)], ids=["whole", "chunks"])
def test_absent_frames_equal_a_literal_exclusion(mode, layout):
    """Tokens for some frames only must give what a Conformer gives whose attention is masked key by key."""
    model = conformer(conv_mode=mode)
    lengths = torch.tensor([14, 9])
    plan = RandomMasking((0.5, 0.5), span_length=3).plan(lengths, 0, torch.arange(2), "cpu")
    x = torch.randn(2, 14, 16)
    grid = FrameGrid.of_seen(plan, 14)
    tokens = model(grid.to_tokens(x), grid, layout)
    for clip in range(2):
        present = torch.zeros(14, dtype=torch.bool)
        present[plan.seen[clip, : plan.seen_lengths[clip]]] = True
        expected = literal_conformer(model, x[clip], present, layout)
        count = int(plan.seen_lengths[clip])
        torch.testing.assert_close(tokens[clip, :count], expected[present], atol=1e-5, rtol=1e-5)


def literal_conformer(model, x, present, layout):
    """One clip, every frame computed, absent keys removed from the softmax and absent frames from the convolution."""
    frames, settings = len(x), model.settings
    visible = layout.mask(frames) & present
    table = relative_sinusoids(1 - frames, frames - 1, settings.width, False, x.device)
    row = frames - 1 + torch.arange(frames)[:, None] - torch.arange(frames)
    for block in model.blocks:
        x = x + 0.5 * block.ff1(x)
        q, k, v = block.attn.qkv(block.attn_norm(x)).view(frames, 3, settings.heads, -1).permute(1, 2, 0, 3)
        position = block.attn.position(table).view(len(table), settings.heads, -1).transpose(0, 1)
        content = (q + block.attn.content_bias[:, None]) @ k.transpose(1, 2)
        by_row = (q + block.attn.position_bias[:, None]) @ position.transpose(1, 2)
        score = (content + by_row.gather(2, row.expand_as(content))) / settings.head_dim**0.5
        mixed = score.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0) @ v
        x = x + block.attn.proj(mixed.transpose(0, 1).flatten(1))
        conv = block.conv
        inner = torch.nn.functional.glu(conv.pointwise1(conv.norm(x)), dim=-1) * present[:, None]
        weight, bias = conv.depthwise.weight, conv.depthwise.bias
        inner = literal_convolution(inner[None], weight, bias, settings.conv_mode, layout.chunk_size)[0]
        x = x + conv.pointwise2(conv.act(conv.conv_norm(inner)))
        x = block.norm(x + 0.5 * block.ff2(x))
    return model.norm(x)


@torch.no_grad()
def test_all_frames_equal_the_literal_conformer():
    model = conformer()
    x = torch.randn(3, 11, 16)
    out = model(x, FrameGrid.whole(11, None, x.device), ChunkLayout())
    everything = torch.ones(11, dtype=torch.bool)
    for clip in range(3):
        expected = literal_conformer(model, x[clip], everything, ChunkLayout())
        torch.testing.assert_close(out[clip], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_activation_checkpointing_changes_nothing(norm):
    """The running statistics of batch norm neither: they counted every batch twice."""
    plain = conformer(conv_norm=norm).train()
    x = torch.randn(2, 9, 16)
    grid = FrameGrid.whole(9, torch.tensor([9, 6]), x.device)
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(plain)
        model.activation_checkpointing = checkpointing
        model(x, grid, ChunkLayout()).square().sum().backward()
        found.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not MaskedBatchNorm.repeated


def test_drop_path_and_dropout_only_act_in_training():
    model = conformer(drop_path=0.5, dropout=0.3)
    x, grid = torch.randn(4, 6, 16), FrameGrid(6)
    assert torch.equal(model(x, grid, ChunkLayout()), model(x, grid, ChunkLayout()))
    model.train()
    assert not torch.equal(model(x, grid, ChunkLayout()), model(x, grid, ChunkLayout()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"conv_mode": "centred"}, "conv_mode must be one of"),
        ({"conv_norm": "group"}, "conv_norm must be one of"),
        ({"heads": 3}, "multiple of heads"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout and drop_path"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConformerSettings(**{**SMALL, **settings})
