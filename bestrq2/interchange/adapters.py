"""Adapters that give other encoders our ``encode``: clips one by one or in safe groups, long ones in windows."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bestrq2.config import ConfigError
from bestrq2.hardware import device_of
from bestrq2.layers.log_mel import check_lengths
from bestrq2.layers.precision import warn_of_half
from bestrq2.models.layer_choice import check_layers
from bestrq2.models.readout import ROW_JOINS, ReadoutMixin, check_choice

WINDOWS_AT_ONCE = 16
INTERFACE = ("encode", "sampling_rate", "output_dim", "hop_size_in_ms")


class AudioEncoder(Protocol):
    """Result of :func:`bestrq2.interchange.open_encoder`: our own encoders, or an adapter around another one.

    Attributes:
        sampling_rate: Hz of the input.
        output_dim: D.
        hop_size_in_ms: between frames; frame i covers the time from ``i * hop`` to ``(i + 1) * hop``.
        depth: layers that can be asked for, 0 if the encoder shows none.
    """

    sampling_rate: int
    output_dim: int
    hop_size_in_ms: float

    @property
    def depth(self) -> int: ...

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
    ) -> tuple[Tensor, Tensor]:
        """``(B, S)``, ``(B,)`` samples -> features ``(B, T, D)`` float32 and ``(B,)`` int64 frames on the CPU; for the
        options see :class:`~bestrq2.models.readout.ReadoutMixin`."""

    def encode_layers(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layers: Sequence[int | None] | None = None,
        *,
        rows: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same for several layers in one pass: ``(L, B, T, D)``."""


@dataclass(frozen=True)
class Window:
    """A piece of a clip that goes through a model by itself.

    Attributes:
        clip: number in the batch.
        begin, end: samples of the clip.
        first: frame of the clip at which its kept frames go.
        skip: frames at its start that the window before has given already.
        keep: frames to keep after them; None: all.
    """

    clip: int
    begin: int
    end: int
    first: int
    skip: int = 0
    keep: int | None = None


def cut_windows(lengths: Sequence[int], hop: float, frames: int, context: int) -> list[Window]:
    """Windows of ``frames`` frames of ``hop`` samples, and ``context`` samples behind them where the clip goes on.

    Like our own encoders' windows: consecutive, and the last one reaches back over the one before, so that it is as
    long as the others.
    """
    windows = []
    for clip, length in enumerate(lengths):
        if length <= frames * hop + context:
            windows.append(Window(clip, 0, length, 0))
            continue
        start = 0
        while (start + frames) * hop + context < length:
            begin = round(start * hop)
            windows.append(Window(clip, begin, round((start + frames) * hop) + context, start, 0, frames))
            start += frames
        # At least one more frame, or the audio behind it, remains.
        back = max(0, min(start, math.ceil(length / hop) - frames))
        windows.append(Window(clip, round(back * hop), length, start, start - back))
    return windows


