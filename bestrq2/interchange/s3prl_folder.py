"""A folder for s3prl: an upstream whose ``hidden_states`` are the layers of one of our encoders."""

import keyword
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bestrq2.config import Config, ConfigError
from bestrq2.durability import whole_file
from bestrq2.layers.padding import length_mask

from .opening import open_own
from .staging import Check, staged
from .tensors import assemble_encoder, write_encoder_file

SAMPLING_RATE = 16000  # of all audio in s3prl
WEIGHTS = "encoder.safetensors"
FILES = ("expert.py", "hubconf.py", "__init__.py", WEIGHTS)
TAKEN = {"Path", "_expert", "dependencies", "importlib", "sys"}  # in hubconf.py, or by torch.hub

EXPERT = '''"""s3prl upstream of {description}, written by `bestrq2 export --s3prl`. Needs bestrq2."""

from pathlib import Path

from bestrq2.interchange.s3prl_folder import Upstream


class UpstreamExpert(Upstream):
    """{layers} hidden states of width {width}: the output of every block, then the final, normalised one."""

    weights_file = Path(__file__).resolve().with_name("{weights}")
'''

HUBCONF = '''"""Entries for s3prl's hub: copy this folder to s3prl/upstream/{name} and add to s3prl/hub.py

    from s3prl.upstream.{name}.hubconf import *

or, without s3prl: torch.hub.load(THIS_FOLDER, "{name}", source="local").
"""

import importlib.util
import sys
from pathlib import Path

__all__ = ["{name}"]


def _expert():
    # By file: torch.hub runs hubconf.py outside of any package.
    path = Path(__file__).resolve().with_name("expert.py")
    name = f"_s3prl_expert_{hash(path)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name].UpstreamExpert


def {name}(*args, **kwargs):
    """The exported encoder; ckpt=FILE opens another one instead."""
    return _expert()(*args, **kwargs)
'''


class Upstream(nn.Module):
    """The interface of s3prl's ``UpstreamExpert``. It can be fine-tuned (``--upstream_trainable``).

    Args:
        ckpt: an encoder to open instead of the exported one; see :func:`bestrq2.load`.
        model_config: accepted for s3prl's runner and not used: the configuration is in the file.

    Raises:
        CheckpointError, ConfigError: as :func:`bestrq2.load`, or for an encoder that is not at 16 kHz.
    """

    weights_file: Path

    def __init__(self, ckpt: str | None = None, model_config: str | None = None, **_: object) -> None:
        super().__init__()
        self.model = open_own(ckpt or self.weights_file).requires_grad_(True)
        _check_rate(self.model.sampling_rate)
        hop = self.model.hop_size_in_ms * SAMPLING_RATE / 1000
        self.downsample_rate = round(hop)

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples from one frame to the next, the same for all hidden states."""
        return self.downsample_rate

    def forward(self, wavs: list[Tensor]) -> dict[str, list[Tensor] | Tensor]:
        """Unpadded waveforms ``(S,)`` at 16 kHz -> ``hidden_states``, a list of ``(B, T, D)``, and the last of them as
        ``last_hidden_state``.

        T is what s3prl expects, the longest S divided by the downsample rate and rounded up; where our encoder gives a
        frame less, because it drops an incomplete one, a clip's last frame is repeated. Frames behind a clip's own end
        are zero.
        """
        lengths = torch.tensor([len(wav) for wav in wavs], device="cpu")
        padded = nn.utils.rnn.pad_sequence(list(wavs), batch_first=True)
        features, counts = self.model.encode_layers(padded, lengths)
        wanted = -(-lengths // self.downsample_rate)
        time = torch.arange(int(wanted.max()), device="cpu")
        place = torch.minimum(time, counts[:, None] - 1).to(features.device)
        features = features.gather(2, place[None, :, :, None].expand(len(features), -1, -1, features.shape[3]))
        inside = length_mask(wanted, len(time), features.device)
        states = list((features * inside[None, ..., None]).unbind(0))
        return {"hidden_states": states, "last_hidden_state": states[-1]}


def _check_rate(rate: int) -> None:
    if rate != SAMPLING_RATE:
        raise ConfigError(f"--s3prl: s3prl's audio has {SAMPLING_RATE} Hz, but this encoder expects {rate} Hz")


def upstream_name(folder: Path) -> str:
    """The folder's name, which is that of a function in hubconf.py.

    Raises:
        ConfigError: if it cannot be one.
    """
    name = folder.resolve().name
    usable = name.isidentifier() and not keyword.iskeyword(name) and unicodedata.normalize("NFKC", name) == name
    if not usable or name in TAKEN:
        raise ConfigError(
            f"--s3prl: expected a folder whose name can be that of a function in hubconf.py, such as my_encoder; "
            f"got {name!r}"
        )
    return name


def write_s3prl(
    folder: Path, config: Config, weights: Mapping[str, Tensor], origin: Path, look_again: Check | None = None
) -> list[Path]:
    """Write expert.py, hubconf.py, __init__.py and the weights, all of them or none. The folder's name is that of the
    upstream.

    Args:
        folder: made if need be.
        config, weights: of a run (all weights, or the encoder's alone).
        origin: of the weights, for errors.
        look_again: see :func:`~bestrq2.interchange.staging.staged`.

    Raises:
        ConfigError: if the folder's name cannot be a function's, the encoder is not at 16 kHz, or another process is
            writing there.
        CheckpointError, OSError: if a file cannot be written.
    """
    name = upstream_name(folder)
    encoder = assemble_encoder(config, weights, origin)
    _check_rate(encoder.sampling_rate)
    expert = EXPERT.format(
        description=config.recipe, layers=encoder.depth + 1, width=encoder.output_dim, weights=WEIGHTS
    )
    texts = {"expert.py": expert, "hubconf.py": HUBCONF.replace("{name}", name), "__init__.py": ""}
    names = (WEIGHTS, "__init__.py", "expert.py", "hubconf.py")
    with staged(folder, names, look_again, alone="--s3prl") as stage:
        write_encoder_file(stage / WEIGHTS, config, weights)
        for file, text in texts.items():
            with whole_file(stage / file) as written:
                written.write(text)
    return [folder / file for file in FILES]
