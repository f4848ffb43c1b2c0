"""Tiny models of every kind, and a ragged batch, for tests of dtypes and devices."""

import torch

from bestrq2.config import load_config
from bestrq2.models import build_model

SMALL = ["model.encoder.depth=2", "model.encoder.width=64", "model.encoder.hidden=96"]
OPTIONS = ["model.predictor.attention=cross", "model.predictor.share=0.5", "model.mixing.share=0.5"]
OPTIONS += ["model.clip_weight=1", "model.masking.dispersion=1.0", "model.encoder.drop_path=0.2"]
KINDS = {
    "strips": ("best_rq2_tiny", ["model.front_end.mean=-40.3", "model.front_end.std=15.1", *SMALL]),
    "grid": ("best_rq2_tiny", [*SMALL, "model.encoder.position=sincos", "model.encoder.patch_height=16"]),
    "one_stage": ("best_rq2_tiny", ["model.name=best_rq", *SMALL]),
    "options": ("best_rq2_tiny", [*SMALL, *OPTIONS]),
    "conformer": ("best_rq_conformer_tiny", []),
    "streaming": (
        "best_rq_conformer_tiny",
        [
            "model.name=best_rq2",
            *[f"model.predictor.{name}" for name in ("width=64", "depth=1", "heads=4", "hidden=96")],
            "model.encoder.conformer.conv_norm=batch_norm",
            "model.encoder.conformer.conv_mode=causal",
            "model.encoder.conformer.chunk_size=4",
            "model.encoder.conformer.left_context=8",
        ],
    ),
}


def config_of(kind):
    recipe, overrides = KINDS[kind]
    return load_config(recipe, overrides)


def model_of(kind):
    torch.manual_seed(0)
    return build_model(config_of(kind))


def ragged():
    """Three clips of noise ``(3, 40000)`` and their lengths."""
    waveform = 0.1 * torch.randn(3, 40000, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([40000, 23456, 13000])
    for clip, length in zip(waveform, lengths):
        clip[length:] = 0
    return waveform, lengths


def features_of(model, waveform, lengths):
    with torch.no_grad():
        return model.eval().encoder.encode(waveform, lengths)[0]


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())
