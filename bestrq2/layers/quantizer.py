"""The frozen random-projection quantizer that makes the targets (BEST-RQ, Chiu et al. 2022)."""

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bestrq2 import ops
from bestrq2.errors import BestRQWarning
from bestrq2.ops.common.arguments import integer
from bestrq2.ops.common.devices import exact_device

from .padding import length_mask
from .precision import default_device, restore_float32
from .target_fitting import fit_axes, move_to_centroids

CACHED_VALUES = 1 << 17  # values that are standardised together on a CPU: 1 MB of float64

Normalize = Literal["none", "global", "patch", "utterance"]
Projection = Literal["random", "pca", "whitened_pca"]


def draw_targets(seed: int, books: int, patch_dim: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Random projections ``(G, D, d)`` and codes of unit length ``(G, V, d)``, float32 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    bound = math.sqrt(6.0 / (patch_dim + width))
    drawn = torch.empty(books, patch_dim, width, device="cpu", dtype=torch.float32)
    drawn.uniform_(-bound, bound, generator=generator)
    codebook = torch.empty(books, size, width, device="cpu", dtype=torch.float32).normal_(generator=generator)
    return drawn, nn.functional.normalize(codebook.double(), dim=-1).float()


class RandomProjectionQuantizer(nn.Module):
    """Nearest code of a randomly projected patch: ``argmax_v cos(norm(x) P, c_v)``, for one or several codebooks.

    By default nothing is learned. P is Xavier-uniform, the codes are normally distributed and scaled to unit length.
    Both are persistent buffers, drawn on the CPU in fp32 from the quantizer's own seed: every rank, device and resumed
    run has the same ones, no optimizer ever sees them, and no other random state is touched.

    P and the codes may instead be fitted to a sample of patches, once and before training: :meth:`fit`. They are frozen
    and stored like random ones. Until then the codes are random ones, with a warning at the first use.

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
        projection: "random"; "pca": the principal axes of the sample, after subtracting its mean; "whitened_pca": the
            same with every axis scaled to unit deviation, so that the strongest does not decide alone. Several
            codebooks share the strongest ``num_codebooks * codebook_dim`` axes: a random rotation mixes them, and each
            codebook takes its share.
        plain_codebooks: of "whitened_pca": so many codebooks, the first ones, take the axes at their own scale.
        centroid_steps: steps of spherical k-means that move the codes to the middle of what falls on them; 0: none.

    Shapes:
        patches ``(B, N, D)``, lengths ``(B,)`` valid patches, rows ``(B, M)`` int64 indices into N (None: all)
        -> codes ``(B, M, G)`` int64. Codes of a clip do not depend on its batch: bit for bit.

    Raises:
        TypeError: for sizes that are no integers.
        ValueError: for non-positive sizes, an unknown ``normalize``, or a seed of more than 64 bits.
    """

    projection: Tensor
    codebook: Tensor
    mean: Tensor
    std: Tensor
    center: Tensor | None

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
        projection: Projection = "random",
        centroid_steps: int = 0,
        plain_codebooks: int = 0,
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
        if projection not in get_args(Projection):
            raise ValueError(f"projection must be one of {', '.join(get_args(Projection))}; got {projection!r}")
        if projection != "random" and num_codebooks * codebook_dim > patch_dim:
            raise ValueError(
                f"projection={projection}: expected num_codebooks * codebook_dim of at most patch_dim = {patch_dim} "
                f"axes, got {num_codebooks} * {codebook_dim}"
            )
        plain_codebooks = integer("plain_codebooks", plain_codebooks, 0)
        most = num_codebooks - 1 if projection == "whitened_pca" else 0
        if plain_codebooks > most:
            raise ValueError(
                f"plain_codebooks: expected at most {most} with projection={projection} and num_codebooks="
                f"{num_codebooks}, got {plain_codebooks}"
            )
        self.plain_codebooks = plain_codebooks
        self.normalize, self.projection_kind, self.seed = normalize, projection, seed
        self.centroid_steps = integer("centroid_steps", centroid_steps, 0)
        if not -(2**63) <= seed <= 2**64 - num_codebooks:  # what a generator takes, also for the last codebook
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
        drawn, unit = draw_targets(seed, num_codebooks, patch_dim, codebook_dim, codebook_size)
        self._fit_checked = not self.needs_fit
        device = default_device()
        self.register_buffer("projection", drawn.to(device))
        self.register_buffer("codebook", unit.to(device))
        self.register_buffer("mean", torch.tensor(float(mean), device="cpu", dtype=torch.float32).to(device))
        self.register_buffer("std", torch.tensor(float(std), device="cpu", dtype=torch.float32).to(device))
        # Only there if it is used, so that checkpoints of random projections stay what they were.
        self.register_buffer(
            "center", None if projection == "random" else torch.zeros(patch_dim, device=device, dtype=torch.float32)
        )

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
        restore_float32(self, kept)
        return self

    @property
    def patch_dim(self) -> int:
        return self.projection.shape[1]

    @property
    def needs_fit(self) -> bool:
        """True if :meth:`fit` has to be called before training."""
        return self.projection_kind != "random" or self.centroid_steps > 0

    def accept_random(self) -> None:
        """Give no warning where a fit is asked for and has not happened, as to measure the speed."""
        self._fit_checked = True

    def _check_fit(self) -> None:
        """Warn once of targets that were to be fitted and are still as they were drawn."""
        if self._fit_checked or torch.compiler.is_compiling() or self.projection.is_meta:
            return
        self._fit_checked = True
        books, patch_dim, width = self.projection.shape
        drawn = draw_targets(self.seed, books, patch_dim, width, self.codebook_size)
        if all(torch.equal(now.cpu(), then) for now, then in zip((self.projection, self.codebook), drawn)):
            warnings.warn(
                f"the targets are random: projection={self.projection_kind!r} and centroid_steps={self.centroid_steps} "
                "take effect in fit(sample) alone, which has not been called; sample: normalise(patches, lengths) of "
                "some hundred clips, without padding",
                category=BestRQWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def normalise(self, patches: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Patches ``(B, N, D)`` as the projection takes them, before the mean of the sample is subtracted: float32."""
        if self.normalize == "utterance":
            return self._standardise_clips(patches, lengths)
        if self.normalize == "global":
            return (patches.float() - self.mean) / self.std
        if self.normalize == "patch":
            return nn.functional.layer_norm(patches.float(), patches.shape[-1:])
        return patches.float()

    @torch.no_grad()
    def fit(self, sample: Tensor) -> None:
        """Fit what the arguments ask for; without any, do nothing.

        The result depends on the seed and the sample alone, up to rounding.

        Args:
            sample: ``(S, D)`` float32 patches from :meth:`normalise`, without padding.

        Raises:
            ValueError: for a wrong width, fewer patches than axes or than two per code, or a sample that varies in
                fewer directions than there are axes.
        """
        if sample.dim() != 2 or sample.shape[1] != self.patch_dim:
            raise ValueError(f"expected a sample (S, {self.patch_dim}), got {tuple(sample.shape)}")
        books, _, width = self.projection.shape
        device, sample = self.projection.device, sample.cpu()
        self._fit_checked = True
        if self.center is not None:
            whitened = books - self.plain_codebooks if self.projection_kind == "whitened_pca" else 0
            seed = self.seed if books > 1 else None
            center, axes = fit_axes(sample, books * width, whitened * width, seed)
            self.center.copy_(center)
            self.projection.copy_(axes.unflatten(1, (books, width)).transpose(0, 1))
        if not self.centroid_steps:
            return
        if len(sample) < 2 * self.codebook_size:
            raise ValueError(
                f"centroids of {self.codebook_size} codes need a sample of at least {2 * self.codebook_size} patches, "
                f"got {len(sample)}"
            )
        if self.center is not None:
            sample = sample - self.center.cpu()
        for book, projection in enumerate(self.projection.cpu()):
            codes = self.codebook[book].cpu()
            fitted = move_to_centroids(sample @ projection, codes, self.centroid_steps, self.seed + book)
            self.codebook[book].copy_(fitted.to(device))

    @torch.no_grad()
    def forward(self, patches: Tensor, lengths: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        self._check_fit()
        if self.normalize == "utterance":
            patches = self._standardise_clips(patches, lengths)
        if rows is not None:
            patches = patches.gather(1, rows[..., None].expand(-1, -1, patches.shape[-1]))
        if self.center is not None:
            # The mean is subtracted after the normalisation, which therefore cannot happen inside of the operation.
            return self.codes_of_normalised(patches if self.normalize == "utterance" else self.normalise(patches))
        if self.normalize == "global":
            patches = (patches.float() - self.mean) / self.std
        inside_op: Literal["none", "layer_norm"] = "layer_norm" if self.normalize == "patch" else "none"
        return ops.quantize(patches, self.projection, self.codebook, normalize=inside_op)

    @torch.no_grad()
    def codes_of_normalised(self, values: Tensor) -> Tensor:
        """Codes ``(..., G)`` of patches from :meth:`normalise`, ``(..., D)``."""
        self._check_fit()
        centred = values if self.center is None else values - self.center
        return ops.quantize(centred, self.projection, self.codebook)

    @staticmethod
    def _standardise_clips(patches: Tensor, lengths: Tensor | None) -> Tensor:
        # float64 sums: the result, rounded to float32, does not depend on how much padding the sum runs over.
        num_clips, num_patches, dim = patches.shape
        device = patches.device
        patches = patches.to(exact_device(device))
        if lengths is None:
            lengths = torch.full((num_clips,), num_patches, device="cpu")
        lengths = lengths.to(patches.device, non_blocking=True)
        inside = length_mask(lengths, num_patches, patches.device)
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
        return out.to(device)

    def extra_repr(self) -> str:
        books, dim, width = self.projection.shape
        plain = f" ({self.plain_codebooks} plain)" if self.plain_codebooks else ""
        fitted = f", {self.projection_kind}{plain} projection, {self.centroid_steps} centroid steps"
        fitted = fitted if self.needs_fit else ""
        return f"{dim} -> {width}, {books} x {self.codebook_size} codes, normalize={self.normalize}{fitted}"
