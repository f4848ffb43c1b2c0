"""Random chunks: distributions of SpeechBrain's and WeNet's samplers, and that they are functions of the step."""

import pytest

from bestrq2.layers.chunk_sampling import SpeechBrainChunks, WeNetChunks
from bestrq2.ops import ChunkLayout

STEPS = range(4000)


def test_speechbrain_distribution():
    drawn = [SpeechBrainChunks(seed=3).layout(step, 500) for step in STEPS]
    chunked = [layout for layout in drawn if layout.chunk_size is not None]
    assert len(chunked) / len(drawn) == pytest.approx(0.6, abs=0.03)
    assert {layout.chunk_size for layout in chunked} == set(range(8, 33))
    limited = [layout for layout in chunked if layout.left_context is not None]
    assert len(limited) / len(chunked) == pytest.approx(0.75, abs=0.03)
    assert {layout.left_context // layout.chunk_size for layout in limited} == set(range(2, 33))
    assert all(layout.left_context % layout.chunk_size == 0 for layout in limited)
    assert all(layout == ChunkLayout() for layout in drawn if layout.chunk_size is None)


def test_wenet_distribution():
    drawn = [WeNetChunks(seed=3).layout(step, 375) for step in STEPS]
    assert sum(layout == ChunkLayout() for layout in drawn) / len(drawn) == pytest.approx(0.5, abs=0.03)
    chunked = [layout for layout in drawn if layout.chunk_size is not None]
    assert {layout.chunk_size for layout in chunked} == set(range(1, 26))
    assert all(layout.left_context is None for layout in chunked)
    limited = [WeNetChunks(dynamic_left=True).layout(step, 40) for step in STEPS]
    chunks = {(layout.chunk_size, layout.left_context) for layout in limited if layout.chunk_size}
    assert {left // size for size, left in chunks if size == 4} == set(range(39 // 4 + 1))
    for frames in (1, 2, 3):
        WeNetChunks(dynamic_left=True).layout(0, frames)


@pytest.mark.parametrize("sampler", [SpeechBrainChunks(seed=5), WeNetChunks(seed=5, dynamic_left=True)])
def test_a_step_always_draws_the_same(sampler):
    first = [sampler.layout(step, 100) for step in range(50)]
    assert first == [type(sampler)(**vars(sampler)).layout(step, 100) for step in range(50)]
    other = type(sampler)(**{**vars(sampler), "seed": 6})
    assert first != [other.layout(step, 100) for step in range(50)]
    assert all(sampler.covers(layout) for layout in first)


def test_forced_settings():
    sampler = SpeechBrainChunks(1.0, (16, 16), 1.0, (4, 4))
    assert {sampler.layout(step, 9) for step in range(20)} == {ChunkLayout(16, 64)}
    assert {SpeechBrainChunks(0.0).layout(step, 9) for step in range(20)} == {ChunkLayout()}


def test_what_training_covers():
    sampler = SpeechBrainChunks()
    for drawn in (ChunkLayout(8, 64), ChunkLayout(8), ChunkLayout()):
        assert sampler.covers(drawn)
    for other in (ChunkLayout(4, 64), ChunkLayout(8, 8), ChunkLayout(8, 64, 1), ChunkLayout(33), ChunkLayout(None, 4)):
        assert not sampler.covers(other)
    assert not SpeechBrainChunks(1.0).covers(ChunkLayout())
    assert WeNetChunks().covers(ChunkLayout(25))
    assert not WeNetChunks().covers(ChunkLayout(26))
    assert not WeNetChunks().covers(ChunkLayout(5, 5))
    assert WeNetChunks(dynamic_left=True).covers(ChunkLayout(5, 5))


@pytest.mark.parametrize("bad", [{"probability": 1.5}, {"chunk_size": (8, 4)}, {"left_chunks": (-1, 3)}])
def test_impossible_samplers(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpeechBrainChunks(**bad)
