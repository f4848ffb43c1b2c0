"""An encoder file with random weights, as python -m bestrq2.export takes it."""

import pytest
import torch

from bestrq2.config import load_config
from bestrq2.interchange.tensors import write_encoder_file
from bestrq2.models import build_model

TINY = [
    "model.front_end.mean=-40",
    "model.front_end.std=15",
    "model.encoder.depth=2",
    "model.encoder.width=64",
    "model.encoder.hidden=96",
]


@pytest.fixture(scope="session")
def transformers_modules(tmp_path_factory):
    """A place for the code of exported folders. One for all tests: Python keeps the package that it becomes."""
    pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        yield


RECIPES = {
    "strips": ("best_rq2_tiny", TINY),
    "grid": (
        "best_rq2_tiny",
        [
            *TINY[2:],
            "model.front_end.normalize=none",
            "model.encoder.position=sincos",
            "model.encoder.patch_height=16",
            "model.encoder.join_rows=concatenate",
            "data.crop_seconds=2",
        ],
    ),
    "conformer": ("best_rq_conformer_tiny", []),
}


@pytest.fixture(scope="session", params=["strips", "grid", "conformer"])
def encoder_file(request, tmp_path_factory):
    recipe, overrides = RECIPES[request.param]
    torch.manual_seed(0)
    config = load_config(recipe, overrides)
    path = tmp_path_factory.mktemp(request.param) / "encoder.safetensors"
    write_encoder_file(path, config, build_model(config).state_dict())
    return path
