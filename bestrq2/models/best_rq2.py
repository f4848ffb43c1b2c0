"""BEST-RQ-2: contextualize, then predict (Tuncay, Labbé and Pellegrini, arXiv 2606.30700)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bestrq2.layers.masking import MaskPlan, RandomMasking
from bestrq2.layers.patches import Patches
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.transformer import TransformerSettings

from .predictor import CodeHead, Predictor
from .vit import ViTEncoder


@dataclass
class PretrainOutput:
    """What one pretraining pass gives.

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


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (B, M)`` of ``values (B, N, D)`` -> ``(B, M, D)``."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class BestRQ2(nn.Module):
    """Two-step pretraining: the encoder sees only unmasked patches, a predictor infers the codes of the masked ones.

    Args:
        encoder: context encoder; what remains after pretraining.
        quantizer: frozen targets.
        masking: which patches are predicted.
        predictor: shape of the predictor Transformer. Published: 4 blocks of width 768.

    Shapes:
        waveform ``(B, S)``, lengths ``(B,)`` samples on the CPU, step, index ``(B,)`` global clip index in the training
        order (step and index seed the mask) -> :class:`PretrainOutput`.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        predictor: TransformerSettings | None = None,
    ) -> None:
        super().__init__()
        settings = predictor or TransformerSettings(depth=4)
        self.encoder, self.quantizer, self.masking = encoder, quantizer, masking
        self.predictor = Predictor(encoder.output_dim, settings, encoder.position, encoder.rows)
        self.head = CodeHead(settings.width, quantizer.codebook_size, quantizer.num_codebooks)

    def forward(self, waveform: Tensor, lengths: Tensor, step: int, index: Tensor) -> PretrainOutput:
        patches = self.encoder.patches(waveform, lengths)
        plan = self.masking.plan(patches.lengths, step, index, waveform.device)
        codes = self.quantizer(patches.values, patches.lengths, rows=plan.predicted)

        positions = patches.positions()
        seen_positions = positions[plan.seen]
        tokens = self.encoder.embed(take(patches.values, plan.seen), seen_positions)
        context = self.encoder(tokens, seen_positions, plan.seen_lengths)
        hidden = self.predictor(context, positions, plan)
        loss, accuracy = self.head(hidden, codes, plan.predicted_valid())
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden)

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward)."""
        total = 0.0
        embed = 2.0 * self.encoder.patch_dim * self.encoder.output_dim
        project = 2.0 * self.predictor.input_proj.weight.numel()
        for seen, predicted in zip(plan.seen_lengths.tolist(), plan.predicted_lengths.tolist()):
            total += self.encoder.encoder.flops(seen) + seen * (embed + project)
            total += self.predictor.transformer.flops(seen + predicted) + self.head.flops(predicted)
        return 3.0 * total


class BestRQ(nn.Module):
    """One-stage baseline (BEST-RQ on a ViT): masked patch embeddings are replaced by a mask token, the encoder sees all
    positions, and the codes of the masked ones are read from its output.

    Arguments and shapes as :class:`BestRQ2`, without a predictor.
    """

    def __init__(self, encoder: ViTEncoder, quantizer: RandomProjectionQuantizer, masking: RandomMasking) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.masking = encoder, quantizer, masking
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.output_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = CodeHead(encoder.output_dim, quantizer.codebook_size, quantizer.num_codebooks)

    def forward(self, waveform: Tensor, lengths: Tensor, step: int, index: Tensor) -> PretrainOutput:
        patches = self.encoder.patches(waveform, lengths)
        plan = self.masking.plan(patches.lengths, step, index, waveform.device)
        codes = self.quantizer(patches.values, patches.lengths, rows=plan.predicted)

        positions = patches.positions()[None]
        tokens = self.encoder.patch_embed(patches.values)
        masks = self.mask_token.to(tokens.dtype).expand(*plan.predicted.shape, -1)
        # Replace by an outer selection rather than in place: fillers of ragged clips must not overwrite seen tokens.
        tokens = torch.where(self._is_masked(patches, plan)[..., None], masks[:, :1], tokens)
        output = self.encoder(self.encoder.add_positions(tokens, positions), positions, patches.lengths)
        hidden = take(output, plan.predicted)
        loss, accuracy = self.head(hidden, codes, plan.predicted_valid())
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden)

    @staticmethod
    def _is_masked(patches: Patches, plan: MaskPlan) -> Tensor:
        num_clips, num_tokens = patches.values.shape[:2]
        valid = plan.predicted_valid()
        target = plan.predicted if valid is None else torch.where(valid, plan.predicted, num_tokens)
        marked = torch.zeros(num_clips, num_tokens + 1, dtype=torch.bool, device=target.device)
        return marked.scatter_(1, target, True)[:, :num_tokens]

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward)."""
        total = 0.0
        embed = 2.0 * self.encoder.patch_dim * self.encoder.output_dim
        for seen, predicted in zip(plan.seen_lengths.tolist(), plan.predicted_lengths.tolist()):
            tokens = seen + predicted
            total += self.encoder.encoder.flops(tokens) + tokens * embed + self.head.flops(predicted)
        return 3.0 * total
