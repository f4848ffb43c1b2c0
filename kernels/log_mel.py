"""Log-mel frames on GPUs: cuFFT in float64 between two kernels, in groups of a fixed number of frames.

    waveform (B, S) --window_frames--> (GROUP, n_fft) --rfft--> (GROUP, n_fft / 2 + 1) --mel_decibels--> out (B, T, F)
                     reflected edges                             power, filters, 10 log10, (dB - mean) / std

Frames are numbered through the whole batch and every FFT call has GROUP of them, the last one with unused
frames: always the same cuFFT plan, so that the bits of a frame do not depend on its batch. mel_decibels multiplies the
power of a block of frames by a dense block of the filters: 8 neighbouring bands see few bins. The elements
of a product are summed in one order, whatever their row.

Bytes of a frame, in memory or the L2 cache: 4 hop read, 8 n_fft written and read, again 8 n_fft written and read, 4 F
written. 256 clips of 10 s at n_fft 2048 and hop 625: 65,792 frames, 4.3 GB, 1.4 ms at 3 TB/s.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import CompileCase
from .integers import ceil_div, power_of_2

# Frames of a group, 16 n_fft bytes of memory for each. A batch of one short clip costs a whole FFT call.
GROUP = 8192
SAMPLES = 1024  # of a frame at a time


class Tile(NamedTuple):
    """Block of mel_decibels: frames and bands of a program, bins at a time."""

    frames: int = 32
    bands: int = 8
    bins: int = 32
    num_warps: int = 4
    num_stages: int = 3


TILE = Tile()
PER_NEPER = tl.constexpr(4.3429448190325182765)  # decibels: 10 / log(10)


@triton.jit(do_not_specialize=["stride", "first", "frames", "begin", "hop"])
def window_frames(
    waveform_ptr, stride, lengths_ptr, window_ptr, window_length, out_ptr, n_fft, first, frames, begin, hop,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    frame = first + row
    clip, time = frame // frames, frame % frames
    length = tl.load(lengths_ptr + clip)
    period = tl.maximum(2 * (length - 1), 1)
    x_ptr = waveform_ptr + clip.to(tl.int64) * stride
    out_ptr += row.to(tl.int64) * n_fft
    start = begin + time.to(tl.int64) * hop
    whole = (start >= 0) & (start + window_length <= length)
    for block in range(0, n_fft, BLOCK):
        n = block + tl.arange(0, BLOCK)
        source = start + n
        if not whole:  # reflected at the edges; frames behind a clip's end read anything inside it
            folded = source % period  # C's remainder: between -period and period
            folded = tl.where(folded < 0, folded + period, folded)
            source = tl.minimum(folded, period - folded)
        inside = n < window_length
        sample = tl.load(x_ptr + source, mask=inside, other=0.0)
        weight = tl.load(window_ptr + n, mask=inside, other=0.0)
        tl.store(out_ptr + n, sample.to(tl.float64) * weight, mask=n < n_fft)


@triton.jit(do_not_specialize=["first", "last", "frames"])
def mel_decibels(
    spectrum_ptr, filters_ptr, edges_ptr, mean_ptr, std_ptr, counts_ptr, out_ptr, spectrum_stride, first, last,
    frames, bands, FRAMES: tl.constexpr, BANDS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)  # the upper bands have the widest filters: their programs start first
    low, high = tl.load(edges_ptr + 2 * block), tl.load(edges_ptr + 2 * block + 1)
    band = block * BANDS + tl.arange(0, BANDS)
    row = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    frame = first + row
    valid = frame < last
    # Real and imaginary parts alternate: 16 bytes, which one thread loads at once.
    part = tl.arange(0, 2 * BINS)
    place = 2 * (row.to(tl.int64) * spectrum_stride)[:, None] + part[None, :]
    weight_place = tl.arange(0, BINS)[:, None] * (blocks * BANDS) + band[None, :]
    mel = tl.zeros((FRAMES, BANDS), dtype=tl.float64)
    for k in range(low, high, BINS):
        inside = valid[:, None] & (part // 2 < high - k)[None, :]
        amplitude = tl.load(spectrum_ptr + 2 * k + place, mask=inside, other=0.0)
        power = tl.sum(tl.reshape(amplitude * amplitude, (FRAMES, BINS, 2)), axis=2)
        weight = tl.load(filters_ptr + k * (blocks * BANDS) + weight_place)
        mel = tl.dot(power, weight, mel, out_dtype=tl.float64)
    level = tl.log(tl.where(mel < 1e-10, 1e-10, mel)) * PER_NEPER  # NaN stays NaN
    present = band < bands
    mean = tl.load(mean_ptr + band, mask=present, other=0.0)
    std = tl.load(std_ptr + band, mask=present, other=1.0)
    value = tl.div_rn(level.to(tl.float32) - mean[None, :], tl.broadcast_to(std[None, :], (FRAMES, BANDS)))
    count = tl.load(counts_ptr + frame // frames, mask=valid, other=0)
    value = tl.where((frame % frames < count)[:, None], value, 0.0)
    out_ptr += (frame.to(tl.int64) * bands)[:, None]
    tl.store(out_ptr + band[None, :], value, mask=valid[:, None] & present[None, :])


def log_mel(
    waveform: Tensor,
    lengths: Tensor,
    counts: Tensor,
    num_frames: int,
    begin: int,
    hop: int,
    n_fft: int,
    window: Tensor,
    filters: Tensor,
    edges: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Frames ``(B, T, F)`` of ``waveform (B, S)`` fp32; see csrc/log_mel/log_mel.h for the other arguments.

    All tensors lie on the device of the waveform; ``window`` is a table of bestrq2.layers, ``filters`` and ``edges``
    are its blocks for this module's TILE.
    """
    num_clips, bands, device = waveform.shape[0], mean.shape[0], waveform.device
    out = torch.empty(num_clips, num_frames, bands, device=device, dtype=torch.float32)
    total = num_clips * num_frames
    if total == 0:
        return out
    with torch.cuda.device(device if device.type == "cuda" else -1):
        # Rows that no kernel ever writes are transformed, too.
        framed = (torch.zeros if total < GROUP else torch.empty)(GROUP, n_fft, dtype=torch.float64, device=device)
        for first in range(0, total, GROUP):
            rows = min(GROUP, total - first)
            window_frames[(rows,)](
                waveform, waveform.stride(0), lengths, window, window.shape[0], framed, n_fft, first, num_frames,
                begin, hop, BLOCK=min(SAMPLES, power_of_2(n_fft)),
            )  # fmt: skip
            spectrum = torch.view_as_real(torch.fft.rfft(framed))
            mel_decibels[(edges.shape[0], ceil_div(rows, TILE.frames))](
                spectrum, filters, edges, mean, std, counts, out, spectrum.stride(0) // 2, first, first + rows,
                num_frames, bands, FRAMES=TILE.frames, BANDS=TILE.bands, BINS=TILE.bins, num_warps=TILE.num_warps,
                num_stages=TILE.num_stages,
            )  # fmt: skip
            del spectrum  # the next group takes the same memory, part of which is still in the L2 cache
    return out


