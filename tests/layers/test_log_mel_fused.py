"""The fused log-mel kernels against the plain PyTorch form of LogMel, bit for bit wherever a frame may come from."""

import pytest
import torch

from bestrq2 import ops
from bestrq2.data import load_audio, tiny_dataset
from bestrq2.layers import LogMel, RandomProjectionQuantizer, extract_patches
from bestrq2.layers.log_mel_fused import log_mel_obstacle
from bestrq2.layers.log_mel_tables import passes, tables
from bestrq2.ops.common import native

needs_extension = pytest.mark.skipif(native.extension_obstacle() is not None, reason="the C++ extension is not built")
PUBLISHED = {"n_fft": 2048, "win_length": 2048, "hop_length": 625, "num_mels": 128}
STRIPS = {"n_fft": 1024, "win_length": 400, "hop_length": 160, "num_mels": 128}
# One rounding of float64 decibels to float32, |dB| < 128: half a unit in the last place either way.
LAST_BIT = 8e-6


@pytest.fixture
def isa():
    extension = native.extension()
    before = extension.isa()
    yield extension.force_isa
    extension.force_isa(before)


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    waveform = 0.1 * torch.randn(6, 6000)
    waveform[5] = 0.0
    return waveform, torch.tensor([6000, 3001, 642, 3, 1, 900])


@needs_extension
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("n_fft", "win_length", "hop_length", "num_mels"),
    [
        (2048, 2048, 625, 128),
        (1024, 400, 160, 80),
        (400, 400, 160, 80),
        (480, 479, 160, 40),
        (36, 30, 7, 8),
        (16, 16, 5, 4),
        (4, 3, 2, 2),
    ],
)
def test_every_instruction_set_computes_the_pytorch_form(isa, name, n_fft, win_length, hop_length, num_mels):
    if not isa(name):
        pytest.skip(f"this processor or build has no {name}")
    log_mel = LogMel(n_fft=n_fft, win_length=win_length, hop_length=hop_length, num_mels=num_mels)
    waveform, lengths = ragged()
    assert log_mel_obstacle(waveform, log_mel.mean.device, log_mel.settings) is None
    expected, expected_counts = log_mel.reference(waveform, lengths)
    frames, counts = log_mel(waveform, lengths)
    torch.testing.assert_close(frames, expected, atol=LAST_BIT, rtol=0)
    assert torch.equal(counts, expected_counts)
    assert (frames == expected).float().mean() > 0.999
    assert (frames[5, : counts[5]] == -100).all()


