"""The window rule equals the masks of the toolkits it replaces, each restated in its own way of thinking."""

import sys

import pytest
import torch

from bestrq2 import ops
from bestrq2.ops import ChunkLayout

LENGTHS = (1, 2, 3, 5, 8, 17, 18, 31, 39, 64, 65)
CHUNKS = (1, 2, 3, 4, 5, 7, 8, 16, 25, 32, 200)
LEFT_CHUNKS = (None, 0, 1, 2, 3, 5)


def speechbrain_mask(frames: int, chunk: int, left_chunks: int | None) -> torch.Tensor:
    """Hide everything beyond the end of the own chunk, then what lies too many chunks back."""
    hidden = torch.zeros(frames, frames, dtype=torch.bool)
    for frame in range(frames):
        chunk_number = frame // chunk
        hidden[frame, (chunk_number + 1) * chunk :] = True
        if left_chunks is not None and chunk_number - left_chunks > 0:
            hidden[frame, : (chunk_number - left_chunks) * chunk] = True
    return ~hidden


def wenet_mask(frames: int, chunk: int, left_chunks: int | None) -> torch.Tensor:
    """Open one slice [start, end) per frame; a negative number of left chunks keeps start at 0."""
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    left = -1 if left_chunks is None else left_chunks
    for frame in range(frames):
        start = 0 if left < 0 else max(0, frame // chunk - left) * chunk
        end = min(frames, (frame // chunk + 1) * chunk)
        mask[frame, start:end] = True
    return mask


def nemo_chunked_limited_mask(frames: int, left: int, right: int) -> torch.Tensor:
    """Compare chunk numbers of query and key: the difference is at least 0 and at most left / (right + 1)."""
    number = torch.div(torch.arange(frames), right + 1, rounding_mode="trunc")
    difference = number[:, None] - number[None, :]
    most = 10**9 if left < 0 else left // (right + 1)
    return (difference >= 0) & (difference <= most)


def icefall_zipformer_mask(frames: int, chunk: int, left_chunks: int) -> torch.Tensor:
    """Hide a key whose chunk lies after the query's, or (with a limit) before the query's minus the left chunks."""
    number = torch.arange(frames) // chunk
    query_chunk, key_chunk = number.unsqueeze(1), number.unsqueeze(0)
    hidden = key_chunk > query_chunk
    if left_chunks >= 0:
        hidden = hidden | (key_chunk < query_chunk - left_chunks)
    return hidden.logical_not()


@pytest.mark.parametrize("left_chunks", LEFT_CHUNKS)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_every_toolkit(chunk: int, left_chunks: int | None):
    unlimited = left_chunks is None
    for frames in LENGTHS:
        expected = speechbrain_mask(frames, chunk, left_chunks)
        masks = {
            "speechbrain": ChunkLayout.from_speechbrain(chunk, left_chunks).mask(frames),
            "wenet": ChunkLayout.from_wenet(chunk, -1 if unlimited else left_chunks).mask(frames),
            "wenet restated": wenet_mask(frames, chunk, left_chunks),
        }
        left_frames = -1 if unlimited else left_chunks * chunk
        masks["nemo"] = ChunkLayout.from_nemo((left_frames, chunk - 1), "chunked_limited").mask(frames)
        masks["nemo restated"] = nemo_chunked_limited_mask(frames, left_frames, chunk - 1)
        if left_chunks != 0:  # Zipformer always keeps at least one left chunk
            masks["icefall"] = ChunkLayout.from_icefall(chunk, left_frames).mask(frames)
            masks["icefall at half rate"] = ChunkLayout.from_icefall(2 * chunk, 2 * left_frames, 2).mask(frames)
            masks["icefall restated"] = icefall_zipformer_mask(frames, chunk, -1 if unlimited else left_chunks)
        for name, mask in masks.items():
            assert torch.equal(mask, expected), f"{name} at T={frames}"


def test_speechbrain_18_frames():
    """Chunk 4 with 3 left chunks over 18 frames, written out: first and last visible key of each frame."""
    first = [0] * 16 + [4] * 2
    last = [3] * 4 + [7] * 4 + [11] * 4 + [15] * 4 + [17] * 2
    mask = ChunkLayout.from_speechbrain(4, 3).mask(18)
    for frame in range(18):
        assert mask[frame].nonzero().flatten().tolist() == list(range(first[frame], last[frame] + 1))


def test_picture_of_the_docstring():
    rows = ["xxxx>>    "] * 4 + [" <<<xxxx>>"] * 4 + ["     <<<xx"] * 2
    drawn = torch.tensor([[symbol != " " for symbol in row] for row in rows])
    assert torch.equal(ChunkLayout(4, 3, 2).mask(10), drawn)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (2, 4), (-1, 2), (3, -1), (-1, -1)])
def test_nemo_regular_is_a_band(left: int, right: int):
    mask = ChunkLayout.from_nemo((left, right)).mask(20)
    for i in range(20):
        for j in range(20):
            assert mask[i, j] == ((left < 0 or i - j <= left) and (right < 0 or j - i <= right))


def test_streaming_rows_are_the_rows_of_the_whole_mask():
    layout = ChunkLayout(5, 7, 2)
    whole = layout.mask(33)
    assert torch.equal(layout.mask(9, 33, query_offset=13), whole[13:22])


@pytest.mark.parametrize("layout", [ChunkLayout(), ChunkLayout(1, 3, 2), ChunkLayout(7, 4, 0), ChunkLayout(4, None, 3)])
def test_offsets_bound_every_visible_pair(layout: ChunkLayout):
    for frames, keys, start in ((20, 20, 0), (3, 20, 17), (20, 6, 0), (6, 40, 11), (1, 1, 0)):
        query, key = layout.mask(frames, keys, query_offset=start).nonzero(as_tuple=True)
        lowest, highest = layout.offsets(frames, keys, query_offset=start)
        offset = query + start - key
        if offset.numel():
            assert lowest <= offset.min()
            assert offset.max() <= highest


def test_full_context_settings():
    assert ChunkLayout.from_wenet(-1) == ChunkLayout.from_icefall(-1) == ChunkLayout()
    assert ChunkLayout().mask(5).all()
    assert ChunkLayout(3, 4, 1).window == {"chunk_size": 3, "left_context": 4, "right_context": 1}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ChunkLayout(0), "chunk_size must be at least 1"),
        (lambda: ChunkLayout(4, -1), "left_context must be at least 0"),
        (lambda: ChunkLayout(4, 0, -2), "right_context must be at least 0"),
        (lambda: ChunkLayout.from_nemo((10, 3), "chunked_limited"), "multiple of right"),
        (lambda: ChunkLayout.from_nemo((10, 3), "banded"), "style must be"),
        (
            lambda: ChunkLayout.from_nemo((10, 3, 1)),
            r"att_context_size must be one pair \[left, right\], got \(10, 3, 1\)",
        ),
        (lambda: ChunkLayout.from_nemo(10), "att_context_size must be one pair"),
        (lambda: ChunkLayout.from_nemo((10, -3)), r"att_context_size\[1\] must be at least -1, got -3"),
        (
            lambda: ChunkLayout.from_icefall(16, 64, 3),
            "chunk_size must be -1 .* or a multiple of downsampling = 3, got 16",
        ),
        (lambda: ChunkLayout.from_icefall(0, 64), "chunk_size must be -1 .* or a multiple of downsampling = 1, got 0"),
        (lambda: ChunkLayout.from_icefall(16, 64, 0), "downsampling must be at least 1, got 0"),
        (lambda: ChunkLayout.from_speechbrain(4, -1), "left_context_size must be at least 0 .*unlimited.*, got -1"),
        (lambda: ChunkLayout.from_speechbrain(0, 3), "from_speechbrain: chunk_size must be at least 1, got 0"),
    ],
)
def test_rejects_impossible_settings(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: ChunkLayout.from_speechbrain(4.0, 2), "chunk_size"),
        (lambda: ChunkLayout.from_speechbrain(4, 2.5), "left_context_size"),
        (lambda: ChunkLayout.from_wenet(4.0), "chunk_size"),
        (lambda: ChunkLayout.from_wenet(4, None), "num_left_chunks"),
        (lambda: ChunkLayout.from_nemo(([70, 13], [70, 6])), r"att_context_size\[0\]"),
        (lambda: ChunkLayout.from_icefall(True), "chunk_size"),
        (lambda: ChunkLayout.from_icefall(16, "64"), "left_context_frames"),
        (lambda: ChunkLayout.from_icefall(16, 64, 2.0), "downsampling"),
        (lambda: ChunkLayout(4).mask(10, query_offset=1.0), "query_offset"),
        (lambda: ChunkLayout(4).mask(10.0), "query_length"),
        (lambda: ChunkLayout(4).mask(10, 12.0), "key_length"),
        (lambda: ChunkLayout(4).offsets(10, 10.0), "key_length"),
    ],
)
def test_what_is_no_integer_is_named(build, name: str):
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        build()


def test_sizes_that_stand_for_everything():
    """sys.maxsize as other libraries take it: sums of such sizes must not turn negative."""
    for layout in (ChunkLayout(sys.maxsize, 0, 5), ChunkLayout(4, sys.maxsize, sys.maxsize)):
        assert layout.mask(20).all()
        query, key, value = torch.randn(3, 1, 1, 20, 4)
        out = ops.chunked_attention(query, key, value, **layout.window, backend="reference")
        torch.testing.assert_close(out, ops.chunked_attention(query, key, value))
    with pytest.raises(ValueError, match=r"chunk_size must be less than 2\^63, got 9223372036854775808"):
        ChunkLayout(2**63)
