"""Sin-cos and rotary positions."""

import math

import pytest
import torch

from bestrq2.layers.positions import published_short_clip_positions, rotary_angles, rotate, sincos_2d


def test_sincos_layout():
    table = sincos_2d(torch.tensor([[3, 5]]), 16)[0]
    for band in range(4):
        rate = 10000 ** (-band / 4)
        expected = [math.sin(3 * rate), math.sin(5 * rate), math.cos(3 * rate), math.cos(5 * rate)]
        assert table[band::4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_rotary_scores_depend_on_distance_only(rows):
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)

    def score(a, b):
        angles = [rotary_angles(torch.tensor([[p]]), 16, rows) for p in (a, b)]
        return (rotate(q, angles[0]) * rotate(k, angles[1])).sum(-1)

    torch.testing.assert_close(score([0, 3], [0, 8]), score([0, 103], [0, 108]), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score([0, 3], [0, 8]), score([0, 3], [0, 9]), atol=1e-3)
    moved = score([1, 3], [0, 8]) - score([0, 3], [0, 8])
    assert (moved.abs().max() > 1e-3) == (rows > 1)  # strips have no frequency axis


def test_published_fault():
    columns = 2  # a clip of 2 columns, 8 rows: token f * 2 + t is given row f * 2 + t of the 8 x 16 table
    positions = torch.tensor([[f, t] for t in range(columns) for f in range(8)])
    wrong = published_short_clip_positions(positions, columns)
    changed = (wrong != positions).any(1).sum()
    assert int(changed) == 14  # all but f = 0
    full = torch.tensor([[f, t] for t in range(16) for f in range(8)])
    assert torch.equal(published_short_clip_positions(full, 16), full)
    with pytest.raises(ValueError, match="16 time columns, got 17"):
        published_short_clip_positions(full, 17)


@pytest.mark.parametrize(("columns", "expected"), [(1, 7), (3, 21), (4, 28), (8, 56), (16, 0)])
def test_published_fault_counts(columns, expected):
    # Wrong tokens of clips of 1, 2, 3, 5 and 10 s as computed from the published code's description.
    positions = torch.tensor([[f, t] for t in range(columns) for f in range(8)])
    wrong = published_short_clip_positions(positions, columns)
    assert int((wrong != positions).any(1).sum()) == expected
