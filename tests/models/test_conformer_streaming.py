"""Streaming equals the masked full pass, and nothing ahead of a chunk moves its features."""

import pytest
import torch

from bestrq2.config import load_config
from bestrq2.layers.chunk_sampling import SpeechBrainChunks
from bestrq2.layers.conformer import ConformerSettings
from bestrq2.layers.log_mel import LogMel
from bestrq2.models import ConformerEncoder, StreamingState, build_encoder
from bestrq2.ops import ChunkLayout

HOP = 160


def encoder(conv_mode="chunk", heads=2, depth=3, channels=(4, 4), kernel=5, norm="layer_norm", n_fft=512):
    torch.manual_seed(4)
    front = LogMel(n_fft=n_fft, win_length=400, hop_length=HOP, num_mels=16, mean=-45, std=20)
    settings = ConformerSettings(16, depth, heads, 24, kernel, conv_mode, norm)
    model = ConformerEncoder(front, settings, channels, ChunkLayout(4, 8)).eval()
    with torch.no_grad():
        for block in model.encoder.blocks:  # the small initial weights would hide differences
            for parameter in block.parameters():
                parameter.normal_(std=0.3)
    return model


def pieces(total, sizes):
    """Borders of pieces with the given sizes, repeated until the end."""
    begin, number = 0, 0
    while begin < total:
        end = min(total, begin + sizes[number % len(sizes)])
        yield begin, end
        begin, number = end, number + 1


def masked_full_pass(model, waveform, lengths, layout):
    patches = model.patches(waveform, lengths)
    return model.transform(patches.frames, patches.lengths, layout), patches.lengths


def stream_all(model, waveform, layout, sizes, state=None):
    state = state or model.start_stream(len(waveform), layout, allow_untrained=True)
    outputs = []
    for begin, end in pieces(waveform.shape[1], sizes):
        features, counts = model.stream(waveform[:, begin:end], state, final=end == waveform.shape[1])
        assert counts.tolist() == [features.shape[1]] * len(waveform)
        outputs.append(features)
    return torch.cat(outputs, 1)


LAYOUTS = [(1, 0), (1, 3), (3, 0), (3, 2), (4, 8), (4, None), (5, 7), (64, None)]


@torch.no_grad()
@pytest.mark.parametrize("conv_mode", ["causal", "chunk"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda value: f"C{value[0]}-L{value[1]}")
@pytest.mark.parametrize("tail", [0, 1, 799, 2413])
def test_streaming_equals_the_masked_full_pass(conv_mode, layout, tail):
    model, layout = encoder(conv_mode), ChunkLayout(*layout)
    waveform = torch.randn(2, 4 * 4 * HOP * 4 + tail) * 0.1
    expected, _ = masked_full_pass(model, waveform, None, layout)
    streamed = stream_all(model, waveform, layout, (640, 1, 3000, 77))
    torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1_000_000,), (160,), (100, 999), (5000, 3), (641,)], ids=str)
def test_any_split_gives_the_same(sizes):
    model = encoder(heads=4, depth=2, kernel=9)
    waveform = torch.randn(1, 15001) * 0.1
    expected, _ = masked_full_pass(model, waveform, None, ChunkLayout(4, 6))
    torch.testing.assert_close(stream_all(model, waveform, ChunkLayout(4, 6), sizes), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"channels": (4, 4, 3)},
        {"n_fft": 1024},
        {"n_fft": 405},
        {"norm": "batch_norm"},
        {"heads": 1, "depth": 1},
        {"kernel": 31},
    ],
    ids=["8x", "long-window", "odd-window", "batch-norm", "one-layer", "long-kernel"],
)
def test_variants(options):
    model = encoder(**options)
    for samples in (20321, 127 * HOP):
        waveform = torch.randn(2, samples) * 0.1
        expected, _ = masked_full_pass(model, waveform, None, ChunkLayout(3, 4))
        streamed = stream_all(model, waveform, ChunkLayout(3, 4), (1600, 333))
        torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("split", [480, 1600, 4321])
def test_clips_that_end_at_different_times(split):
    model, layout = encoder(), ChunkLayout(4, 8)
    lengths = torch.tensor([12345, 7000, 4800, 300, 1])
    waveform = torch.randn(5, 12345) * 0.1
    expected, counts = model.encode(waveform, lengths, layout=layout)
    state = model.start_stream(5, layout, allow_untrained=True)
    outputs, valid = [], []
    for begin in range(0, 12345, split):
        part = waveform[:, begin : begin + split]
        features, new = model.stream(part, state, (lengths - begin).clamp(0, part.shape[1]), begin + split >= 12345)
        outputs.append(features)
        valid.append(new)
    assert sum(valid).tolist() == counts.tolist()
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("conv_mode", ["causal", "chunk"])
def test_the_future_moves_nothing_bit_for_bit(conv_mode):
    model, layout = encoder(conv_mode), ChunkLayout(4, 8)
    waveform = torch.randn(1, 16000) * 0.1
    frames = model.patches(waveform).frames
    before = model.transform(frames, None, layout)
    for frame in range(before.shape[1]):
        changed = frames.clone()
        begin = frame * model.factor
        changed[:, begin:] = torch.randn_like(changed[:, begin:]) * 100
        after = model.transform(changed, None, layout)
        border = frame // 4 * 4  # earlier chunks must not see it
        assert torch.equal(after[:, :border], before[:, :border])
        assert not torch.equal(after[:, border : border + 4], before[:, border : border + 4])


