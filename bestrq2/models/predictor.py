"""The predictor: infer the codes of masked patches from the context. It is discarded after pretraining."""

import torch
from torch import Tensor, nn

from bestrq2.layers.block_rows import linear
from bestrq2.layers.cross_attention import CrossTransformer, PredictorSettings
from bestrq2.layers.masking import MaskPlan
from bestrq2.layers.positions import PositionKind, check_positions, rotary_angles, sincos_2d
from bestrq2.layers.precision import like_weight
from bestrq2.layers.transformer import Transformer, TransformerSettings


class Predictor(nn.Module):
    """A light Transformer over context and mask tokens; only the masked positions are read out.

    As published, context tokens enter without a new position vector (they carry the encoder's), mask tokens are one
    learned vector plus the position vector of their place. With rotary positions all tokens are rotated instead.

    Args:
        input_dim: width of the context.
        settings: shape of the Transformer; with :class:`PredictorSettings` its attention may be "cross": mask tokens
            attend to the context alone.
        position: "sincos" or "rope".
        rows: frequency rows of the patch grid.

    Shapes:
        context ``(B, Ns, input_dim)``, positions ``(N, 2)``, plan -> ``(B, Np, D)`` at ``plan.predicted``.
    """

    def __init__(self, input_dim: int, settings: TransformerSettings, position: PositionKind, rows: int) -> None:
        super().__init__()
        settings.check()
        check_positions(position, settings.width, settings.head_dim, rows)
        self.position, self.rows = position, rows
        self.input_proj = nn.Linear(input_dim, settings.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.cross = isinstance(settings, PredictorSettings) and settings.attention == "cross"
        self.transformer = CrossTransformer(settings) if self.cross else Transformer(settings)
        nn.init.trunc_normal_(self.input_proj.weight, std=0.02)
        nn.init.zeros_(self.input_proj.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, positions: Tensor, plan: MaskPlan) -> Tensor:
        context = linear(self.input_proj, like_weight(context, self.input_proj))
        masks = self.mask_token.to(context.dtype).expand(*plan.predicted.shape, -1)
        masked_positions = positions[plan.predicted]
        if self.position == "sincos":
            masks = masks + sincos_2d(masked_positions, masks.shape[-1]).to(masks.dtype)
        if isinstance(self.transformer, CrossTransformer):
            head_dim = self.transformer.settings.head_dim
            angles, of_context = (
                rotary_angles(places, head_dim, self.rows) if self.position == "rope" else None
                for places in (masked_positions, positions[plan.seen])
            )
            return self.transformer(masks, context, plan.seen_lengths, angles, of_context)
        # The order of tokens means nothing to attention. With ragged clips each part has fillers at its own end, so the
        # valid tokens of a clip are moved to the front before the Transformer and its masked ones found again after.
        tokens = torch.cat((context, masks), dim=1)
        places = torch.cat((positions[plan.seen], masked_positions), dim=1)
        lengths = plan.seen_lengths + plan.predicted_lengths
        ragged = bool((lengths < tokens.shape[1]).any())
        if ragged:
            # Lengths alone are copied: a GPU's host waits at larger copies from memory that is not page-locked.
            seen, valid = (x.to(tokens.device, non_blocking=True)[:, None] for x in (plan.seen_lengths, lengths))
            order = self._compact_order(seen, valid, plan.seen.shape[1], tokens.shape[1])
            tokens = tokens.gather(1, order[..., None].expand_as(tokens))
            places = places.gather(1, order[..., None].expand_as(places))
        angles = None
        if self.position == "rope":
            angles = rotary_angles(places, self.transformer.settings.head_dim, self.rows)
        if not ragged:
            return self.transformer(tokens, lengths, angles, first=plan.seen.shape[1])
        hidden = self.transformer(tokens, lengths, angles)
        index = (seen + torch.arange(plan.predicted.shape[1], device=hidden.device)).clamp(max=tokens.shape[1] - 1)
        return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))

    def flops(self, seen: int, predicted: int) -> float:
        """Matrix-product operations of one forward pass over one clip."""
        project = 2.0 * seen * self.input_proj.weight.numel()
        if isinstance(self.transformer, CrossTransformer):
            return project + self.transformer.flops(predicted, seen)
        return project + self.transformer.flops(seen + predicted, predicted)

    @staticmethod
    def _compact_order(seen: Tensor, valid: Tensor, max_seen: int, total: int) -> Tensor:
        """Per clip: seen, then predicted, then fillers, indices into [context | masks], ``(B, total)``.

        Args:
            seen, valid: ``(B, 1)`` seen and all tokens of each clip.
        """
        column = torch.arange(total, device=seen.device)
        order = torch.where(column < seen, column, max_seen + column - seen)
        return torch.where(column < valid, order, 0)
