"""BEST-RQ-2: contextualize, then predict (Tuncay, Labbé and Pellegrini, arXiv 2606.30700)."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bestrq2.hashing import mix
from bestrq2.layers.counter_random import normal
from bestrq2.layers.cross_attention import PredictorSettings
from bestrq2.layers.masking import MaskPlan, RandomMasking, take
from bestrq2.layers.patches import Patches
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.thinning import num_kept, thin
from bestrq2.layers.transformer import TransformerSettings

from .encoder import PretrainableEncoder, check_encoder
from .predictor import CodeHead, Predictor


@dataclass
class PretrainOutput:
    """Results of one pretraining pass.

    Attributes:
        loss, accuracy: 0-d float32; mean cross-entropy and top-1 accuracy over the predicted patches.
        codes: ``(B, Np, G)`` int64 targets.
        plan: the mask.
        patches: log-mel patches of the batch.
        hidden: ``(B, Np, D)`` what the head saw.
    """

    loss: Tensor
    accuracy: Tensor
    codes: Tensor
    plan: MaskPlan
    patches: Patches
    hidden: Tensor


def num_predicted(
    encoder: PretrainableEncoder, masking: RandomMasking, lengths: Tensor, step: int, share: float = 1.0
) -> int:
    """Targets in a batch of clips with these ``lengths (B,)`` in samples, a ``share`` of their masked tokens."""
    samples, clips = lengths.unique(return_counts=True)
    tokens = torch.tensor([encoder.num_tokens(n) for n in samples.tolist()], dtype=torch.int64)
    masked = masking.num_predicted(tokens, step)
    return int(((masked if share == 1.0 else num_kept(masked, share)) * clips).sum())


def clip_sizes(plan: MaskPlan) -> list[tuple[int, int, int, int]]:
    """(seen, predicted and all tokens, number of such clips) for what occurs: clips of equal length agree."""
    tokens = plan.seen_lengths + plan.masked_lengths
    sizes, clips = torch.stack((plan.seen_lengths, plan.predicted_lengths, tokens), 1).unique(dim=0, return_counts=True)
    return [(*size, count) for size, count in zip(sizes.tolist(), clips.tolist())]


class BestRQ2(nn.Module):
    """Two-step pretraining: the encoder sees only unmasked patches, a predictor infers the codes of the masked ones.

    Args:
        encoder: context encoder; what remains after pretraining.
        quantizer: frozen targets.
        masking: which patches are predicted.
        predictor: shape of the predictor Transformer. Published: 4 blocks of width 768. :class:`PredictorSettings` may
            also ask for attention to the context alone and for a share of the masked patches to predict.

    Shapes:
        waveform ``(B, S)``, lengths ``(B,)`` samples on the CPU (None: all), step, index ``(B,)`` global clip index in
        the training order (None: 0..B-1; step and index seed the mask) -> :class:`PretrainOutput`.

    Raises:
        TypeError: for an encoder that lacks members of :class:`PretrainableEncoder`, listing them.
    """

    def __init__(
        self,
        encoder: PretrainableEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        predictor: TransformerSettings | None = None,
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        settings = predictor or TransformerSettings(depth=4)
        # Any: an encoder has more than the members that pretraining needs.
        self.encoder = cast(Any, encoder)
        self.quantizer, self.masking = quantizer, masking
        self.share = settings.share if isinstance(settings, PredictorSettings) else 1.0
        self.predictor = Predictor(encoder.output_dim, settings, encoder.position, encoder.rows)
        self.head = CodeHead(settings.width, quantizer.codebook_size, quantizer.num_codebooks)

    def forward(
        self, waveform: Tensor, lengths: Tensor | None = None, *, step: int, index: Tensor | None = None
    ) -> PretrainOutput:
        index = torch.arange(len(waveform)) if index is None else index
        patches, plan, codes = self._targets(waveform, lengths, step, index)

        context = self.encoder.context(patches, plan, step)
        hidden = self.predictor(context, patches.positions(), plan)
        loss, accuracy = self.head(hidden, codes, plan.predicted_valid())
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden)

    @torch.compiler.disable  # 64-bit hashes and lengths of clips are numbers of the host, new in every step
    def _targets(self, waveform: Tensor, lengths: Tensor, step: int, index: Tensor) -> tuple[Patches, MaskPlan, Tensor]:
        patches = self.encoder.patches(waveform, lengths)
        plan = self.masking.plan(patches.lengths, step, index, waveform.device)
        plan = thin(plan, self.share, self.masking.seed, step, index)
        return patches, plan, self.quantizer(patches.values, patches.lengths, rows=plan.predicted)

    def num_predicted(self, lengths: Tensor, step: int) -> int:
        """Targets in a batch with these ``lengths (B,)`` in samples, known before its forward pass: the loss is their
        mean, so this is the weight of the batch beside others of the same step."""
        return num_predicted(self.encoder, self.masking, lengths, step, self.share)

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward)."""
        total = 0.0
        for seen, predicted, tokens, clips in clip_sizes(plan):
            one = self.encoder.flops(seen, tokens) + self.predictor.flops(seen, predicted) + self.head.flops(predicted)
            total += clips * one
        return 3.0 * total