@torch.no_grad()
def test_later_audio_moves_no_streamed_feature_bit_for_bit():
    model = encoder()
    waveform = torch.randn(1, 16000) * 0.1
    state = model.start_stream(1, allow_untrained=True)
    first, _ = model.stream(waveform[:, :9000], state)
    other = model.start_stream(1, allow_untrained=True)
    changed = torch.cat((waveform[:, :9000], torch.randn(1, 7000)), 1)
    again, _ = model.stream(changed[:, :9000], other)
    assert first.shape[1] > 0
    assert torch.equal(first, again)
    # Whole chunks come out as soon as their last window has arrived, not later.
    assert first.shape[1] == ((9000 - 256) // HOP + 1) // 16 * 4


@torch.no_grad()
def test_state_can_be_saved_moved_and_continued(tmp_path, device):
    from safetensors.torch import load_file, save_file

    model = encoder().to(device)
    waveform = torch.randn(2, 16000, device=device) * 0.1
    whole = model.start_stream(2, allow_untrained=True)
    head, _ = model.stream(waveform[:, :7000], whole)
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    restored = StreamingState.from_state_dict(load_file(tmp_path / "state.safetensors")).to(device)
    assert restored.layout == whole.layout
    rest, _ = model.stream(waveform[:, 7000:], whole, final=True)
    again, _ = model.stream(waveform[:, 7000:], restored, final=True)
    assert torch.equal(rest, again)
    expected, _ = model.encode(waveform)
    torch.testing.assert_close(torch.cat((head, rest), 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_several_streams_begin_from_one_saved_state():
    """The first of them ends a clip: the second must not find it ended."""
    model = encoder()
    waveform = torch.randn(2, 16000) * 0.1
    state = model.start_stream(2, allow_untrained=True)
    model.stream(waveform[:, :7000], state)
    saved = state.state_dict()
    model.stream(waveform[:, 7000:9000], StreamingState.from_state_dict(saved), torch.tensor([500, 2000]))
    rest, counts = model.stream(waveform[:, 7000:], StreamingState.from_state_dict(saved), final=True)
    expected, expected_counts = model.stream(waveform[:, 7000:], state, final=True)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(rest, expected)


def test_states_of_something_else():
    with pytest.raises(ValueError, match="expected the tensors of a StreamingState, got none named numbers, totals"):
        StreamingState.from_state_dict({"signal": torch.zeros(1, 0)})
    deep, shallow = encoder(), encoder(depth=1)
    state = deep.start_stream(1, allow_untrained=True)
    with pytest.raises(ValueError, match=f"this encoder's 1 blocks, got one of {deep.depth}"):
        shallow.stream(torch.zeros(1, 100), state)


@torch.no_grad()
def test_state_is_bounded_with_limited_left_context():
    model = encoder()
    state = model.start_stream(1, ChunkLayout(4, 6), allow_untrained=True)
    sizes = []
    for _ in range(40):  # 25 frames each, and 16 frames make a chunk: the pattern repeats after 16 pieces
        model.stream(torch.randn(1, 4000), state)
        sizes.append(sum(tensor.numel() for tensor in state.state_dict().values()))
    assert sizes[8:24] == sizes[24:40]
    assert state.blocks[0].attention.key.shape[2] == 8  # two whole chunks hold a left context of 6


@torch.no_grad()
@pytest.mark.parametrize("layout", [ChunkLayout(4, 8), ChunkLayout()], ids=["chunks", "whole"])
def test_long_clips_in_pieces_equal_one_pass(layout, monkeypatch):
    model = encoder()
    waveform, lengths = torch.randn(3, 30000) * 0.1, torch.tensor([30000, 9000, 300])
    expected, counts = model.encode(waveform, lengths, layout=layout)
    monkeypatch.setattr("bestrq2.models.conformer.PIECE_SECONDS", 0.2)
    features, again = model.encode(waveform, lengths, layout=layout)
    assert counts.tolist() == again.tolist()
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    inner, _ = model.encode(waveform, lengths, layer=0, layout=layout)
    monkeypatch.undo()
    torch.testing.assert_close(inner, model.encode(waveform, lengths, layer=0, layout=layout)[0], atol=1e-5, rtol=1e-5)


def test_inexact_settings_are_refused():
    with pytest.raises(ValueError, match="chunk_size None"):
        encoder().start_stream(1, ChunkLayout())
    with pytest.raises(ValueError, match="right_context 2"):
        encoder().start_stream(1, ChunkLayout(4, 4, 2))
    with pytest.raises(ValueError, match='conv_mode "full"'):
        encoder("full").start_stream(1)


def test_untrained_settings_are_refused_or_warned_about(recwarn):
    model = encoder()
    model.start_stream(1)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="outside of what this encoder was trained with"):
        model.start_stream(1, ChunkLayout(16, 8))
    model.chunk_sampler = SpeechBrainChunks()
    with pytest.warns(UserWarning, match="outside"):
        model.start_stream(1, ChunkLayout(4, 8))
    model.start_stream(1, ChunkLayout(8, 64))
    model.layout, model.chunk_sampler = ChunkLayout(), None
    with pytest.raises(ValueError, match="trained with full context only"):
        model.start_stream(1, ChunkLayout(8, 64))
    assert not recwarn.list


def test_the_streaming_recipe_can_stream(recwarn):
    model = build_encoder(load_config("streaming_conformer", ["model.encoder.depth=1"]).model).eval()
    state = model.start_stream(2)
    with torch.no_grad():
        features, _ = model.stream(torch.randn(2, 16000), state)
    assert features.shape == (2, 16, 256)
    assert not recwarn.list


def test_bad_calls():
    model = encoder()
    state = model.start_stream(2)
    with pytest.raises(ValueError, match=r"expected a floating waveform \(2, S\)"):
        model.stream(torch.zeros(1, 100), state)
    with pytest.raises(ValueError, match="expected 2 lengths"):
        model.stream(torch.zeros(2, 100), state, torch.tensor([101, 3]))
    with torch.no_grad():
        model.stream(torch.zeros(2, 1000), state, final=True)
    with pytest.raises(ValueError, match="all clips of this state have ended"):
        model.stream(torch.zeros(2, 100), state)
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train().stream(torch.zeros(2, 100), model.start_stream(2))


def test_a_clip_without_a_sample_is_refused_as_by_encode():
    model = encoder()
    with torch.no_grad():
        with pytest.raises(ValueError, match="the clip is empty: expected at least one sample"):
            model.encode(torch.zeros(1, 0))
        state = model.start_stream(2)
        for samples, lengths, final in ((0, None, True), (100, [100, 0], False)):
            with pytest.raises(ValueError, match="at least one sample of a clip before it ends, got none of clip"):
                model.stream(torch.zeros(2, samples), state, lengths and torch.tensor(lengths), final=final)
        assert model.stream(torch.zeros(2, 0), state)[1].tolist() == [0, 0]  # the state goes on
        model.stream(torch.zeros(2, 1), state)
        assert model.stream(torch.zeros(2, 0), state, final=True)[1].tolist() == [1, 1]


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_autograd_mode_between_pieces(first, second):
    """The state is made in one mode and used in another, through a ragged end, where it is written in place."""
    model, layout = encoder(), ChunkLayout(2, 4)
    waveform = torch.randn(2, 14000, generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([14000, 9500])
    with torch.no_grad():
        expected, counts = model.encode(waveform, lengths, layout=layout)
    with MODES[first]():
        state = model.start_stream(2, layout, allow_untrained=True)
    outputs, found = [], torch.zeros(2, dtype=torch.int64)
    for number, begin in enumerate(range(0, 14000, 3500)):
        piece = waveform[:, begin : begin + 3500]
        with MODES[(first, second)[number % 2]]():
            part, new = model.stream(piece, state, (lengths - begin).clamp(0, 3500), final=begin == 10500)
        assert part.requires_grad == ((first, second)[number % 2] == "grad")
        outputs.append(part.detach().clone())
        found += new
    assert torch.equal(found, counts)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=1e-4, rtol=1e-4)


def test_gradients_of_weights_and_waveform():
    model = encoder()
    state = model.start_stream(1, ChunkLayout(2, 4), allow_untrained=True)
    waveform = torch.randn(1, 6000)
    for _ in range(2):  # backward through one piece at a time: the state holds no graph
        features, _ = model.stream(waveform, state)
        features.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"no gradient of the waveform: use encode\(\)"):
        model.stream(waveform.requires_grad_(), state)
    with torch.no_grad():
        model.stream(waveform, state)


def test_a_call_that_failed_midway(monkeypatch):
    model = encoder()
    state = model.start_stream(1, ChunkLayout(2, 4), allow_untrained=True)
    waveform = torch.randn(1, 6000)
    with pytest.raises(ValueError, match="waveform"):  # refused before anything is taken in
        model.stream(waveform[0], state)
    model.stream(waveform, state)
    with monkeypatch.context() as patch:
        patch.setattr(model.encoder, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.stream(waveform, state)
    with pytest.raises(ValueError, match="failed midway"):
        model.stream(waveform, state)
    for leave in (state.state_dict, lambda: state.to("cpu")):  # a copy lacks a part, too
        with pytest.raises(ValueError, match="failed midway"):
            leave()
