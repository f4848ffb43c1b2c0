"""Models in bf16, fp16 and float64, and under any default dtype and device of the user's program.

The spectrogram and the targets stay what they are: codes are compared for equality.
"""

import warnings
from pathlib import Path

import pytest
import torch
from model_kinds import KINDS, config_of, features_of, model_of, ragged, relative_error

import bestrq2
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.layers import LogMel, RandomProjectionQuantizer
from bestrq2.layers.speechbrain import SpeechBrainRandomProjectionQuantizer

ERRORS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-6}  # of features, relative; measured: a third
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", ERRORS, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def defaults():
    """Sets torch's defaults; both are put back."""

    def set_defaults(dtype=torch.float32, device=None):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield set_defaults
    set_defaults()


@pytest.fixture(scope="module", params=KINDS)
def reference(request):
    """Kind, fp32 features, and codes, loss and norm of the gradient of one step."""
    waveform, lengths = ragged()
    features = features_of(model_of(request.param), waveform, lengths)
    return request.param, features, *one_step(model_of(request.param))


def one_step(model):
    waveform, lengths = ragged()
    torch.manual_seed(5)  # stochastic depth
    output = model.train()(waveform, lengths, step=3)
    output.objective.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = torch.stack([parameter.grad.float().norm() for parameter in model.parameters()]).norm()
    return output.codes, float(output.loss.detach()), float(gradient)


@dtypes
def test_converted_models(reference, dtype):
    kind, features, codes, loss, gradient = reference
    waveform, lengths = ragged()
    model = model_of(kind).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = features_of(model, waveform, lengths)
    assert found.dtype == torch.float32
    assert relative_error(found, features) < ERRORS[dtype]
    found_codes, found_loss, found_gradient = one_step(model_of(kind).to(dtype))
    assert torch.equal(found_codes, codes)
    assert found_loss == pytest.approx(loss, rel=ERRORS[dtype])
    assert found_gradient == pytest.approx(gradient, rel=3 * ERRORS[dtype])


@kinds
def test_bf16_and_back_has_exact_targets(kind):
    model = model_of(kind)
    expected = {name: tensor.clone() for name, tensor in model.quantizer.state_dict().items()}
    model.bfloat16().float().half().double()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.quantizer.state_dict().items())
    fresh = model_of(kind)
    for name, buffer in fresh.encoder.front_end.named_buffers():
        assert torch.equal(buffer, dict(model.encoder.front_end.named_buffers())[name]), name


@dtypes
def test_default_dtype(reference, dtype, defaults):
    kind, features, codes, *_ = reference
    weights = model_of(kind).state_dict()
    defaults(dtype)
    model = model_of(kind)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.load_state_dict(weights)
    assert torch.equal(one_step(model)[0], codes)
    fresh = model_of(kind)
    fresh.load_state_dict(weights)
    assert relative_error(features_of(fresh, *ragged()), features) < ERRORS[dtype]


@dtypes
def test_codes_of_the_packaged_clips(dtype, defaults):
    """The front end and quantizer, built under another default dtype and converted, give the codes of recordings."""
    clips = sorted((Path(bestrq2.__file__).parent / "data" / "tiny").rglob("*.*"))
    clips = [clip for clip in clips if clip.suffix in (".wav", ".flac", ".ogg")]
    assert len(clips) == 24
    waves = [torch.from_numpy(bestrq2.data.load_audio(clip, 16000))[None] for clip in clips]

    def codes():
        front = LogMel(n_fft=1024, win_length=400, hop_length=160)
        quantizer = RandomProjectionQuantizer(128, 512, normalize="utterance")
        converted = torch.nn.ModuleList((front, quantizer)).to(dtype)
        return [converted[1](converted[0](wave)[0]) for wave in waves]

    expected = codes()
    defaults(dtype)
    assert all(torch.equal(found, wanted) for found, wanted in zip(codes(), expected))


@kinds
def test_default_device(kind, defaults):
    """Tensors of a model on the CPU stay there: with default device meta a factory without a device would fail."""
    waveform, lengths = ragged()
    model = model_of(kind)
    expected = features_of(model, waveform, lengths)
    codes, loss, _ = one_step(model_of(kind))
    trained = model_of(kind)
    long = waveform.repeat(1, 15)
    expected_long = features_of(model, long, None)
    index = torch.arange(3)
    defaults(device="meta")
    assert torch.equal(features_of(model, waveform, lengths), expected)
    assert torch.equal(features_of(model, long, None), expected_long)
    torch.manual_seed(5)
    output = trained.train()(waveform, lengths, step=3, index=index)
    output.objective.backward()
    assert torch.equal(output.codes, codes)
    assert float(output.loss.detach()) == loss
    output.touching_share()
    if kind == "streaming":
        state = model.encoder.start_stream(3)
        pieces = [model.encoder.stream(part, state)[0] for part in waveform.split(7001, dim=1)]
        pieces.append(model.encoder.stream(waveform[:, :0], state, final=True)[0])
        whole = features_of(model, waveform, None)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)