class BestRQ(nn.Module):
    """One-stage pretraining (BEST-RQ): masked patches are hidden from an encoder that sees all positions, and their
    codes are read from its output.

    A ViT gets a learned mask token in place of the embedding of a masked patch. A Conformer, whose subsampling reads
    across patches, gets noise in place of the log-mel values, as Chiu et al. (2022) do; the noise is a pure function of
    (seed, step, clip, place), like the masks.

    Arguments and shapes as :class:`BestRQ2`, without a predictor.

    Args:
        noise_std: deviation of the noise around zero. Published: 0.1, on standardised log-mel values.
    """

    def __init__(
        self,
        encoder: PretrainableEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        noise_std: float = 0.1,
    ) -> None:
        super().__init__()
        check_encoder(encoder, one_stage=True)
        self.encoder = cast(Any, encoder)
        self.quantizer, self.masking, self.noise_std = quantizer, masking, noise_std
        self.mask_token: nn.Parameter | None = None
        if self.encoder.needs_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.output_dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = CodeHead(encoder.output_dim, quantizer.codebook_size, quantizer.num_codebooks)

    def forward(
        self, waveform: Tensor, lengths: Tensor | None = None, *, step: int, index: Tensor | None = None
    ) -> PretrainOutput:
        index = torch.arange(len(waveform)) if index is None else index
        patches, plan, codes = self._targets(waveform, lengths, step, index)

        fill = self._noise(patches, step, index) if self.mask_token is None else self.mask_token
        output = self.encoder.infill(patches, self._is_masked(patches, plan), fill, step)
        hidden = take(output, plan.predicted)
        loss, accuracy = self.head(hidden, codes, plan.predicted_valid())
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden)

    @torch.compiler.disable  # as the masks
    def _noise(self, patches: Patches, step: int, index: Tensor) -> Tensor:
        num_clips, num_tokens, dim = patches.values.shape
        index = index.to(patches.values.device, torch.int64, non_blocking=True)
        noise = normal(mix(self.masking.seed, step, 1), index, num_tokens * dim)
        return self.noise_std * noise.view(num_clips, num_tokens, dim)

    @staticmethod
    def _is_masked(patches: Patches, plan: MaskPlan) -> Tensor:
        num_clips, num_tokens = patches.values.shape[:2]
        valid = plan.predicted_valid()
        target = plan.predicted if valid is None else torch.where(valid, plan.predicted, num_tokens)
        marked = torch.zeros(num_clips, num_tokens + 1, dtype=torch.bool, device=target.device)
        return marked.scatter_(1, target, True)[:, :num_tokens]

    @torch.compiler.disable  # 64-bit hashes and lengths of clips are numbers of the host, new in every step
    def _targets(self, waveform: Tensor, lengths: Tensor, step: int, index: Tensor) -> tuple[Patches, MaskPlan, Tensor]:
        patches = self.encoder.patches(waveform, lengths)
        plan = self.masking.plan(patches.lengths, step, index, waveform.device)
        return patches, plan, self.quantizer(patches.values, patches.lengths, rows=plan.predicted)

    def num_predicted(self, lengths: Tensor, step: int) -> int:
        """Targets in a batch with these ``lengths (B,)`` in samples, known before its forward pass: the loss is their
        mean, so this is the weight of the batch beside others of the same step."""
        return num_predicted(self.encoder, self.masking, lengths, step)

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward)."""
        total = 0.0
        for _, predicted, tokens, clips in clip_sizes(plan):
            total += clips * (self.encoder.flops(tokens, tokens) + self.head.flops(predicted))
        return 3.0 * total
