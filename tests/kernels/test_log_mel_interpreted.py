"""The Triton kernels of log-mel in the interpreter, against the plain PyTorch form, and compiled for absent GPUs."""

import pytest
import torch

pytest.importorskip("triton")

from bestrq2.kernels import log_mel as kernel
from bestrq2.kernels.aot import ARCHITECTURES, compile_for
from interpreter import INTERPRETED, run_interpreted

from bestrq2.layers import LogMel

# Several blocks of bands and several tiles of bins in one; a last block that is not full, bands without a bin.
SETTINGS = [(256, 256, 40, 20), (40, 29, 20, 13)]


def test_run_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    assert f"{len(SETTINGS)} passed" in run_interpreted(__file__, "-k", "pytorch_form")


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
@pytest.mark.parametrize(("n_fft", "win_length", "hop_length", "num_mels"), SETTINGS)
def test_the_pytorch_form(monkeypatch, device, n_fft, win_length, hop_length, num_mels):
    monkeypatch.setattr(kernel, "GROUP", 24)  # several groups, the last one not full, nor their tiles of frames
    log_mel = LogMel(
        n_fft=n_fft, win_length=win_length, hop_length=hop_length, num_mels=num_mels, mean=-40.0, std=13.0
    ).to(device)
    waveform = 0.1 * torch.randn(5, 500, device=device)
    waveform[4] = 0.0
    if win_length == n_fft:  # in the PyTorch form a NaN outside a short window spoils the frame, too
        waveform[0, 100] = float("nan")
    lengths = torch.tensor([500, 301, 3, 1, 60])
    expected, counts = log_mel.reference(waveform, lengths)
    frames, _ = log_mel(waveform, lengths)
    torch.testing.assert_close(frames, expected, atol=2e-6, rtol=0, equal_nan=True)
    for clip, length in enumerate(lengths.tolist()):
        alone, _ = log_mel(waveform[clip : clip + 1, :length])
        torch.testing.assert_close(alone[0], frames[clip, : counts[clip]], atol=0, rtol=0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda n: f"sm_{n}")
@pytest.mark.parametrize("case", kernel.compile_cases(), ids=lambda case: case.name)
def test_compiles_without_spills(case, architecture):
    assert compile_for(case, architecture).spill_bytes == 0
