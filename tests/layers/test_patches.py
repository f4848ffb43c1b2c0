"""Patches: order of tokens and values, validity, positions."""

import pytest
import torch

from bestrq2.layers.patches import extract_patches


def test_order_and_values():
    frames = torch.arange(2 * 7 * 9).reshape(2, 7, 9).float()  # 7 frames of 9 bands, patches of 4 bands x 3 frames
    patches = extract_patches(frames, torch.tensor([7, 5]), height=4, width=3)
    assert patches.values.shape == (2, 4, 12)
    assert (patches.rows, patches.columns) == (2, 2)
    assert patches.lengths.tolist() == [4, 2]
    for token, (row, column) in enumerate(patches.positions().tolist()):
        block = frames[1, 3 * column : 3 * column + 3, 4 * row : 4 * row + 4]
        assert torch.equal(patches.values[1, token], block.T.reshape(-1))  # bands first, then frames
    assert patches.positions().tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


def test_rejects_less_than_a_patch():
    with pytest.raises(ValueError, match=r"16 bands x 16 frames, got 128 bands x 15 frames"):
        extract_patches(torch.zeros(1, 15, 128), torch.tensor([15]), 16, 16)
