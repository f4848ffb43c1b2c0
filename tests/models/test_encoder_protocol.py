"""Encoders of others: what they need to be pretrained, and that it is enough."""

import pytest
import torch
from torch import nn

from bestrq2 import BestRQ, BestRQ2, ConformerEncoder, LogMel, RandomProjectionQuantizer, ViTEncoder
from bestrq2.layers import ConformerSettings, RandomMasking, TransformerSettings
from bestrq2.layers.masking import take
from bestrq2.layers.patches import extract_patches
from bestrq2.models import PretrainableEncoder


class OwnEncoder(nn.Module):
    """A convolution-free encoder of somebody else: PyTorch's Transformer on strips of the spectrogram."""

    rows, position, output_dim, needs_mask_token = 1, "rope", 32, True

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel(n_fft=512, win_length=400, hop_length=160, num_mels=32)
        self.patch_dim = 32 * 4
        self.embed = nn.Linear(self.patch_dim, 32)
        self.time = nn.Embedding(512, 32)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True), 1)

    def patches(self, waveform, lengths=None):
        frames, frame_lengths = self.log_mel(waveform, lengths)
        return extract_patches(frames, frame_lengths, 32, 4)

    def num_tokens(self, samples):
        return self.log_mel.num_frames(samples) // 4

    def context(self, patches, plan, step):
        tokens = self.embed(take(patches.values, plan.seen)) + self.time(plan.seen)
        return self.blocks(tokens)

    def infill(self, patches, masked, fill, step):
        tokens = torch.where(masked[..., None], fill, self.embed(patches.values))
        return self.blocks(tokens + self.time(torch.arange(tokens.shape[1])))

    def encode(self, waveform, lengths=None):
        patches = self.patches(waveform, lengths)
        return self.blocks(self.embed(patches.values) + self.time(torch.arange(patches.columns))), patches.lengths


def our_encoders():
    log_mel = LogMel(n_fft=512, win_length=400, hop_length=160, num_mels=32)
    vit = ViTEncoder(log_mel, 32, 4, TransformerSettings(32, 1, 2), "rope")
    return vit, ConformerEncoder(log_mel, ConformerSettings(32, 1, 2, 64, 5))


@pytest.mark.parametrize("model_class", [BestRQ2, BestRQ])
def test_somebody_elses_encoder_learns(model_class):
    encoder = OwnEncoder()
    assert isinstance(encoder, PretrainableEncoder)
    model = model_class(encoder, RandomProjectionQuantizer(encoder.patch_dim, 32, 8), RandomMasking((0.5, 0.5)))
    waveform = torch.randn(4, 8000) * 0.1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(20):
        loss = model(waveform, step=0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert encoder.encode(waveform)[0].shape == (4, 12, 32)


@pytest.mark.parametrize("encoder", our_encoders(), ids=["vit", "conformer"])
def test_ours_have_all_members_and_forward_is_encode(encoder):
    assert isinstance(encoder, PretrainableEncoder)
    waveform, lengths = torch.randn(2, 8000), torch.tensor([8000, 5000])
    with torch.no_grad():
        features, counts = encoder.eval()(waveform, lengths)
        expected, expected_counts = encoder.encode(waveform, lengths)
    assert torch.equal(features, expected)
    assert counts.tolist() == expected_counts.tolist()


@pytest.mark.parametrize(("model_class", "member"), [(BestRQ2, "context"), (BestRQ, "infill")])
def test_a_class_token_is_refused(model_class, member, monkeypatch):
    """With one in front, every prediction would be that of the place before."""
    encoder = OwnEncoder()
    own = getattr(encoder, member)
    monkeypatch.setattr(encoder, member, lambda *values: nn.functional.pad(own(*values), (0, 0, 1, 0)), raising=False)
    model = model_class(encoder, RandomProjectionQuantizer(encoder.patch_dim, 32, 8), RandomMasking((0.5, 0.5)))
    with pytest.raises(ValueError, match=rf"OwnEncoder\.{member}: expected features of .*class token"):
        model(torch.randn(4, 8000) * 0.1, torch.tensor([8000, 8000, 6000, 4000]), step=0)


def test_what_is_missing_is_listed():
    quantizer, masking = RandomProjectionQuantizer(128, 32, 8), RandomMasking((0.5, 0.5))
    assert not isinstance(nn.Linear(3, 3), PretrainableEncoder)
    with pytest.raises(
        TypeError, match=r"Linear cannot be pretrained: it has no context, encode, num_tokens, output_dim,"
    ):
        BestRQ2(nn.Linear(3, 3), quantizer, masking)
    encoder = OwnEncoder()
    del OwnEncoder.infill
    try:
        with pytest.raises(TypeError, match="it has no infill"):
            BestRQ(encoder, quantizer, masking)
    finally:
        OwnEncoder.infill = lambda *_: None


def test_step_is_named_and_the_rest_has_defaults():
    encoder = our_encoders()[0]
    masking = RandomMasking((0.5, 0.5))
    model = BestRQ2(
        encoder, RandomProjectionQuantizer(encoder.patch_dim, 32, 8), masking, TransformerSettings(32, 1, 2)
    )
    waveform = torch.randn(2, 8000)
    short = model(waveform, step=3)
    long = model(waveform, torch.tensor([8000, 8000]), step=3, index=torch.arange(2))
    assert torch.equal(short.loss, long.loss)
    with pytest.raises(TypeError, match="step"):
        model(waveform)


def outputs(encoder, samples=8000):
    model = BestRQ2(encoder, RandomProjectionQuantizer(encoder.patch_dim, 32, 8), RandomMasking((0.5, 0.5)))
    return model(0.1 * torch.randn(2, samples), torch.tensor([samples, 4000]), step=0)


@pytest.mark.parametrize("kind", ["rotary", None])
def test_an_unknown_kind_of_positions_is_refused(kind):
    """Without positions all masked patches of a clip would be predicted alike."""
    encoder = OwnEncoder()
    encoder.position = kind
    with pytest.raises(ValueError, match=rf"position must be one of \('sincos', 'rope'\), got {kind!r}"):
        outputs(encoder)
    with pytest.raises(ValueError, match=r"position must be one of"):
        ViTEncoder(LogMel(num_mels=32), 32, 4, TransformerSettings(32, 1, 2), kind)


def test_another_number_of_tokens_than_of_patches_is_refused():
    """Batches would be weighted by numbers that are not those of their targets."""
    encoder = OwnEncoder()
    encoder.num_tokens = lambda samples: samples // 160 // 4  # without the frame of the centred transform
    assert outputs(encoder, samples=8000)
    with pytest.raises(ValueError, match=r"OwnEncoder\.num_tokens says 12 for 8160 samples, but patches gives 13"):
        outputs(encoder, samples=8160)


def test_other_rows_than_those_of_the_patches_are_refused():
    encoder = OwnEncoder()
    encoder.rows = 8
    with pytest.raises(ValueError, match=r"OwnEncoder\.rows is 8, but its patches have 1 rows"):
        outputs(encoder)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda context: context[..., :16], r"\(2, 6, 16\)"),
        (lambda context: context[:, :5], r"\(2, 5, 32\)"),
        (lambda context: (context, None), "tuple"),
    ],
)
def test_a_context_of_another_shape_is_refused(change, got, monkeypatch):
    monkeypatch.setattr(OwnEncoder, "context", lambda *given, own=OwnEncoder.context: change(own(*given)))
    message = rf"OwnEncoder\.context: expected features of the seen patches, \(2, 6, 32\), got {got}"
    with pytest.raises(ValueError, match=message):
        outputs(OwnEncoder())