def compile_cases() -> list[CompileCase]:
    """Both kernels as the published front end launches them, ahead of time."""
    integers = ("stride", "window_length", "n_fft", "first", "frames", "begin", "hop")
    pointers = ("waveform_ptr", "lengths_ptr", "window_ptr", "out_ptr")
    window = CompileCase(
        "window_frames",
        window_frames,
        {"waveform_ptr": "*fp32", "lengths_ptr": "*i64", "window_ptr": "*fp64", "out_ptr": "*fp64"}
        | dict.fromkeys(integers, "i32"),
        {"BLOCK": SAMPLES},
        divisible_by_16=(*pointers, "n_fft", "window_length"),
    )
    inputs = ("spectrum_ptr", "filters_ptr", "edges_ptr", "counts_ptr", "mean_ptr", "std_ptr", "out_ptr")
    types = ("*fp64", "*fp64", "*i32", "*i64", "*fp32", "*fp32", "*fp32")
    decibels = CompileCase(
        "mel_decibels",
        mel_decibels,
        dict(zip(inputs, types)) | dict.fromkeys(("spectrum_stride", "first", "last", "frames", "bands"), "i32"),
        {"FRAMES": TILE.frames, "BANDS": TILE.bands, "BINS": TILE.bins},
        num_warps=TILE.num_warps,
        num_stages=TILE.num_stages,
        divisible_by_16=(*inputs, "bands"),
    )
    return [window, decibels]