@kinds
def test_built_on_meta_then_filled(kind):
    weights = model_of(kind).state_dict()
    with torch.device("meta"):
        model = model_of(kind)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu").load_state_dict(weights)
    waveform, lengths = ragged()
    assert torch.equal(features_of(model, waveform, lengths), features_of(model_of(kind), waveform, lengths))


@kinds
def test_loading_does_not_follow_the_defaults(kind, tmp_path, defaults):
    waveform, lengths = ragged()
    model = model_of(kind)
    expected = features_of(model, waveform, lengths)
    write_encoder_file(tmp_path / "encoder.safetensors", config_of(kind), model.state_dict())
    for dtype, device in ((torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")):
        defaults(dtype, device)
        encoder = bestrq2.load(tmp_path / "encoder.safetensors")
        assert {(p.dtype, p.device.type) for p in encoder.parameters()} == {(torch.float32, "cpu")}
        assert torch.equal(encoder.encode(waveform, lengths)[0], expected)


def test_a_device_that_is_not_there(tmp_path):
    write_encoder_file(tmp_path / "encoder.safetensors", config_of("grid"), model_of("grid").state_dict())
    missing = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(bestrq2.BestRQError, match=f"device='{missing}'"):
        bestrq2.load(tmp_path / "encoder.safetensors", device=missing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_waveform_in_half_precision_is_a_warning(dtype):
    waveform, lengths = ragged()
    for kind in ("strips", "streaming"):
        model = model_of(kind).eval()
        with pytest.warns(UserWarning, match="pass float32 audio"):
            model.encoder.encode(waveform.to(dtype), lengths)
        with pytest.warns(UserWarning, match="pass float32 audio"):
            model(waveform.to(dtype), lengths, step=0)
    state = model.encoder.start_stream(3)
    with pytest.warns(UserWarning, match="pass float32 audio"):
        model.encoder.stream(waveform.to(dtype), state)


def test_other_waveforms_are_errors():
    encoder = model_of("streaming").eval().encoder
    waveform, _ = ragged()
    for call in (encoder.encode, lambda x: encoder.stream(x, encoder.start_stream(3)), encoder.front_end):
        with pytest.raises(ValueError, match=r"int16: full scale is 1\.0, so divide samples of int16 by 2\*\*15"):
            call((waveform * 32768).short())
        with pytest.raises(ValueError, match=r"got torch\.complex64"):
            call(waveform + 0j)
        with pytest.raises(TypeError, match=r"waveform tensor .* got ndarray"):
            call(waveform.numpy())


@pytest.mark.parametrize("kind", ["strips", "conformer"])
def test_gradient_with_respect_to_the_waveform(kind):
    """In the direction of the gradient the features' sum moves by its square norm (float64 weights)."""
    encoder = model_of(kind).double().eval().encoder
    waveform, lengths = ragged()
    waveform = waveform.double().requires_grad_()
    features, _ = encoder.encode(waveform, lengths)
    probe = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((features * probe).sum(), waveform)
    assert not gradient[1, 23456:].any()  # padding
    direction = gradient / gradient.norm()
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (
            (encoder.encode(waveform + sign * step * direction, lengths)[0].double() * probe).sum() for sign in (1, -1)
        )
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_gradient_of_the_loss_with_respect_to_the_waveform():
    for kind in ("strips", "options", "conformer"):
        waveform, lengths = ragged()
        waveform.requires_grad_()
        output = model_of(kind)(waveform, lengths, step=3)
        output.loss.backward()
        assert waveform.grad is not None
        assert float(waveform.grad.norm()) > 0


def test_speechbrain_quantizer_stays_float32():
    quantizer = SpeechBrainRandomProjectionQuantizer(40, 8, 64)
    projection, codebook = quantizer.P.clone(), quantizer.CB.clone()
    quantizer.half().to(torch.bfloat16)
    assert torch.equal(quantizer.P, projection)
    assert torch.equal(quantizer.CB, codebook)


def test_integers_that_were_not_divided_are_warned_of(monkeypatch):
    """scipy's reader gives int16, and ``.float()`` of it is 90 dB too loud. One warning, also after other audio."""
    log_mel = LogMel(n_fft=512, win_length=400, hop_length=160, num_mels=8)
    monkeypatch.setattr("bestrq2.layers.precision._looked_at", [])
    loud = torch.full((1, 800), -12345.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_mel(loud / 2**15)
    with pytest.warns(UserWarning, match=r"samples up to 12345, .* divide samples of 16 bits by 2\*\*15"):
        log_mel(loud)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_mel(loud)