class ForeignEncoder(ReadoutMixin, nn.Module, ABC):
    """An encoder of others behind our interface, frozen and in evaluation mode.

    A subclass says how a group of clips goes through its model (:meth:`_run`). Clips shorter than ``min_samples`` are
    extended with silence; clips longer than a window are cut as :func:`cut_windows` says.

    Attributes:
        sampling_rate, output_dim, hop_size_in_ms, depth: see :class:`AudioEncoder`.
        min_samples: of the shortest clip that the model is given.
        window_frames: frames of a window; None: clips are never cut.
        context_samples: audio behind a window's frames that it sees as well.
        group: "single" (a model that takes no lengths, or mixes clips), "equal" (clips of one length together) or
            "masked" (any clips together, with the model's own mask).
    """

    sampling_rate: int
    output_dim: int
    hop_size_in_ms: float
    depth: int = 0
    min_samples: int = 1
    window_frames: int | None = None
    context_samples: int = 0
    group: str = "single"

    def train(self, mode: bool = True) -> "ForeignEncoder":
        """Stay in evaluation mode: trainers call ``model.train()`` on everything they hold."""
        return super().train(False)

    @property
    def hop_samples(self) -> float:
        return self.hop_size_in_ms * self.sampling_rate / 1000

    @abstractmethod
    def _run(self, clips: list[Tensor], wanted: list[int | None]) -> list[Tensor]:
        """Waveforms ``(S,)`` that may go together -> features ``(L, T, D)`` of each."""

    @torch.no_grad()
    def encode_layers(
        self,
        waveform: Tensor,
        lengths: Tensor | None = None,
        layers: Sequence[int | None] | None = None,
        *,
        rows: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features of several layers; see :class:`AudioEncoder`. ``layers``: as for our own encoders. ``rows`` has no
        effect: encoders of others give one vector a time step.

        Raises:
            ValueError: for wrong shapes or lengths, or an unknown layer.
        """
        check_choice("rows", rows or self.join_rows, ROW_JOINS)
        ends = check_lengths(waveform, lengths).tolist()
        wanted: list[Any] = list(check_layers(layers, self.depth))
        warn_of_half(waveform)
        clips = [clip[:end].float() for clip, end in zip(waveform, ends)]
        clips = [nn.functional.pad(clip, (0, max(0, self.min_samples - len(clip)))) for clip in clips]
        samples = [len(clip) for clip in clips]
        if self.window_frames is None:
            windows = [Window(number, 0, length, 0) for number, length in enumerate(samples)]
        else:
            windows = cut_windows(samples, self.hop_samples, self.window_frames, self.context_samples)
        pieces: dict[int, Tensor] = {}
        for group in self._groups(windows):
            with torch.autocast(waveform.device.type, enabled=False):
                found = self._run([clips[windows[n].clip][windows[n].begin : windows[n].end] for n in group], wanted)
            pieces.update(zip(group, found))
        of_clip: list[list[Tensor]] = [[] for _ in clips]
        for number, window in enumerate(windows):
            piece, end = pieces[number], None if window.keep is None else window.skip + window.keep
            if end is not None and piece.shape[1] < end:
                raise ConfigError(
                    f"the encoder gave {piece.shape[1]} frames for a window of {end} frames of {self.hop_size_in_ms} ms"
                )
            of_clip[window.clip].append(piece[:, window.skip : end].float())
        joined = [torch.cat(row, dim=1) for row in of_clip]
        counts = torch.tensor([row.shape[1] for row in joined], dtype=torch.int64, device="cpu")
        longest = int(counts.max()) if len(counts) else 0
        features = waveform.new_zeros(len(wanted), len(joined), longest, self.output_dim, dtype=torch.float32)
        for number, row in enumerate(joined):
            features[:, number, : row.shape[1]] = row
        return features, counts

    def _groups(self, windows: list[Window]) -> list[list[int]]:
        """Numbers of the windows that go through the model together."""
        if self.group == "single":
            return [[number] for number in range(len(windows))]
        order = sorted(range(len(windows)), key=lambda n: windows[n].end - windows[n].begin)
        groups: list[list[int]] = []
        for number in order:
            size = windows[number].end - windows[number].begin
            last = groups[-1] if groups else []
            fits = bool(last) and len(last) < WINDOWS_AT_ONCE
            if fits and (self.group == "masked" or windows[last[0]].end - windows[last[0]].begin == size):
                last.append(number)
            else:
                groups.append([number])
        return groups


class ModuleAdapter(ForeignEncoder):
    """A module with our ``encode``, or an X-ARES encoder, which takes audio alone. One clip at a time.

    Args:
        encoder: the module; its ``sampling_rate``, ``output_dim`` and ``hop_size_in_ms`` are taken over.
        origin: named in errors.
        code: digest of the file that defines it, where known: other code gives other features of the same weights.

    Raises:
        ConfigError: if part of the interface is missing, or features have another shape or rate than it says.
    """

    def __init__(self, encoder: Any, origin: str, code: str = "") -> None:
        super().__init__()
        self.code = code
        if not isinstance(encoder, nn.Module):
            raise ConfigError(f"{origin}: expected a torch.nn.Module, got {type(encoder).__name__}")
        self.xares = not hasattr(encoder, "encode")
        missing = [name for name in INTERFACE if not hasattr(encoder, name) and not (self.xares and name == "encode")]
        if missing or (self.xares and type(encoder).forward is nn.Module.forward):
            raise ConfigError(
                f"{origin}: the encoder has no {', '.join(['encode', *missing] if self.xares else missing)}"
            )
        self.encoder: Any = encoder
        self.sampling_rate, self.output_dim = int(encoder.sampling_rate), int(encoder.output_dim)  # type: ignore[arg-type]
        self.hop_size_in_ms = float(encoder.hop_size_in_ms)  # type: ignore[arg-type]
        self.depth = int(getattr(encoder, "depth", 0)) if hasattr(encoder, "encode_layers") else 0
        self.eval().requires_grad_(False)
        check_declared(self, origin)

    def _run(self, clips: list[Tensor], wanted: list[int | None]) -> list[Tensor]:
        try:
            return self._features(clips, wanted)
        except RuntimeError as error:
            kinds = {str(p.dtype) for p in self.parameters() if p.is_floating_point()} - {"torch.float32"}
            if not kinds or not re.search("must have the same dtype|expected scalar type", str(error)):
                raise
            raise ConfigError(
                f"the encoder has weights in {', '.join(sorted(kinds))} and does not take audio in float32 ({error}); "
                "convert it with .float(), or let its encode convert the audio"
            ) from error

    def _features(self, clips: list[Tensor], wanted: list[int | None]) -> list[Tensor]:
        (clip,) = clips
        if self.xares:
            features = self._shaped(self.encoder(clip[None]))
            return [torch.stack([features[0]] * len(wanted))]
        length = torch.tensor([len(clip)], device="cpu")
        if wanted != [None] * len(wanted):
            features, counts = self.encoder.encode_layers(clip[None], length, wanted)
            return [features[:, 0, : int(counts[0])]]
        given = self.encoder.encode(clip[None], length)
        if not isinstance(given, tuple | list) or len(given) != 2:
            what = (
                f"{type(given).__name__} of {len(given)}" if isinstance(given, tuple | list) else type(given).__name__
            )
            raise TypeError(f"expected encode to return (features, lengths), got {what}")
        features, counts = self._shaped(given[0]), given[1]
        return [torch.stack([features[0, : int(counts[0])]] * len(wanted))]

    def _shaped(self, features: Tensor) -> Tensor:
        if features.dim() != 3 or features.shape[::2] != (1, self.output_dim):
            expected = f"(1, frames, output_dim = {self.output_dim})"
            raise ValueError(f"expected features {expected} of one clip, got {tuple(features.shape)}")
        return features


def check_declared(encoder: ForeignEncoder, origin: str) -> None:
    """Compare what an encoder says of itself with what it gives for 1, 3 and 9 seconds of noise: a rate that is off by
    a few frames in a thousand is another place after a minute. One that takes short clips alone is not asked for 9.

    Raises:
        ConfigError: for features of another shape, not finite, or at another rate.
    """
    rate, hop = encoder.sampling_rate, encoder.hop_size_in_ms / 1000
    device = device_of(encoder)
    noise = 0.1 * torch.randn(
        1, 9 * rate, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    counts = []
    for seconds in (1, 3, 9):
        try:
            features, frames = encoder.encode(noise[:, : seconds * rate].to(device))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if seconds == 9:
                break
            raise ConfigError(f"{origin}: the encoder fails on {seconds} s of noise: {error}") from error
        if not features.isfinite().all():
            raise ConfigError(f"{origin}: the encoder's features are not finite for {seconds} s of noise")
        counts.append(int(frames[0]))
    for more, count in zip((2, 8), counts[1:]):
        if abs((count - counts[0]) * hop - more) > hop + 1e-6:
            raise ConfigError(
                f"{origin}: hop_size_in_ms is {encoder.hop_size_in_ms:g}, but {more} more seconds of audio give "
                f"{count - counts[0]} more frames, expected about {more / hop:.0f}"
            )
