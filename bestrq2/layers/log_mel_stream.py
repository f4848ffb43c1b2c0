"""Log-mel frames of a waveform that arrives in pieces: the frames of the whole clip, whatever the pieces."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .log_mel import LogMel, reflect_edges
from .padding import length_mask
from .precision import warn_of_half

GOES_ON = -1


@dataclass
class LogMelState:
    """State of the front end between pieces.

    Every clip is followed by its own reflected edge, which is appended as if it were audio when the clip ends; so all
    clips of a batch advance together however their ends differ.

    Attributes:
        signal: ``(B, W)`` the last samples; column 0 is sample ``start`` (negative: the reflected left edge).
        reflection: ``(B, n_fft - n_fft // 2)`` right edge of the clips that have ended.
        totals: ``(B,)`` int64 on the CPU, samples of the clips that have ended, -1 for those that go on.
        start, received, next_frame: positions in samples, samples, frames.
    """

    signal: Tensor
    reflection: Tensor
    totals: Tensor
    start: int = 0
    received: int = 0
    next_frame: int = 0

    @classmethod
    def begin(cls, log_mel: LogMel, num_clips: int) -> "LogMelState":
        device = log_mel.window.device
        signal = torch.zeros(num_clips, 0, device=device, dtype=torch.float32)
        reflection = torch.zeros(num_clips, log_mel.n_fft - log_mel.n_fft // 2, device=device, dtype=torch.float32)
        return cls(signal, reflection, torch.full((num_clips,), GOES_ON, dtype=torch.int64, device="cpu"))

    @property
    def over(self) -> bool:
        return bool((self.totals != GOES_ON).all())


def stream_frames(
    log_mel: LogMel, state: LogMelState, waveform: Tensor, lengths: Tensor, ends: Tensor, silence: Tensor
) -> Tensor:
    """Take in a piece and return the frames that are complete now.

    Args:
        log_mel: the transform of whole clips.
        state: updated in place.
        waveform: ``(B, S)`` next samples.
        lengths: ``(B,)`` valid samples of the piece, on the CPU; what follows them is ignored.
        ends: ``(B,)`` bool on the CPU, clips that end with this piece (those that ended earlier ignore it).
        silence: ``(B,)`` zero samples that belong to an ending clip behind its last sample.

    Returns:
        ``(B, T, F)`` float32, T >= 0 frames from ``state.next_frame`` (as it was) on; zeros behind a clip's end.
    """
    pad, hop = log_mel.n_fft // 2, log_mel.hop_length
    right = log_mel.n_fft - pad
    device, place = waveform.device, log_mel.window.device  # of the transform: the CPU for devices without float64
    warn_of_half(waveform)
    waveform = waveform.to(place)
    state.signal, state.reflection = state.signal.to(place), state.reflection.to(place)
    before = state.received
    inside = length_mask(lengths, waveform.shape[1], waveform.device)
    state.signal = torch.cat((state.signal, torch.where(inside, waveform, 0).to(state.signal.dtype)), dim=1)
    state.received += waveform.shape[1]
    fresh = ends & (state.totals == GOES_ON)
    for clip in fresh.nonzero().flatten().tolist():
        total = before + int(lengths[clip]) + int(silence[clip])
        state.totals[clip] = total
        first = max(0, state.start)
        known = state.signal[clip : clip + 1, first - state.start : total - state.start]
        known = F.pad(known, (0, total - first - known.shape[1]))
        size = torch.tensor([known.shape[1]], device="cpu")
        state.reflection[clip] = reflect_edges(known, size, pad, right)[0, -right:]
        _write(state, clip, before + int(lengths[clip]))
    for clip in ((state.totals != GOES_ON) & ~fresh).nonzero().flatten().tolist():
        _write(state, clip, before)
    last = int(state.totals.max())
    if state.over and last + right > state.received:
        before, state.received = state.received, last + right
        state.signal = F.pad(state.signal, (0, state.received - before))
        for clip in range(len(state.totals)):
            _write(state, clip, before)
    if state.start == 0 and state.next_frame == 0:
        if not state.over and state.received <= pad:
            return state.signal.new_zeros(len(state.totals), 0, log_mel.num_mels).to(device)
        known_lengths = torch.where(state.totals == GOES_ON, state.received, state.totals)
        left = reflect_edges(state.signal, known_lengths, pad)[:, :pad]
        state.signal, state.start = torch.cat((left, state.signal), dim=1), -pad

    end = (state.received + pad - log_mel.n_fft) // hop + 1  # frames whose whole window has arrived
    if state.over:
        end = min(end, last // hop + 1)
    first, state.next_frame = state.next_frame, max(end, state.next_frame)
    count = state.next_frame - first
    if count:
        begin = first * hop - pad - state.start
        frames = log_mel.frames_of(state.signal[:, begin : begin + (count - 1) * hop + log_mel.n_fft])
        number = torch.arange(first, state.next_frame, device=frames.device)
        limit = torch.where(state.totals == GOES_ON, state.next_frame, state.totals // hop).to(frames.device)
        frames = frames * (number <= limit[:, None])[..., None]
    else:
        frames = state.signal.new_zeros(len(state.totals), 0, log_mel.num_mels)
    # Later frames need their windows, a later end its last n_fft / 2 + 1 samples to reflect.
    keep = min(state.next_frame * hop - pad, state.received - right - 1)
    if keep > state.start:
        state.signal, state.start = state.signal[:, keep - state.start :].clone(), keep
    return frames.to(device)


def _write(state: LogMelState, clip: int, position: int) -> None:
    """Fill the columns of an ended clip from sample ``position`` on: silence to its end, reflected edge, zeros."""
    total = int(state.totals[clip])
    state.signal[clip, position - state.start :] = 0
    column = max(position, total) - state.start
    edge = state.reflection[clip, max(0, position - total) :][: max(0, state.signal.shape[1] - column)]
    state.signal[clip, column : column + len(edge)] = edge
