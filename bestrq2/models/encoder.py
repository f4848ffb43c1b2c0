"""Members that an encoder needs to be pretrained by :class:`BestRQ2` or :class:`BestRQ`."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bestrq2.layers.masking import MaskPlan
from bestrq2.layers.patches import Patches
from bestrq2.layers.positions import PositionKind

__all__ = ["PretrainableEncoder", "check_encoder", "check_tokens", "token_width"]


@runtime_checkable
class PretrainableEncoder(Protocol):
    """An ``nn.Module`` that can be pretrained; ``isinstance`` tells whether one has all members.

    ``docs/own_encoder.md`` has a complete example. One-stage pretraining needs :class:`BestRQ`'s ``infill`` and
    ``needs_mask_token`` in place of :meth:`context`. The four properties may be plain attributes.
    """

    @property
    def patch_dim(self) -> int:
        """P, values of a patch: the input of the quantizer."""
        ...

    @property
    def output_dim(self) -> int:
        """D, width of the features, and of a token unless :func:`token_width` finds another."""
        ...

    @property
    def rows(self) -> int:
        """Frequency rows of the grid of patches; 1 where a patch covers all bands."""
        ...

    @property
    def position(self) -> PositionKind:
        """Position encoding of the predictor on that grid: "rope" or "sincos"."""
        ...

    def patches(self, waveform: Tensor, lengths: Tensor | None = None) -> Patches:
        """Cut audio ``(B, S)`` with ``lengths (B,)`` samples into patches ``(B, N, P)``; no gradient.

        The patches of a clip must not depend on the other clips of the batch.
        """
        ...

    def num_tokens(self, samples: int) -> int:
        """Count the patches of a clip of ``samples`` samples, as :meth:`patches` gives them."""
        ...

    def context(self, patches: Patches, plan: MaskPlan, step: int) -> Tensor:
        """Encode the seen patches ``plan.seen (B, Ns)`` and nothing else: features ``(B, Ns, D)``.

        ``step`` is the number of the training step, for encoders that draw something for every step as a pure
        function of it, such as the attention window of a Conformer. Others ignore it.
        """
        ...

    def encode(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features ``(B, T, D)`` float32 of whole clips, and their lengths ``(B,)`` int64 on the CPU."""
        ...


def token_width(encoder: Any) -> int:
    """Width of a token: ``token_width`` of an encoder whose features join several tokens, else its ``output_dim``."""
    return int(getattr(encoder, "token_width", encoder.output_dim))


_ONE_STAGE = ("infill", "needs_mask_token")


def check_encoder(encoder: object, *, one_stage: bool = False) -> None:
    """Raise a clear error for an encoder that cannot be pretrained.

    Args:
        encoder: a candidate for :class:`PretrainableEncoder`.
        one_stage: also ask for ``infill(patches, masked, fill, step)`` and ``needs_mask_token``.

    Raises:
        TypeError: listing the members that are missing.
    """
    members = [name for name in vars(PretrainableEncoder) if not name.startswith("_")]
    wanted = sorted(name for name in members if name != "context" or not one_stage)
    missing = [name for name in (*wanted, *(_ONE_STAGE if one_stage else ())) if not hasattr(encoder, name)]
    if missing:
        raise TypeError(
            f"{type(encoder).__name__} cannot be pretrained: it has no {', '.join(missing)}; expected the members of "
            "bestrq2.models.PretrainableEncoder (docs/own_encoder.md has a complete example)"
        )


def check_tokens(encoder: object, member: str, features: object, places: Tensor, what: str) -> None:
    """Raise a clear error for features that are not one for each of ``places (B, N, ...)``: with a class token in front
    of them, all would be taken for their neighbour.

    Raises:
        ValueError: naming the member of the encoder that gave them.
    """
    expected = (*places.shape[:2], token_width(encoder))
    if not isinstance(features, Tensor) or features.shape != expected:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{type(encoder).__name__}.{member}: expected features of {what}, {expected}, got {got}; leave out class "
            "tokens"
        )
