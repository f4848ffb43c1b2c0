"""BEST-RQ-2: contextualize, then predict (Tuncay, Labbé and Pellegrini, arXiv 2606.30700)."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bestrq2.errors import BestRQWarning
from bestrq2.hashing import mix
from bestrq2.layers.code_head import CodeHead
from bestrq2.layers.counter_random import clip_index, normal
from bestrq2.layers.cross_attention import PredictorSettings
from bestrq2.layers.log_mel import check_waveform, integer_lengths
from bestrq2.layers.masking import MaskPlan, RandomMasking, take, touching_share
from bestrq2.layers.mixing import FLOOR_DB, PairMixing
from bestrq2.layers.patches import Patches, extract_patches
from bestrq2.layers.pytrees import tree_of_tensors
from bestrq2.layers.quantizer import RandomProjectionQuantizer
from bestrq2.layers.thinning import num_kept, thin
from bestrq2.layers.transformer import TransformerSettings
from bestrq2.ops.common.arguments import integer
from bestrq2.ops.common.compiler import never_compiled

from .clip_head import ClipHead
from .encoder import PretrainableEncoder, check_encoder, check_tokens, token_width
from .predictor import Predictor
from .teacher import Teacher


@tree_of_tensors("clip_weight")
@dataclass
class PretrainOutput:
    """Results of one pretraining pass.

    Also by name and place, as outputs of transformers: ``output["loss"]``, ``dict(output)``, and ``output[0]``, the
    objective, which other libraries minimise. A loop or an assignment to several names gives the values in this order:
    objective, loss, accuracy, codes, plan, patches, hidden, and clip_loss if there is one. Wrappers of modules (DDP,
    FSDP) find its tensors, for it is registered as a pytree.

    Attributes:
        loss, accuracy: 0-d float32; mean cross-entropy and top-1 accuracy over the predicted patches.
        codes: ``(B, Np, G)`` int64 targets.
        plan: the mask.
        patches: log-mel patches of the batch, mixed where clips are mixed.
        hidden: ``(B, Np, D)`` what the head saw.
        clip_loss: 0-d float32, of the target for whole clips; None without one.
        clip_weight: its weight beside ``loss``.
    """

    loss: Tensor
    accuracy: Tensor
    codes: Tensor
    plan: MaskPlan
    patches: Patches
    hidden: Tensor
    clip_loss: Tensor | None = None
    clip_weight: float = 0.0

    @property
    def objective(self) -> Tensor:
        """The loss to minimise, 0-d float32."""
        return self.loss if self.clip_loss is None else self.loss + self.clip_weight * self.clip_loss

    def keys(self) -> tuple[str, ...]:
        """Names of what is there, the objective first."""
        names = ("objective", "loss", "accuracy", "codes", "plan", "patches", "hidden", "clip_loss")
        return names if self.clip_loss is not None else names[:-1]

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return tuple(self)[key]
        if key not in self.keys():
            raise KeyError(f"{key!r}, expected one of {', '.join(self.keys())}")
        return getattr(self, key)

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def touching_share(self) -> Tensor:
        """Share of the masked patches with a visible one beside them in time or frequency, 0-d float32."""
        return touching_share(self.plan, self.patches.values.shape[1], self.patches.rows)


class Prepared(NamedTuple):
    """Patches, mask, and codes ``(B, Np, G)`` at the predicted places of a batch."""

    patches: Patches
    plan: MaskPlan
    codes: Tensor

    def tensors(self) -> list[Tensor]:
        found = [*vars(self.patches).values(), *vars(self.plan).values(), self.codes]
        return [value for value in found if isinstance(value, Tensor)]


def clip_sizes(plan: MaskPlan) -> list[tuple[int, int, int, int]]:
    """(seen, predicted and all tokens, number of such clips) for what occurs: clips of equal length agree."""
    tokens = plan.seen_lengths + plan.masked_lengths
    sizes, clips = torch.stack((plan.seen_lengths, plan.predicted_lengths, tokens), 1).unique(dim=0, return_counts=True)
    return [(*size, count) for size, count in zip(sizes.tolist(), clips.tolist())]


def _numbers(waveform: Tensor, step: int, index: Tensor | None) -> tuple[int, Tensor]:
    """Number of the step and of each clip, checked."""
    check_waveform(waveform)
    return integer("step", step), clip_index(index, len(waveform))


class _Pretraining(nn.Module):
    """Base class of both ways of pretraining: patches, targets, masks, the optional target for whole clips.

    Args:
        encoder: what remains after pretraining.
        quantizer: frozen targets.
        masking: which patches are predicted.
        teacher: quantize its features instead of the log-mel patches.
        mixing: add parts of neighbouring clips in training.
        clip_weight: of the loss of the target for whole clips; 0: none.

    Raises:
        TypeError: for an encoder that lacks members of :class:`PretrainableEncoder`, listing them.
        ValueError: if the quantizer does not take what it gets, the teacher's frames are not the encoder's tokens, or
            ``mixing`` with an encoder that has no ``front_end``.
    """

    one_stage = False
    share = 1.0  # of the masked tokens, predicted
    clip_head: ClipHead | None
    head: CodeHead

    def __init__(
        self,
        encoder: PretrainableEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        teacher: Teacher | None,
        mixing: PairMixing | None,
        clip_weight: float,
    ) -> None:
        super().__init__()
        check_encoder(encoder, one_stage=self.one_stage)
        # Any: an encoder has more than the members that pretraining needs.
        self.encoder = cast(Any, encoder)
        self.quantizer, self.masking = quantizer, masking
        self.teacher, self.mixing, self.clip_weight = teacher, mixing, clip_weight
        if not 0 <= clip_weight < float("inf"):
            raise ValueError(f"clip_weight must be a number of at least 0, got {clip_weight}")
        if mixing is not None and not hasattr(encoder, "front_end"):
            raise ValueError(f"mixing needs an encoder with a front_end (a LogMel); {type(encoder).__name__} has none")
        if teacher is not None:
            teacher.check(self.encoder)
        trained = [p.requires_grad for p in encoder.parameters()] if isinstance(encoder, nn.Module) else []
        if trained and not any(trained):
            warnings.warn(
                f"no parameter of {type(encoder).__name__} takes a gradient, so pretraining would leave it as it is: "
                "open it with bestrq2.load(..., trainable=True), or call requires_grad_(True).train()",
                category=BestRQWarning,
                stacklevel=3,
            )
        width = encoder.patch_dim if teacher is None else teacher.width
        if quantizer.patch_dim != width:
            raise ValueError(f"expected a quantizer of {width} values, got one of {quantizer.patch_dim}")

    def _add_clip_head(self) -> None:
        """Last of all parts, so that the others start from the same random numbers with and without it."""
        books, size = self.quantizer.num_codebooks, self.quantizer.codebook_size
        self.clip_head = ClipHead(token_width(self.encoder), size, books) if self.clip_weight else None

    def target_values(self, waveform: Tensor, lengths: Tensor | None, patches: Patches) -> Tensor:
        """Input of the quantizer: log-mel patches, or the teacher's features of the same audio, ``(B, N, P)``."""
        return patches.values if self.teacher is None else self.teacher.features(waveform, lengths, patches)

    def target_codes(
        self, waveform: Tensor, lengths: Tensor | None, patches: Patches, rows: Tensor | None = None
    ) -> Tensor:
        """Codes ``(B, M, G)`` int64 of the tokens ``rows (B, M)`` (None: all) of single clips."""
        return self.quantizer(self.target_values(waveform, lengths, patches), patches.lengths, rows=rows)

    def _check_counts(self, waveform: Tensor, lengths: Tensor | None, patches: Patches) -> None:
        samples = [waveform.shape[1]] * len(waveform) if lengths is None else integer_lengths(lengths).tolist()
        for length, count in set(zip(samples, patches.lengths.tolist())):  # one, where all clips are crops
            if self.encoder.num_tokens(length) != count:
                raise ValueError(
                    f"{type(self.encoder).__name__}.num_tokens says {self.encoder.num_tokens(length)} for {length} "
                    f"samples, but patches gives {count}"
                )

    @never_compiled  # 64-bit hashes and lengths of clips are numbers of the host, new in every step
    def prepare(self, waveform: Tensor, lengths: Tensor | None, step: int, index: Tensor) -> Prepared:
        """Patches (mixed, if clips are mixed), mask and codes: the beginning of a forward pass.

        A function of the arguments and of frozen tensors alone, so it may be computed before the updates of earlier
        steps and handed to the forward pass.
        """
        step, index = _numbers(waveform, step, index)
        patches = single = self.encoder.patches(waveform, lengths)
        if patches.rows != self.encoder.rows:
            raise ValueError(
                f"{type(self.encoder).__name__}.rows is {self.encoder.rows}, but its patches have {patches.rows} rows"
            )
        self._check_counts(waveform, lengths, patches)
        mixture = None
        if self.mixing is not None and self.training:
            front = self.encoder.front_end
            mean, std = (self._like_patches(values, single) for values in (front.mean, front.std))
            mixture = self.mixing.mix(single, index, mean, std, getattr(front, "floor_db", FLOOR_DB))
            patches = mixture.patches
        weights = patches.dispersion() if self.masking.dispersion else None
        plan = self.masking.plan(patches.lengths, step, index, waveform.device, patches.rows, weights)
        plan = thin(plan, self.share, self.masking.seed, step, index)
        if mixture is None:
            return Prepared(patches, plan, self.target_codes(waveform, lengths, patches, plan.predicted))
        codes = mixture.codes(self.target_codes(waveform, lengths, single))
        return Prepared(patches, plan, take(codes, plan.predicted))

    def num_predicted(self, lengths: Tensor, step: int) -> int:
        """Targets in a batch with these ``lengths (B,)`` in samples, known before its forward pass: the loss is their
        mean, so this is the weight of the batch beside others of the same step."""
        samples, clips = lengths.unique(return_counts=True)
        tokens = torch.tensor([self.encoder.num_tokens(n) for n in samples.tolist()], dtype=torch.int64, device="cpu")
        return int((num_kept(self.masking.num_predicted(tokens, step), self.share) * clips).sum())

    def _like_patches(self, bands: Tensor, patches: Patches) -> Tensor:
        """One value, or one per band, so that it meets the values of patches: ``()`` or ``(1, N, P)``."""
        if bands.numel() == 1:
            return bands.reshape(())
        height = getattr(self.encoder, "patch_height", len(bands))  # a Conformer's tokens are whole frames
        width = self.encoder.patch_dim // height
        column = extract_patches(bands.expand(1, width, -1), torch.tensor([width], device="cpu"), height, width).values
        return column.repeat(1, patches.columns, 1)

    def forward(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        *,
        step: int,
        index: Tensor | None = None,
        prepared: Prepared | None = None,
    ) -> PretrainOutput:
        step, index = _numbers(waveform, step, index)
        patches, plan, codes = prepared or self.prepare(waveform, lengths, step, index)

        hidden, seen = self._predict(patches, plan, step, index, with_seen=self.clip_head is not None)
        valid = plan.predicted_valid()
        loss, accuracy = self.head(hidden, codes, valid)
        clip_loss = None if self.clip_head is None else self.clip_head(seen, plan.seen_lengths, codes, valid)
        return PretrainOutput(loss, accuracy, codes, plan, patches, hidden, clip_loss, self.clip_weight)

    def _predict(
        self, patches: Patches, plan: MaskPlan, step: int, index: Tensor, with_seen: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs at the predicted places ``(B, Np, D)``, and where patches are seen, if they are asked for."""
        raise NotImplementedError

    def _clip_flops(self) -> float:
        return 0.0 if self.clip_head is None else self.clip_head.flops()

    def _target_flops(self, plan: MaskPlan) -> float:
        """Of a teacher, which has no backward pass."""
        if self.teacher is None:
            return 0.0
        rows = self.encoder.rows
        return sum(clips * self.teacher.flops(tokens // rows) for _, _, tokens, clips in clip_sizes(plan))


class BestRQ2(_Pretraining):
    """Two-step pretraining: the encoder sees only unmasked patches, a predictor infers the codes of the masked ones.

    Args:
        encoder: context encoder; what remains after pretraining.
        quantizer: frozen targets.
        masking: which patches are predicted.
        predictor: shape of the predictor Transformer. Published: 4 blocks of width 768. :class:`PredictorSettings` may
            also ask for attention to the context alone and for a share of the masked patches to predict.
        teacher, mixing, clip_weight: departures from the published method. A frozen encoder whose features are
            quantized instead of the log-mel patches; mixing of clips in training; the weight of a target for whole
            clips, which the mean of the context predicts (0: none).

    Shapes:
        waveform ``(B, S)``, lengths ``(B,)`` samples on the CPU (None: all), step, index ``(B,)`` global clip index in
        the training order (None: 0..B-1; step and index seed the mask), prepared: result of ``prepare`` for the other
        arguments (None: it is computed) -> :class:`PretrainOutput`.

    Raises:
        TypeError: for an encoder that lacks members of :class:`PretrainableEncoder`, listing them.
    """

    def __init__(
        self,
        encoder: PretrainableEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        predictor: TransformerSettings | None = None,
        *,
        teacher: Teacher | None = None,
        mixing: PairMixing | None = None,
        clip_weight: float = 0.0,
    ) -> None:
        super().__init__(encoder, quantizer, masking, teacher, mixing, clip_weight)
        settings = predictor or TransformerSettings(depth=4)
        self.share = settings.share if isinstance(settings, PredictorSettings) else 1.0
        self.predictor = Predictor(token_width(encoder), settings, encoder.position, encoder.rows)
        self.head = CodeHead(settings.width, quantizer.codebook_size, quantizer.num_codebooks)
        self._add_clip_head()

    def _predict(
        self, patches: Patches, plan: MaskPlan, step: int, index: Tensor, with_seen: bool
    ) -> tuple[Tensor, Tensor | None]:
        context = self.encoder.context(patches, plan, step)
        check_tokens(self.encoder, "context", context, plan.seen, "the seen patches")
        return self.predictor(context, patches.positions(), plan), context

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward),
        and of the forward pass of a teacher."""
        total = 0.0
        for seen, predicted, tokens, clips in clip_sizes(plan):
            one = self.encoder.flops(seen, tokens) + self.predictor.flops(seen, predicted)
            total += clips * (one + self.head.flops(predicted) + self._clip_flops())
        return 3.0 * total + self._target_flops(plan)


class BestRQ(_Pretraining):
    """One-stage pretraining (BEST-RQ): masked patches are hidden from an encoder that sees all positions, and their
    codes are read from its output.

    A ViT gets a learned mask token in place of the embedding of a masked patch. A Conformer, whose subsampling reads
    across patches, gets noise in place of the log-mel values, as Chiu et al. (2022) do; the noise is a pure function of
    (seed, step, clip, place), like the masks.

    Arguments and shapes as :class:`BestRQ2`, without a predictor.

    Args:
        noise_std: deviation of the noise around zero. Published: 0.1, on standardised log-mel values.
    """

    one_stage = True

    def __init__(
        self,
        encoder: PretrainableEncoder,
        quantizer: RandomProjectionQuantizer,
        masking: RandomMasking,
        noise_std: float = 0.1,
        *,
        teacher: Teacher | None = None,
        mixing: PairMixing | None = None,
        clip_weight: float = 0.0,
    ) -> None:
        super().__init__(encoder, quantizer, masking, teacher, mixing, clip_weight)
        self.noise_std = noise_std
        self.mask_token: nn.Parameter | None = None
        if self.encoder.needs_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, token_width(encoder)))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = CodeHead(token_width(encoder), quantizer.codebook_size, quantizer.num_codebooks)
        self._add_clip_head()

    def _predict(
        self, patches: Patches, plan: MaskPlan, step: int, index: Tensor, with_seen: bool
    ) -> tuple[Tensor, Tensor | None]:
        fill = self._noise(patches, step, index) if self.mask_token is None else self.mask_token
        output = self.encoder.infill(patches, self._is_masked(patches, plan), fill, step)
        check_tokens(self.encoder, "infill", output, patches.values, "all patches")
        return take(output, plan.predicted), take(output, plan.seen) if with_seen else None

    @never_compiled  # as the masks
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

    def flops(self, plan: MaskPlan) -> float:
        """Matrix-product operations of a forward and backward pass over a batch (backward counted as twice forward),
        and of the forward pass of a teacher."""
        total = 0.0
        for _, predicted, tokens, clips in clip_sizes(plan):
            one = self.encoder.flops(tokens, tokens) + self.head.flops(predicted) + self._clip_flops()
            total += clips * one
        return 3.0 * total + self._target_flops(plan)
