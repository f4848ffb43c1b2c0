"""The frozen random-projection quantizer that makes the targets (BEST-RQ, Chiu et al. 2022)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bestrq2 import ops
from bestrq2.ops._impl.arguments import integer

CACHED_VALUES = 1 << 17  # values that are standardised together on a CPU: 1 MB of float64

Normalize = Literal["none", "global", "patch", "utterance"]


class RandomProjectionQuantizer(nn.Module):
    """Nearest code of a randomly projected patch: ``argmax_v cos(norm(x) P, c_v)``, for one or several codebooks.

    P is Xavier-uniform, the codes are normally distributed and scaled to unit length. Both are persistent buffers,
    drawn on the CPU in fp32 from the quantizer's own seed: every rank, device and resumed run has the same ones, no
    optimizer ever sees them, and no other random state is touched.

    Args:
        patch_dim: D, values per patch.
        codebook_size: V, codes per codebook. Published: 8192.
        codebook_dim: d, width of a code. Published: 16.
        num_codebooks: G independent pairs of projection and codebook.
        normalize: what happens to a patch before P. On raw dB patches the common level dominates the projection and few
            codes are used; see ``CodeUsage``.
            "none": nothing (published). "global": ``(x - mean) / std`` with the statistics given.
            "patch": layer norm of each patch. "utterance": mean and deviation of all valid values of the clip.
        seed: of projection and codebook.
        mean, std: statistics for "global".

    Shapes:
        patches ``(B, N, D)``, lengths ``(B,)`` valid patches, rows ``(B, M)`` int64 indices into N (None: all)
        -> codes ``(B, M, G)`` int64. Codes of a clip do not depend on its batch: bit for bit.

    Raises:
        TypeError: for sizes that are no integers.
        ValueError: for non-positive sizes or an unknown ``normalize``.
    """

    projection: Tensor
    codebook: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        patch_dim: int,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        num_codebooks: int = 1,
        normalize: Normalize = "none",
        seed: int = 0,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        patch_dim, codebook_size = integer("patch_dim", patch_dim, 1), integer("codebook_size", codebook_size, 1)
        codebook_dim, num_codebooks = (
            integer("codebook_dim", codebook_dim, 1),
            integer("num_codebooks", num_codebooks, 1),
        )
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize must be one of {', '.join(get_args(Normalize))}; got {normalize!r}")
        if std <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.normalize = normalize
        generator = torch.Generator("cpu").manual_seed(seed)
        bound = math.sqrt(6.0 / (patch_dim + codebook_dim))
        shape = (num_codebooks, patch_dim, codebook_dim)
        projection = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
        codebook = torch.empty(num_codebooks, codebook_size, codebook_dim, device="cpu").normal_(generator=generator)
        unit = nn.functional.normalize(codebook.double(), dim=-1).float()
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", unit)
        self.register_buffer("mean", torch.tensor(float(mean), device="cpu"))
        self.register_buffer("std", torch.tensor(float(std), device="cpu"))

    @property
    def codebook_size(self) -> int:
        return self.codebook.shape[1]

    @property
    def num_codebooks(self) -> int:
        return self.codebook.shape[0]

    def _apply(self, fn, recurse=True):
        # model.half() must not change targets: the buffers move between devices but keep fp32.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def forward(self, patches: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        if self.normalize == "utterance":
            patches = self._standardise_clips(patches, lengths)
        if rows is not None:
            patches = patches.gather(1, rows[..., None].expand(-1, -1, patches.shape[-1]))
        if self.normalize == "global":
            patches = (patches.float() - self.mean) / self.std
        inside_op: Literal["none", "layer_norm"] = "layer_norm" if self.normalize == "patch" else "none"
        return ops.quantize(patches, self.projection, self.codebook, normalize=inside_op)

    @staticmethod
    def _standardise_clips(patches: Tensor, lengths: Tensor | None) -> Tensor:
        # float64 sums: the result, rounded to float32, does not depend on how much padding the sum runs over.
        num_clips, num_patches, dim = patches.shape
        if lengths is None:
            lengths = torch.full((num_clips,), num_patches)
        lengths = lengths.to(patches.device, non_blocking=True)
        inside = torch.arange(num_patches, device=patches.device) < lengths[:, None]
        counts = (lengths * dim).clamp(min=1).double()[:, None, None]
        out = torch.empty(patches.shape, dtype=torch.float32, device=patches.device)
        # On a CPU a few clips at a time: their float64 values stay in the cache.
        group = (
            max(1, CACHED_VALUES // max(1, num_patches * dim)) if patches.device.type == "cpu" else max(1, num_clips)
        )
        for clips in (slice(start, start + group) for start in range(0, num_clips, group)):
            values, valid, count = patches[clips].double(), inside[clips, :, None], counts[clips]
            values -= (values * valid).sum((1, 2), keepdim=True) / count
            variance = (values.square() * valid).sum((1, 2), keepdim=True) / count
            # Patches of digital silence have no spread: they become zero rows, whose code is 0.
            out[clips] = values.div_((variance + 1e-10).sqrt_())
        return out

    def extra_repr(self) -> str:
        books, dim, width = self.projection.shape
        return f"{dim} -> {width}, {books} x {self.codebook_size} codes, normalize={self.normalize}"
