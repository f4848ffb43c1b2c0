"""Log-mel spectrogram, batched, on the device of the waveform, independent of padding.

Formula: ``10 log10(max(1e-10, |STFT(x; hann) / sqrt(sum(hann^2))|^2 @ mel))``, the transform of the published BEST-RQ-2
front end (torchaudio ``MelSpectrogram(normalized=True)`` then ``AmplitudeToDB``): centred frames with reflected edges,
power 2, HTK mel scale without area normalisation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bestrq2.errors import BestRQError
from bestrq2.ops.common.devices import exact_device, has_float64

from .log_mel_fused import Settings, fused_log_mel, log_mel_obstacle
from .log_mel_tables import exact_constants
from .padding import length_mask
from .precision import default_device, restore_float32, warn_of_half, warn_of_integers

AMPLITUDE_FLOOR = 1e-10  # -100 dB
FLOOR_DB = -100.0
# Frames are processed in groups of clips whose windowed frames take about this much memory.
GROUP_BYTES = 256 * 2**20


class LogMel(nn.Module):
    """Waveform to log-mel frames in dB, optionally standardised.

    A clip gives the same frames alone and in any padded batch: its edges are reflected at *its own* last sample, and
    the arithmetic runs in float64 (rounded to float32 at the end), so that the order in which a library sums a larger
    batch cannot change a bit that a target code depends on. For a device without float64 (mps) it runs on the CPU.
    Conversions of a model to another dtype leave this module as it is.

    The definition is the plain PyTorch form, :meth:`reference`. Where they can run, fused kernels compute the same in
    float64, frame by frame: in C++ on CPUs, with Triton on NVIDIA GPUs. They have no gradient: a waveform that requires
    one takes the PyTorch form, as do float64 waveforms, sizes of the FFT with other prime factors than 2, 3 and 5, and
    every call under ``ops.use_backend("reference")``.

    Args:
        sampling_rate: samples per second of the input.
        n_fft: FFT size in samples.
        win_length: Hann window in samples, at most ``n_fft``.
        hop_length: samples between frames.
        num_mels: number of bands F.
        f_min, f_max: lowest and highest filter edge in hertz; ``f_max=None`` means half the sampling rate.
        mean, std: if given, frames become ``(dB - mean) / std``; numbers, or one per band.
        floor_db: quieter cells take this level. -100 is the floor of the published front end; a higher one hides the
            noise of codecs and rounding in pauses and empty bands.

    Shapes:
        waveform ``(B, S)`` floating, lengths ``(B,)`` samples (None: all S) -> frames ``(B, T, F)`` float32 with
        ``T = 1 + S // hop_length`` (zeros behind a clip's end), frame_lengths ``(B,)`` int64 on the CPU.

    Raises:
        ValueError: for impossible settings, a waveform that is not ``(B, S)``, or lengths outside ``1..S``.
    """

    window: Tensor
    filters: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 2048,
        win_length: int = 2048,
        hop_length: int = 625,
        num_mels: int = 128,
        f_min: float = 0.0,
        f_max: float | None = None,
        mean: float | Tensor = 0.0,
        std: float | Tensor = 1.0,
        floor_db: float = FLOOR_DB,
    ) -> None:
        super().__init__()
        if sampling_rate < 1:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
        f_max = sampling_rate / 2 if f_max is None else f_max
        if not 0 < win_length <= n_fft or hop_length < 1 or num_mels < 1:
            raise ValueError(
                f"expected 0 < win_length <= n_fft, hop_length >= 1 and num_mels >= 1; "
                f"got win_length={win_length}, n_fft={n_fft}, hop_length={hop_length}, num_mels={num_mels}"
            )
        if not 0 <= f_min < f_max <= sampling_rate / 2:
            raise ValueError(
                f"expected 0 <= f_min < f_max <= {sampling_rate / 2} (half the sampling rate), got {f_min} and {f_max}"
            )
        self.sampling_rate, self.n_fft, self.win_length, self.hop_length = sampling_rate, n_fft, win_length, hop_length
        self.num_mels = num_mels
        self.f_min, self.f_max = f_min, f_max
        device = default_device()
        if not floor_db >= FLOOR_DB:
            raise ValueError(f"floor_db must be at least {FLOOR_DB:g} dB, got {floor_db}")
        self.floor_db = floor_db
        for name, constant in self._constants().items():
            self.register_buffer(name, constant.to(exact_device(device), copy=True), persistent=False)
        for name, value in (("mean", mean), ("std", std)):
            per_band = torch.as_tensor(value, dtype=torch.float32, device="cpu").expand(num_mels).clone()
            self.register_buffer(name, per_band.to(device))
        if not (self.std > 0).all():
            raise ValueError(f"std must be positive, got {std}")

    def _constants(self) -> dict[str, Tensor]:
        window, filters = exact_constants(
            self.n_fft, self.win_length, self.num_mels, self.sampling_rate, self.f_min, self.f_max
        )
        return {"window": window, "filters": filters}

    def restore_constants(self) -> None:
        """Make window and filters again, on their device: they are in no checkpoint, and some loaders leave such
        buffers uninitialised."""
        for name, constant in self._constants().items():
            setattr(self, name, constant.to(exact_device(self.mean.device), copy=True))

    def _apply(self, fn, recurse=True):
        # model.half() or .bfloat16() must not degrade the constants of an exact transform: only the device may change.
        # What no checkpoint has is made again, so that to_empty() leaves nothing uninitialised.
        before = {"mean": self.mean, "std": self.std}
        self._buffers.update(window=None, filters=None)
        super()._apply(fn, recurse)
        restore_float32(self, before)
        self.restore_constants()
        return self

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of ``num_samples`` samples (at least 1 sample)."""
        return 1 + num_samples // self.hop_length

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lengths = check_lengths(waveform, lengths)
        warn_of_half(waveform)
        warn_of_integers(waveform)
        device = waveform.device
        if not has_float64(device):
            frames, counts = self(waveform.cpu(), lengths)
            return frames.to(device), counts
        if log_mel_obstacle(waveform, self.window.device, self.settings) is not None:
            return self.reference(waveform, lengths)
        counts = 1 + lengths // self.hop_length
        return self._fused(waveform, lengths, counts, self.num_frames(waveform.shape[1]), centred=True), counts

    def reference(self, waveform: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The definition of :meth:`forward` in plain PyTorch: differentiable, on every device."""
        lengths = check_lengths(waveform, lengths)
        frame_lengths = 1 + lengths // self.hop_length
        num_clips, num_samples = waveform.shape
        num_frames = self.num_frames(num_samples)
        group = max(1, GROUP_BYTES // (8 * self.n_fft * num_frames))
        parts = [
            self._decibels(waveform[start : start + group], lengths[start : start + group])
            for start in range(0, num_clips, group)
        ]
        decibels = torch.cat(parts) if parts else waveform.new_zeros(0, num_frames, self.num_mels, dtype=torch.float32)
        frames = self._standardised(decibels)
        if num_clips and int(frame_lengths.min()) < num_frames:
            inside = length_mask(frame_lengths, num_frames, frames.device)
            frames = frames * inside[..., None]
        return frames, frame_lengths

    def frames_of(self, padded: Tensor) -> Tensor:
        """Frames of a signal with extended edges: frame t covers samples ``t * hop`` to ``t * hop + n_fft``.

        Shapes: ``(B, n_fft + hop * (T - 1))`` floating -> ``(B, T, F)`` float32, standardised.
        """
        if log_mel_obstacle(padded, self.window.device, self.settings) is not None:
            return self._standardised(self._transform(padded.to(self.window.dtype)))
        num_clips, num_samples = padded.shape
        num_frames = 1 + (num_samples - self.n_fft) // self.hop_length
        lengths, counts = (
            torch.full((num_clips,), size, dtype=torch.int64, device="cpu") for size in (num_samples, num_frames)
        )
        return self._fused(padded, lengths, counts, num_frames, centred=False)

    @property
    def settings(self) -> Settings:
        return Settings(self.n_fft, self.win_length, self.num_mels, self.sampling_rate, self.f_min, self.f_max)

    def _fused(self, waveform: Tensor, lengths: Tensor, counts: Tensor, num_frames: int, centred: bool) -> Tensor:
        mean, std = self._mean_and_std()
        frames = fused_log_mel(
            waveform, lengths, counts, num_frames, centred, self.hop_length, mean, std, self.settings
        )
        if self.floor_db == FLOOR_DB:
            return frames
        inside = length_mask(counts, num_frames, frames.device)
        lowest = (self.floor_db - mean) / std
        return torch.where(inside[..., None], torch.maximum(frames, lowest), 0.0)

    def _standardised(self, decibels: Tensor) -> Tensor:
        if self.floor_db != FLOOR_DB:
            decibels = decibels.clamp(min=self.floor_db)
        mean, std = self._mean_and_std()
        return (decibels - mean) / std

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """On the device of the transform, which is the CPU for a model on a device without float64."""
        return self.mean.to(self.window.device), self.std.to(self.window.device)

    def _decibels(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        left = self.n_fft // 2
        return self._transform(reflect_edges(waveform.to(self.window.dtype), lengths, left, self.n_fft - left))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def _transform(self, padded: Tensor) -> Tensor:
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            self.win_length,
            self.window,
            center=False,
            return_complex=True,
        )
        power = torch.view_as_real(spectrum).square().sum(-1) / self.window.square().sum()
        mel = power.transpose(1, 2) @ self.filters
        return (10.0 * torch.log10(mel.clamp(min=AMPLITUDE_FLOOR))).float()


def check_waveform(waveform: Tensor, num_clips: int | str = "B") -> None:
    """
    Raises:
        TypeError: for anything but a tensor.
        ValueError: if it is not floating ``(num_clips, S)``.
        BestRQError: inside of ``torch.jit.trace`` or ``torch.export``, which would fix the lengths of this batch.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise BestRQError(
            "torch.jit.trace and torch.export cannot follow an encoder's lengths: take "
            "bestrq2.interchange.graphs.trace(encoder), which gives a graph for every batch and length, or the command "
            "bestrq2 export ENCODER --torch-export FILE.pt2 (or --onnx FILE.onnx)"
        )
    if not isinstance(waveform, Tensor):
        raise TypeError(f"expected a waveform tensor ({num_clips}, S), got {type(waveform).__name__}")
    if not waveform.is_floating_point():
        name = str(waveform.dtype).removeprefix("torch.")
        scale = {"int16": "2**15", "int32": "2**31"}.get(name)
        hint = "" if scale is None else f": full scale is 1.0, so divide samples of {name} by {scale}"
        raise ValueError(f"expected a floating waveform ({num_clips}, S), got {waveform.dtype}{hint}")
    if waveform.dim() != 2 or num_clips not in ("B", waveform.shape[0]):
        raise ValueError(f"expected a floating waveform ({num_clips}, S), got {waveform.dtype} {tuple(waveform.shape)}")


def integer_lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """Lengths in samples as int64 on the CPU.

    Raises:
        ValueError: for other numbers: shares of the longest clip, as SpeechBrain counts, would be read as one sample.
    """
    lengths = torch.as_tensor(lengths, device="cpu")
    if lengths.numel() and (lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool):
        hint = "; multiply relative lengths by the number of samples and round" if lengths.is_floating_point() else ""
        raise ValueError(f"expected lengths in samples, integers, got {lengths.dtype}{hint}")
    return lengths.to(torch.int64)


def check_lengths(waveform: Tensor, lengths: Tensor | Sequence[int] | None) -> Tensor:
    """Validate a padded batch and return its lengths in samples as int64 on the CPU.

    Raises:
        ValueError: if ``waveform`` is not floating ``(B, S)``, or a length is no integer or outside ``1..S``.
    """
    check_waveform(waveform)
    num_clips, num_samples = waveform.shape
    if lengths is None:
        lengths = torch.full((num_clips,), num_samples, dtype=torch.int64, device="cpu")
    lengths = integer_lengths(lengths)
    if lengths.shape != (num_clips,):
        raise ValueError(f"expected one length per clip, ({num_clips},), got {tuple(lengths.shape)}")
    if torch.compiler.is_dynamo_compiling():  # here it leaves the graph in any case; fullgraph=True shows this text
        torch._dynamo.graph_break(
            msg="the lengths of clips are values, which no single graph can follow: compile without fullgraph=True, or "
            "compile bestrq2.interchange.graphs.trace(encoder).module(), one graph for every batch and length"
        )
    if num_clips and (int(lengths.min()) < 1 or int(lengths.max()) > num_samples):
        if not num_samples:
            clips = "the clip is" if num_clips == 1 else f"all {num_clips} clips are"
            raise ValueError(f"{clips} empty: expected at least one sample, got a waveform {tuple(waveform.shape)}")
        raise ValueError(f"lengths must lie in 1..{num_samples} samples, got {lengths.tolist()}")
    return lengths


def reflect_edges(waveform: Tensor, lengths: Tensor, pad: int, right: int | None = None) -> Tensor:
    """Extend every clip by ``pad`` reflected samples before it and ``right`` (None: ``pad``) behind it, at its own end
    rather than the batch's.

    ``x0 x1 x2 | 0 0`` with length 3 and pad 2 becomes ``x2 x1 x0 x1 x2 x1 x0 | 0 0``. Reflection repeats for clips
    shorter than ``pad``, as NumPy's ``pad(mode="reflect")`` does.

    Shapes: ``(B, S)``, lengths ``(B,)`` on the CPU -> ``(B, pad + S + right)``.
    """
    num_samples = waveform.shape[1]
    right = pad if right is None else right
    if num_samples > max(pad, right) and bool((lengths == num_samples).all()):
        return torch.nn.functional.pad(waveform, (pad, right), mode="reflect")
    position = torch.arange(-pad, num_samples + right, device=waveform.device)
    length = lengths.to(waveform.device, non_blocking=True)[:, None]
    period = (2 * (length - 1)).clamp(min=1)
    folded = torch.remainder(position, period)
    source = torch.minimum(folded, period - folded).clamp(max=num_samples - 1)
    source = torch.where(length == 1, torch.zeros_like(source), source)
    return waveform.gather(1, source) * (position < length + right)
