"""A step of pretraining neither reads a value of the device nor copies more to it than one number a clip.

Copies from memory that is not page-locked make the host wait for a GPU's queue where they are larger than 64 KB (CUDA's
"API synchronization behavior"). Meta tensors stand for those of a GPU: they have no values.
"""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bestrq2.config import load_config
from bestrq2.models import build_model
from bestrq2.models.teacher import Teacher

SMALL = ["model.encoder.depth=2", "model.targets.codebook_size=64"]
OPTIONS = {
    "two steps": ("best_rq2_tiny", []),
    "conformer": ("best_rq2_conformer_tiny", []),
    "one step": ("best_rq_vit_tiny", []),
    "clip target": ("best_rq2_tiny", ["model.clip_weight=0.5"]),
    "mixing": ("best_rq2_tiny", ["model.mixing.share=1"]),
    "dispersion": ("best_rq2_tiny", ["model.masking.dispersion=1", "model.masking.shared_per_batch=false"]),
    "part of the masked": ("best_rq2_tiny", ["model.predictor.share=0.5", "model.predictor.attention=cross"]),
    "teacher": ("best_rq2_tiny", ["model.targets.encoder=somewhere", "model.targets.normalize=utterance"]),
}


class Copies(TorchDispatchMode):
    """Sizes of what is copied from the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type == "cpu" and result.device.type == "meta":
                self.sizes.append(source.numel())
        return result


@pytest.mark.parametrize("shares", [(1, 1, 1, 1), (1, 0.5, 0.3, 0.8)], ids=["equal", "ragged"])
@pytest.mark.parametrize(("recipe", "settings"), OPTIONS.values(), ids=OPTIONS.keys())
def test_only_numbers_of_clips_are_copied(recipe, settings, shares, monkeypatch):
    config = load_config(recipe, [*SMALL, *settings])
    teacher = (
        Teacher(build_model(load_config(recipe, SMALL)).encoder, 1) if "targets.encoder" in str(settings) else None
    )
    model = build_model(config, teacher).to("meta").train()
    samples = int(config.data.crop_seconds * config.model.front_end.sampling_rate)
    waveform, lengths = torch.empty(4, samples, device="meta"), torch.tensor([int(samples * share) for share in shares])
    if teacher is not None:
        teacher.encoder.to("meta")
    # torch has no autocast for meta tensors, not even to turn it off
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    with Copies() as copies:
        model(waveform, lengths, step=0, index=torch.arange(4)).objective.backward()
    assert copies.sizes
    assert max(copies.sizes) <= 4
