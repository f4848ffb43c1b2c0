"""From the outputs of an encoder's blocks to features: which layers, how they are joined, frames or one vector a clip.

The names of the options are the same everywhere: ``encoder.encode(...)``, ``bestrq2.embed`` and ``bestrq2.probe``.

Letters: L layers, B clips, T frames, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bestrq2.config import ConfigError
from bestrq2.errors import BestRQError
from bestrq2.layers.padding import length_mask

from .layer_choice import Layer, check_layers

Pooling = Literal["mean", "max", "mean+std"]
Combination = Literal["each", "average", "concatenate"]
RowJoin = Literal["average", "concatenate"]
POOLINGS: tuple[str, ...] = get_args(Pooling)
COMBINATIONS: tuple[str, ...] = get_args(Combination)
ROW_JOINS: tuple[str, ...] = get_args(RowJoin)


def parse_layers(text: str, depth: int, option: str = "--layers") -> list[int | None]:
    """Layers by name: "all" blocks and the final output, the two blocks in the "middle", the "final" output (None); or
    a comma-separated list of block numbers and ``final``.

    An encoder that shows no layers, or a single one, has only its final output in the middle.

    Raises:
        ConfigError: for anything else, or a block that the encoder does not have; it begins with ``option``.
    """
    if text == "all":
        return [*range(depth), None]
    if text == "middle":
        return [depth // 2 - 1, depth // 2] if depth > 1 else [None]
    known = {**{str(number): number for number in range(depth)}, "final": None}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            blocks = f"0..{depth - 1}" if depth else "no blocks in this encoder"
            raise ConfigError(
                f"{option}: expected all, middle, or {blocks} and final separated by commas, got {name!r}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"{option}: {name} is named twice in {text!r}")
    return [known[name] for name in names]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """
    Raises:
        ValueError: if ``value`` is none of ``choices``, naming the option.
    """
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def averaged_rows(encoder: object, rows: str | None) -> str | None:
    """A sentence for users who did not choose (``rows=None``) and whose encoder averages several rows; else None."""
    count = getattr(encoder, "rows", 1)
    if rows is not None or count == 1 or getattr(encoder, "join_rows", "average") != "average":
        return None
    return (
        f"the {count} frequency rows of this encoder are averaged. --rows concatenate keeps them apart, {count} times "
        "as wide, which did better in our comparisons (docs/transfer.md); --rows average says that the mean is meant"
    )


def combine_layers(features: Tensor, combine: str) -> Tensor:
    """Join layers: ``(L, ..., D)`` -> ``(..., D)`` averaged, ``(..., L D)`` concatenated, or unchanged for "each".

    Each frame of each layer is brought to mean 0 and deviation 1 over D before averaging, because the outputs of blocks
    grow with depth; a single layer stays as it is.

    Raises:
        ValueError: for another ``combine``.
    """
    check_choice("combine", combine, COMBINATIONS)
    if combine == "each":
        return features
    if len(features) == 1:
        return features[0]
    if combine == "average":
        return nn.functional.layer_norm(features, features.shape[-1:]).mean(0)
    return torch.cat(tuple(features), -1)


def pool_frames(features: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """Frames to one vector a clip: ``(..., B, T, D)`` with ``lengths (B,)`` valid frames -> ``(..., B, D)``, twice as
    wide for "mean+std" (the deviation over time divides by the number of frames).

    Raises:
        ValueError: for another ``pooling``.
    """
    check_choice("pooling", pooling, POOLINGS)
    lengths = lengths.to(features.device)
    inside = length_mask(lengths, features.shape[-2], features.device)[..., None]
    if pooling == "max":
        return features.masked_fill(~inside, -torch.inf).amax(-2)
    count = lengths.clamp(min=1)[:, None].to(features.dtype)
    mean = torch.where(inside, features, 0).sum(-2) / count
    if pooling == "mean":
        return mean
    spread = torch.where(inside, features - mean[..., None, :], 0).square().sum(-2) / count
    # Of a single frame, or of equal ones, the deviation is 0, where a root has an infinite gradient: it is left out.
    varies = spread > 0
    return torch.cat((mean, torch.where(varies, torch.where(varies, spread, 1).sqrt(), spread)), -1)


class ReadoutMixin:
    """``encode``, and ``forward`` with its defaults, for a class that has ``depth`` and ``encode_layers``.

    Attributes:
        join_rows: how ``encode`` joins the frequency rows of 2-D patches when it is not told.
    """

    depth: Any
    join_rows: RowJoin = "average"

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode while no parameter takes gradients: trainers call ``model.train()`` on everything
        they hold, and dropout, stochastic depth or running statistics would change the features of a frozen encoder."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))  # type: ignore[misc, attr-defined]

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`encode` with its defaults, for hooks, wrappers and other libraries."""
        return self.encode(waveform, lengths)

    def __prepare_scriptable__(self) -> Any:
        """Refuse ``torch.jit.script``, which calls this first: it knows too little of Python for these modules."""
        raise BestRQError(
            "torch.jit.script cannot compile an encoder: take torch.compile, or for one graph without Python "
            "bestrq2.interchange.graphs.trace(encoder) or bestrq2 export ENCODER --torch-export FILE.pt2 "
            "(or --onnx FILE.onnx)"
        )

    def encode(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layer: int | None = None,
        *,
        layers: str | Sequence[int | None] | None = None,
        combine: str = "average",
        rows: str | None = None,
        pooling: str | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Features of whole clips of any length; the same alone and in any batch.

        Args:
            waveform: ``(B, S)`` floating, at ``sampling_rate``.
            lengths: ``(B,)`` valid samples; None: all.
            layer: None for the final, normalised output; 0..depth-1 for the output of a block.
            layers: several of them instead: a list of numbers and None or "final", or a text as in the commands: "all",
                "middle" (the two blocks in the middle), or for example "2,3,final".
            combine: of several layers: "average" (each frame of each layer brought to mean 0 and deviation 1 first),
                "concatenate" (L times as wide), or "each" (stacked in front).
            rows: of 2-D patches, the tokens of one time step are averaged or concatenated ("concatenate", from low to
                high frequency); None: as the encoder's ``join_rows`` says. Strips have one row.
            pooling: None for frames; "mean", "max" or "mean+std" over time for one vector a clip.
            options: of ``encode_layers``.

        Returns:
            features ``(B, T, D)`` float32 (zeros behind a clip's end), ``(B, D)`` with ``pooling``, an L in front with
            "each"; and feature_lengths ``(B,)`` int64 on the CPU, the number of frames either way.

        Raises:
            ValueError: for wrong shapes or lengths, an unknown layer or option, or both ``layer`` and ``layers``.
        """
        if layer is not None and layers is not None:
            raise ValueError("layer and layers: give one of them")
        check_choice("combine", combine, COMBINATIONS)
        if pooling is not None:
            check_choice("pooling", pooling, POOLINGS)
        if layers is None:
            wanted: list[Layer] = [layer]
            combine = "average"  # of one layer: itself
        else:
            chosen = parse_layers(layers, self.depth, "layers") if isinstance(layers, str) else layers
            wanted = check_layers(chosen, self.depth)
        features, counts = self.encode_layers(waveform, lengths, wanted, rows=rows, **options)  # type: ignore[attr-defined]
        features = combine_layers(features, combine)
        if len(wanted) > 1 and combine == "average":  # normalising the zeros behind a clip's end keeps them zeros
            inside = length_mask(counts, features.shape[-2], features.device)
            features = features * inside[..., None]
        if pooling is not None:
            features = pool_frames(features, counts, pooling)
        return features, counts
