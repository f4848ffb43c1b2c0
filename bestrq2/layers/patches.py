"""Log-mel frames cut into patches: the tokens of the encoder and the input of the quantizer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .pytrees import tree_of_tensors


@tree_of_tensors("rows")
@dataclass(frozen=True)
class Patches:
    """The patches of a padded batch. Token ``t * rows + f`` covers frequency row f, time column t, so that the valid
    tokens of every clip come first (published checkpoints order tokens frequency-major; attention does not care).

    Attributes:
        values: ``(B, N, P)`` float32; P runs over bands, then frames, of the patch.
        lengths: ``(B,)`` int64 on the CPU: valid tokens of each clip.
        rows: number of frequency rows; N = rows * columns.
        frames: ``(B, columns * width, F)`` the frames that were cut, for encoders that read frames; else None.
    """

    values: Tensor
    lengths: Tensor
    rows: int
    frames: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.values.shape[1] // self.rows

    def replaced(self, values: Tensor) -> "Patches":
        """Other ``values (B, N, P)`` at the same places; the frames, where they are kept, are those of the values."""
        frames = self.frames
        if frames is not None:
            frames = values.unflatten(2, (frames.shape[2], -1)).transpose(2, 3).flatten(1, 2)
        return Patches(values, self.lengths, self.rows, frames)

    def dispersion(self) -> Tensor:
        """Mean absolute deviation of the values of each patch from their mean: ``(B, N)`` float32."""
        return (self.values - self.values.mean(-1, keepdim=True)).abs().mean(-1)

    def positions(self) -> Tensor:
        """Grid position of every token: ``(N, 2)`` int64, (frequency row, time column)."""
        token = torch.arange(self.values.shape[1], device=self.values.device)
        return torch.stack((token % self.rows, token // self.rows), dim=-1)


def extract_patches(
    frames: Tensor, frame_lengths: Tensor, height: int, width: int, *, keep_frames: bool = False
) -> Patches:
    """Cut ``(B, T, F)`` frames into non-overlapping patches of ``height`` bands x ``width`` frames.

    Bands and frames that do not fill a patch are dropped, as in the published "truncate" mode: band ``F % height`` from
    the top, frames from each clip's own end. ``keep_frames`` hands on the frames, too.

    Raises:
        ValueError: if the spectrogram has fewer bands or frames than one patch.
    """
    num_clips, num_frames, num_bands = frames.shape
    rows, columns = num_bands // height, num_frames // width
    if rows == 0 or columns == 0:
        raise ValueError(
            f"expected at least one patch of {height} bands x {width} frames, "
            f"got {num_bands} bands x {num_frames} frames"
        )
    grid = frames[:, : columns * width, : rows * height].reshape(num_clips, columns, width, rows, height)
    values = grid.permute(0, 1, 3, 4, 2).reshape(num_clips, columns * rows, height * width)
    return Patches(values, (frame_lengths // width) * rows, rows, frames[:, : columns * width] if keep_frames else None)