@needs_extension
@pytest.mark.parametrize("settings", [PUBLISHED, STRIPS], ids=["published", "strips"])
def test_frames_do_not_depend_on_batch_order_or_threads(settings):
    log_mel = LogMel(**settings, mean=-40.0, std=13.0)
    waveform, lengths = ragged()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        frames, counts = log_mel(waveform, lengths)
        torch.set_num_threads(3)
        assert torch.equal(log_mel(waveform, lengths)[0], frames)
        assert torch.equal(log_mel(waveform.flip(0), lengths.flip(0))[0].flip(0), frames)
        assert torch.equal(log_mel(waveform.T.contiguous().T, lengths)[0], frames)
    finally:
        torch.set_num_threads(threads)
    for clip, length in enumerate(lengths.tolist()):
        alone, _ = log_mel(waveform[clip : clip + 1, :length])
        assert torch.equal(alone[0], frames[clip, : counts[clip]])
        assert not frames[clip, counts[clip] :].any()
    padded = torch.nn.functional.pad(waveform[:1], (settings["n_fft"] // 2,) * 2, mode="reflect")
    assert torch.equal(log_mel.frames_of(padded)[0], frames[0])


@needs_extension
@pytest.mark.parametrize(("settings", "patch"), [(PUBLISHED, (16, 16)), (STRIPS, (128, 4))], ids=["2.0", "2.1"])
def test_codes_of_the_packaged_clips_are_those_of_the_pytorch_form(settings, patch):
    """And they do not change more often than those of a transform in float32, as torchaudio computes it."""
    log_mel = LogMel(**settings, mean=-40.0, std=13.0)
    quantizer = RandomProjectionQuantizer(patch[0] * patch[1], seed=3)
    count = changed = changed_in_float32 = cells = 0
    for file in tiny_dataset():
        clip = torch.from_numpy(load_audio(file.path))[None]
        exact, counts = log_mel.reference(clip)
        frames, _ = log_mel(clip)
        torch.testing.assert_close(frames, exact, atol=LAST_BIT, rtol=0)
        rounded = float32_log_mel(clip, log_mel)
        cells += int((13 * (rounded - exact)).abs().gt(1e-4).sum())
        codes, ours, theirs = (quantizer(extract_patches(x, counts, *patch).values) for x in (exact, frames, rounded))
        count += codes.numel()
        changed += int((ours != codes).sum())
        changed_in_float32 += int((theirs != codes).sum())
    print(f"{count} codes: {changed} changed, {changed_in_float32} in float32; {cells} cells off by more than 1e-4 dB")
    assert changed == 0
    assert cells > 0, "float32 is as good: then the kernels need no float64"


def float32_log_mel(clip: torch.Tensor, log_mel: LogMel) -> torch.Tensor:
    """torchaudio's ``MelSpectrogram(normalized=True)`` and ``AmplitudeToDB()`` in float32, standardised."""
    window = log_mel.window.float()
    arguments = {"hop_length": log_mel.hop_length, "win_length": log_mel.win_length, "window": window}
    spectrum = torch.stft(clip, log_mel.n_fft, **arguments, center=True, pad_mode="reflect", return_complex=True)
    power = (spectrum / window.square().sum().sqrt()).abs().square()
    mel = power.transpose(1, 2) @ log_mel.filters.float()
    return (10.0 * torch.log10(mel.clamp(min=1e-10)) - log_mel.mean) / log_mel.std


@needs_extension
def test_a_waveform_that_requires_a_gradient_takes_the_pytorch_form():
    log_mel = LogMel(**STRIPS)
    waveform = ragged()[0][:1].requires_grad_()
    frames, _ = log_mel(waveform)
    frames.sum().backward()
    assert waveform.grad is not None
    assert waveform.grad.isfinite().all()
    assert waveform.grad.any()
    with torch.no_grad():
        torch.testing.assert_close(log_mel(waveform)[0], frames, atol=LAST_BIT, rtol=0)


@needs_extension
def test_forward_mode_takes_the_pytorch_form():
    log_mel = LogMel(**STRIPS)
    waveform, direction = ragged()[0][:1, :2000], torch.randn(1, 2000)
    _, tangent = torch.func.jvp(lambda x: log_mel(x)[0], (waveform,), (direction,))
    waveform.requires_grad_()
    (gradient,) = torch.autograd.grad(log_mel(waveform)[0].sum(), waveform)
    assert tangent.any()
    torch.testing.assert_close(tangent.sum(), (gradient * direction).sum(), rtol=1e-3, atol=1e-3)


@needs_extension
def test_what_is_not_finite_is_not_hidden():
    waveform = ragged()[0][:2]
    waveform[0, 3000] = float("nan")
    waveform[1, 3000] = float("inf")
    frames, _ = LogMel(**STRIPS)(waveform)
    assert not frames[:, 19].isfinite().any()  # centred at sample 3040, 160 samples a frame, 400 wide
    assert frames[:, :17].isfinite().all()
    assert frames[:, 21:].isfinite().all()


def test_when_the_pytorch_form_is_taken():
    waveform, cpu = torch.zeros(1, 100), torch.device("cpu")
    settings = LogMel(**STRIPS).settings
    sizes = {512: (8, 8, 8), 1024: (8, 8, 4, 4), 200: (8, 5, 5), 240: (4, 4, 5, 3), 7: None}
    assert {size: passes(size) for size in sizes} == sizes
    assert "float64" in log_mel_obstacle(waveform.double(), cpu, settings)
    assert "gradient" in log_mel_obstacle(waveform.clone().requires_grad_(), cpu, settings)
    assert "1022" in log_mel_obstacle(waveform, cpu, settings._replace(n_fft=1022))
    assert "1025" in log_mel_obstacle(waveform, cpu, settings._replace(n_fft=1025))
    assert "meta" in log_mel_obstacle(waveform.to("meta"), cpu, settings)
    with ops.use_backend("reference"):
        assert "reference" in log_mel_obstacle(waveform, cpu, settings)
    frames, _ = LogMel(n_fft=1022, win_length=400, num_mels=20, hop_length=160)(torch.randn(1, 2000))
    assert frames.isfinite().all()


@needs_extension
def test_float16_and_bfloat16_waveforms_are_read_exactly():
    log_mel = LogMel(**STRIPS)
    for dtype in (torch.float16, torch.bfloat16):
        waveform = ragged()[0][:1].to(dtype)
        assert torch.equal(log_mel(waveform)[0], log_mel(waveform.float())[0])


@needs_extension
def test_the_operator_is_registered_and_compiles():
    log_mel = LogMel(**STRIPS)
    waveform, lengths = ragged()
    counts = 1 + lengths // 160
    arguments = (waveform, lengths, counts, 38, True, 160, log_mel.mean, log_mel.std, *log_mel.settings)
    torch.library.opcheck(torch.ops.bestrq2.log_mel.default, arguments)
    compiled = torch.compile(lambda x: log_mel(x)[0] * 2, backend="aot_eager")
    assert torch.equal(compiled(waveform), log_mel(waveform)[0] * 2)


@pytest.mark.parametrize(("n_fft", "num_mels"), [(2048, 128), (1024, 80), (64, 41)])
def test_blocks_of_filters_hold_every_weight(n_fft, num_mels):
    log_mel = LogMel(n_fft=n_fft, win_length=n_fft, num_mels=num_mels)
    constants = tables(*log_mel.settings)
    assert constants is not None
    filters, edges = constants.blocks(bands=8, bins=32)
    expected = log_mel.filters / log_mel.window.square().sum()
    assert filters.shape == (len(expected) + 32, 8 * len(edges))
    torch.testing.assert_close(filters[: len(expected), :num_mels], expected, rtol=1e-15, atol=0)
    assert not filters[len(expected) :].any()
    assert not filters[:, num_mels:].any()
    for block, (first, last) in enumerate(edges.tolist()):
        columns = filters[:, 8 * block : 8 * block + 8]
        assert 0 <= first < last <= len(expected)
        assert columns[first].any()
        assert columns[last - 1].any()
        assert torch.equal(columns[first:last].count_nonzero(), columns.count_nonzero())
