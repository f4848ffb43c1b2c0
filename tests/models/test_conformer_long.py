"""Long audio: memory stays linear in time. Peak memory is that of a process of its own."""

import subprocess
import sys

import pytest

from bestrq2.ops.common import native

PROGRAM = """
import resource, torch
from bestrq2.layers.conformer import ConformerSettings
from bestrq2.layers.log_mel import LogMel
from bestrq2.models import ConformerEncoder
from bestrq2.ops import ChunkLayout

torch.set_num_threads(1)
front = LogMel(n_fft=512, win_length=400, hop_length=160, num_mels=32)
settings = ConformerSettings(32, {depth}, 1, 64, 7, conv_mode="chunk")
encoder = ConformerEncoder(front, settings, (4, 4), {layout}).eval()
waveform = torch.rand(1, {seconds} * 16000) - 0.5
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.inference_mode():
    features, counts = encoder.encode(waveform)
assert torch.isfinite(features).all() and features[0].std(0).min() > 0
print(features.shape[1], before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure(**options) -> tuple[int, float, float]:
    """Frames, and peak memory before and after encoding in GB."""
    program = PROGRAM.format(**options)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    frames, before, after = map(int, result.stdout.split())
    print(f"{frames} frames: {before / 1e6:.2f} GB before, {after / 1e6:.2f} GB after")
    return frames, before / 1e6, after / 1e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux only")
def test_two_hours_in_chunks_need_less_than_4_gb():
    frames, _, peak = measure(depth=1, layout="ChunkLayout(16, 64)", seconds=7200)
    assert frames == 180000
    assert peak < 4


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux only")
@pytest.mark.skipif(native.extension_obstacle() is not None, reason="the reference backend stores all scores")
def test_ten_minutes_of_full_context_store_no_score_matrix():
    frames, before, after = measure(depth=1, layout="ChunkLayout()", seconds=600)
    assert frames == 15000
    assert after - before < 0.4  # one T x T matrix of scores alone is 0.9 GB
