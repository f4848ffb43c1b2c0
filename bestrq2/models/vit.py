"""The ViT encoder of BEST-RQ-2: patches of a log-mel spectrogram, a linear embedding, fixed positions, Transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestrq2.layers.block_rows import linear
from bestrq2.layers.log_mel import LogMel, check_lengths
from bestrq2.layers.masking import MaskPlan, take
from bestrq2.layers.padding import length_mask
from bestrq2.layers.patches import Patches, extract_patches
from bestrq2.layers.positions import (
    PositionKind,
    check_positions,
    published_short_clip_positions,
    rotary_angles,
    sincos_2d,
)
from bestrq2.layers.precision import like_weight
from bestrq2.layers.transformer import Transformer, TransformerSettings

from .layer_choice import Layer, block_list, check_layers, choose_layers
from .readout import ROW_JOINS, ReadoutMixin, RowJoin, check_choice

WINDOWS_AT_ONCE = 16  # windows of long clips that encode() puts through the Transformer together


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches: the published 16 x 16 convolution with stride 16, written as a product."""

    def __init__(self, patch_dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_dim, width)

    def forward(self, patches: Tensor) -> Tensor:
        return linear(self.proj, like_weight(patches, self.proj))


class ViTEncoder(ReadoutMixin, nn.Module):
    """Waveform to features, and the context encoder of pretraining.

    Args:
        front_end: log-mel transform.
        patch_height, patch_width: bands and frames per patch; 16 x 16 (2.0) or strips of num_mels x 4 (2.1).
        transformer: shape of the Transformer.
        position: "sincos" (fixed 2-D vectors added to the embedding) or "rope" (rotary).
        window_seconds: longest clip processed in one piece by :meth:`encode`; longer ones are cut into windows. Use the
            clip length of pretraining.
        published_positions: reproduce a fault of the published inference code: clips shorter than 16 time columns get
            wrong sin-cos positions. Only for comparing with numbers made by that code.
        activation_checkpointing: recompute activations in the backward pass.
        join_rows: what :meth:`encode` does with the patches of a time step, if it is not told: "average" (published) or
            "concatenate".

    Attributes:
        sampling_rate (Hz), output_dim (D), hop_size_in_ms: of the features of :meth:`encode`.
        token_width: width of a patch in the Transformer; D, or D / rows where features concatenate rows.

    Raises:
        ValueError: for a patch larger than the spectrogram, an unknown ``position`` or ``join_rows``, or a width that
            the positions cannot take.
    """

    def __init__(
        self,
        front_end: LogMel,
        patch_height: int = 16,
        patch_width: int = 16,
        transformer: TransformerSettings | None = None,
        position: PositionKind = "sincos",
        window_seconds: float = 10.0,
        published_positions: bool = False,
        activation_checkpointing: bool = False,
        join_rows: RowJoin = "average",
    ) -> None:
        super().__init__()
        settings = transformer or TransformerSettings()
        check_choice("join_rows", join_rows, ROW_JOINS)
        if not 1 <= patch_height <= front_end.num_mels or patch_width < 1:
            raise ValueError(
                f"expected 1 <= patch_height <= {front_end.num_mels} bands and patch_width >= 1 frame, "
                f"got {patch_height} x {patch_width}"
            )
        self.front_end = front_end
        self.patch_height, self.patch_width = patch_height, patch_width
        self.rows = front_end.num_mels // patch_height
        check_positions(position, settings.width, settings.head_dim, self.rows)
        self.position = position
        self.published_positions = published_positions
        self.patch_embed = PatchEmbed(self.patch_dim, settings.width)
        self.encoder = Transformer(settings, activation_checkpointing)
        self.sampling_rate = front_end.sampling_rate
        self.token_width, self.join_rows = settings.width, join_rows
        self.output_dim = settings.width * (self.rows if join_rows == "concatenate" else 1)
        self.hop_size_in_ms = 1000.0 * self.samples_per_column / self.sampling_rate
        self.window_columns = max(1, self.output_length(round(window_seconds * self.sampling_rate)))

    needs_mask_token = True

    @property
    def depth(self) -> int:
        return len(self.encoder.blocks)

    @property
    def patch_dim(self) -> int:
        return self.patch_height * self.patch_width

    @property
    def samples_per_column(self) -> int:
        return self.front_end.hop_length * self.patch_width

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip with one patch; :meth:`encode` extends shorter clips with silence."""
        return max(1, (self.patch_width - 1) * self.front_end.hop_length)

    def output_length(self, samples: int) -> int:
        """Feature frames that :meth:`encode` gives for a clip of ``samples`` samples."""
        return self.front_end.num_frames(max(samples, self.min_samples)) // self.patch_width

    def num_tokens(self, samples: int) -> int:
        """Patches of a clip of ``samples`` samples: what the Transformer sees of it without a mask."""
        return self.output_length(samples) * self.rows

    def patches(self, waveform: Tensor, lengths: Tensor | None = None) -> Patches:
        """Log-mel patches of a padded batch.

        Raises:
            ValueError: if a clip is shorter than one patch (``min_samples``).
        """
        lengths = check_lengths(waveform, lengths)
        if lengths.numel() and int(lengths.min()) < self.min_samples:
            raise ValueError(
                f"expected clips of at least {self.min_samples} samples (one patch), got {int(lengths.min())}"
            )
        frames, frame_lengths = self.front_end(waveform, lengths)
        return extract_patches(frames, frame_lengths, self.patch_height, self.patch_width)

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Embedding of patches ``(B, N, P)`` at grid positions ``(B or 1, N, 2)``, with sin-cos positions added."""
        tokens = self.patch_embed(patches)
        return self.add_positions(tokens, positions)

    def add_positions(self, tokens: Tensor, positions: Tensor) -> Tensor:
        if self.position != "sincos":
            return tokens
        return tokens + sincos_2d(positions, tokens.shape[-1]).to(tokens.dtype)

    def angles(self, positions: Tensor, head_dim: int | None = None) -> Tensor | None:
        """Rotary angles for positions ``(B or 1, N, 2)``, or None with sin-cos positions."""
        if self.position != "rope":
            return None
        return rotary_angles(positions, head_dim or self.encoder.settings.head_dim, self.rows)

    def transform(
        self,
        tokens: Tensor,
        positions: Tensor,
        lengths: Tensor | None = None,
        layer_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Transformer over embedded tokens.

        Shapes: tokens ``(B, N, D)`` from :meth:`embed`, positions ``(B or 1, N, 2)``, lengths ``(B,)`` valid tokens on
        the CPU -> ``(B, N, D)``.
        """
        return self.encoder(tokens, lengths, self.angles(positions), layer_outputs)

    def context(self, patches: Patches, plan: MaskPlan, step: int) -> Tensor:
        """Two-step: features ``(B, Ns, D)`` of the seen patches, from the seen patches alone."""
        positions = patches.positions()[plan.seen]
        return self.transform(self.embed(take(patches.values, plan.seen), positions), positions, plan.seen_lengths)

    def infill(self, patches: Patches, masked: Tensor, fill: Tensor, step: int) -> Tensor:
        """One-stage: features ``(B, N, D)`` with the embeddings of ``masked (B, N)`` patches replaced by the mask token
        ``fill (1, 1, D)``."""
        positions = patches.positions()[None]
        tokens = self.patch_embed(patches.values)
        # Replace by an outer selection rather than in place: fillers of ragged clips must not overwrite seen tokens.
        tokens = torch.where(masked[..., None], fill.to(tokens.dtype), tokens)
        return self.transform(self.add_positions(tokens, positions), positions, patches.lengths)

    def flops(self, tokens: int, frames: int) -> float:
        """Matrix-product operations of one forward pass over one clip, ``tokens`` of whose patches are present."""
        return self.encoder.flops(tokens) + 2.0 * tokens * self.patch_dim * self.token_width

    def encode_layers(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layers: Sequence[Layer] | None = None,
        *,
        rows: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Like :meth:`encode`, for several layers in one pass.

        Clips longer than the window are processed in consecutive windows; the last window reaches back over the one
        before, so that every frame has full context.

        Args:
            waveform, lengths, rows: see :meth:`encode`.
            layers: 0..depth-1 for the output of a block, None for the final, normalised output, "embeddings" for what
                enters the first block. Default: every block,
                then the final output.

        Returns:
            features ``(L, B, T, D)`` float32 and feature_lengths ``(B,)``, T = ``output_length(S)``.

        Raises:
            ValueError: as :meth:`encode`.
        """
        rows = rows or self.join_rows
        check_choice("rows", rows, ROW_JOINS)
        lengths = check_lengths(waveform, lengths)
        wanted = check_layers(layers, self.depth, embeddings=True)
        least = self.min_samples
        if waveform.shape[1] < least:
            waveform = nn.functional.pad(waveform, (0, least - waveform.shape[1]))
        if bool((lengths < least).any()):  # of no other clip is anything read behind its end
            inside = length_mask(lengths, least, waveform.device)
            waveform = torch.cat((torch.where(inside, waveform[:, :least], 0), waveform[:, least:]), 1)
        lengths = lengths.clamp(min=self.min_samples)
        totals = [self.output_length(int(samples)) for samples in lengths]
        width = self.token_width * (self.rows if rows == "concatenate" else 1)
        shape = (len(wanted), len(totals), max(totals, default=0), width)
        features = waveform.new_zeros(shape, dtype=torch.float32)
        window = self.window_columns
        windows = [(clip, start) for clip, total in enumerate(totals) for start in range(0, total, window)]
        for group in range(0, len(windows), WINDOWS_AT_ONCE):
            pieces, kept = [], []
            for clip, start in windows[group : group + WINDOWS_AT_ONCE]:
                # A last window that would be short reaches back to `total - window`.
                first = max(0, min(start, totals[clip] - window))
                begin = first * self.samples_per_column
                end = min(int(lengths[clip]), begin + window * self.samples_per_column)
                pieces.append(waveform[clip, begin:end])
                kept.append((clip, start, min(start + window, totals[clip]), start - first))
            piece_lengths = torch.tensor([len(piece) for piece in pieces], device="cpu")
            padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
            for number, encoded in enumerate(self._encode_window(padded, piece_lengths, wanted, rows)):
                for row, (clip, start, end, offset) in enumerate(kept):
                    features[number, clip, start:end] = encoded[row, offset : offset + end - start]
        return features, torch.tensor(totals, dtype=torch.int64, device="cpu")

    def _encode_window(self, waveform: Tensor, lengths: Tensor, wanted: Sequence[Layer], rows: str) -> Tensor:
        patches = self.patches(waveform, lengths)
        positions = patches.positions()
        if self.published_positions:
            positions = published_short_clip_positions(positions, patches.columns)
        blocks = block_list(wanted)
        tokens = self.embed(patches.values, positions[None])
        output = self.transform(tokens, positions[None], patches.lengths, blocks)
        tokens = choose_layers(output, blocks, wanted, tokens).float()
        tokens = tokens.unflatten(2, (patches.columns, self.rows))
        return tokens.flatten(3) if rows == "concatenate" else tokens.mean(3)
