"""The frozen-encoder second stage: a head that predicts target codes from an encoder's embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bestrq2.layers.cross_attention import PredictorSettings
from bestrq2.layers.masking import RandomMasking, take, valid_mask
from bestrq2.layers.positions import rotary_angles
from bestrq2.layers.transformer import TransformerSettings

from .predictor import CodeHead, Predictor


@dataclass
class HeadOutput:
    """
    Attributes:
        loss, accuracy: 0-d float32, over the predicted columns.
        codes: ``(B, Np, G)`` their targets.
        valid: ``(B, Np)`` bool, or None when all count.
    """

    loss: Tensor
    accuracy: Tensor
    codes: Tensor
    valid: Tensor | None


class FrozenHead(nn.Module):
    """The predictor of BEST-RQ-2 on given embeddings, one per target column, with rotary positions in time.

    Embeddings are layer-normalised without parameters, because encoders differ in scale. With ``masking`` the
    embeddings of masked columns are withheld and their codes predicted from the others; a frozen encoder that saw the
    whole clip carries something of the masked audio into its neighbours, so accuracies are not those of pretraining.
    Without, the code of every column is predicted.

    Args:
        input_dim: width of the embeddings.
        settings: shape of the head.
        codebook_size, num_codebooks: of the targets.
        masking: which columns are withheld, or None.

    Shapes:
        context ``(B, T, input_dim)``, codes ``(B, T, G)``, lengths ``(B,)`` valid columns on the CPU, step, index
        ``(B,)`` in the training order -> :class:`HeadOutput`.
    """

    def __init__(
        self,
        input_dim: int,
        settings: TransformerSettings,
        codebook_size: int,
        num_codebooks: int = 1,
        masking: RandomMasking | None = None,
    ) -> None:
        super().__init__()
        self.masking = masking
        self.norm = nn.LayerNorm(input_dim, elementwise_affine=False)
        if isinstance(settings, PredictorSettings) and (settings.attention != "full" or settings.share != 1.0):
            raise ValueError('a head on a frozen encoder needs predictor attention "full" and share 1')
        self.predictor = Predictor(input_dim, settings, "rope", 1)
        if masking is None:
            self.predictor.mask_token.requires_grad_(False)  # never used
        self.head = CodeHead(settings.width, codebook_size, num_codebooks)

    def forward(self, context: Tensor, codes: Tensor, lengths: Tensor, step: int, index: Tensor) -> HeadOutput:
        context = self.norm(context)
        time = torch.arange(context.shape[1], device=context.device)
        positions = torch.stack((torch.zeros_like(time), time), dim=-1)
        if self.masking is None:
            transformer = self.predictor.transformer
            angles = rotary_angles(positions[None], transformer.settings.head_dim, 1)
            hidden = transformer(self.predictor.input_proj(context), lengths, angles)
            valid = valid_mask(lengths, context.shape[1], context.device)
        else:
            plan = self.masking.plan(lengths, step, index, context.device)
            hidden = self.predictor(take(context, plan.seen), positions, plan)
            codes, valid = take(codes, plan.predicted), plan.predicted_valid()
        loss, accuracy = self.head(hidden, codes, valid)
        return HeadOutput(loss, accuracy, codes, valid)
