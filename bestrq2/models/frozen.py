"""The frozen-encoder second stage: a head that predicts target codes from an encoder's embeddings."""

import torch
from torch import Tensor, nn

from bestrq2.layers.code_head import CodeHead
from bestrq2.layers.cross_attention import PredictorSettings
from bestrq2.layers.masking import MaskPlan, RandomMasking, take
from bestrq2.layers.patches import Patches
from bestrq2.layers.positions import rotary_angles
from bestrq2.layers.transformer import TransformerSettings

from .best_rq2 import PretrainOutput
from .predictor import Predictor


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
        ``(B,)`` in the training order -> :class:`PretrainOutput`.
    """

    clip_weight = 0.0  # of a target for whole clips, which pretraining may have

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
            raise ValueError('a head on a frozen encoder needs a predictor of attention "full" and share 1')
        self.predictor = Predictor(input_dim, settings, "rope", 1)
        if masking is None:
            self.predictor.mask_token.requires_grad_(False)  # never used
        self.head = CodeHead(settings.width, codebook_size, num_codebooks)

    def forward(self, context: Tensor, codes: Tensor, lengths: Tensor, *, step: int, index: Tensor) -> PretrainOutput:
        patches = Patches(self.norm(context), lengths, rows=1)
        plan = self._plan(lengths, step, index, context.device)
        if self.masking is None:
            hidden = self._every_frame(patches)
        else:
            hidden = self.predictor(take(patches.values, plan.seen), patches.positions(), plan)
            codes = take(codes, plan.predicted)
        loss, accuracy = self.head(hidden, codes, plan.predicted_valid())
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden)

    def _plan(self, lengths: Tensor, step: int, index: Tensor, device: torch.device) -> MaskPlan:
        """The mask; without masking every column is predicted, and seen, too."""
        if self.masking is not None:
            return self.masking.plan(lengths, step, index, device)
        columns = torch.arange(int(lengths.max()), device=device).expand(len(lengths), -1)
        return MaskPlan(columns[:, :0], columns, torch.zeros_like(lengths), lengths)

    def _every_frame(self, patches: Patches) -> Tensor:
        transformer = self.predictor.transformer
        angles = rotary_angles(patches.positions()[None], transformer.settings.head_dim, 1)
        return transformer(self.predictor.input_proj(patches.values), patches.lengths, angles)

    def num_predicted(self, lengths: Tensor, step: int) -> int:
        """Targets in a batch with these ``lengths (B,)`` in columns, as :meth:`BestRQ2.num_predicted`."""
        return int((lengths if self.masking is None else self.masking.num_predicted(lengths, step)).sum())

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward)."""
        total = 0.0
        for seen, predicted in zip(plan.seen_lengths.tolist(), plan.predicted_lengths.tolist()):
            given, asked = (predicted, 0) if self.masking is None else (seen, predicted)
            total += self.predictor.flops(given, asked) + self.head.flops(predicted)
        return 3.0 * total
