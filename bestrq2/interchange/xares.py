"""Encoder files for X-ARES and XARES-LLM, and a check that is stricter than theirs.

The generated file holds one class, whose name (recipe and a hash of weights and settings) is unique because X-ARES
names its cache of embeddings after it; its weights lie beside it. Both frameworks turn the file's path into a module
name, so run them from a folder above the file and give a relative path.
"""

import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bestrq2.config import Config, ConfigError
from bestrq2.durability import whole_file
from bestrq2.errors import printable
from bestrq2.layers.padding import length_mask

from .opening import open_own
from .tensors import encoder_weights, write_encoder_file

Interface = Literal["xares", "xares-llm"]

TEMPLATE = '''"""{interface} encoder {name}: {description}.

Written by `bestrq2 export`; needs bestrq2, and {weights} beside this file.
"""

from pathlib import Path

from bestrq2.interchange.xares import {base} as _Base


class {name}(_Base):
    weights_file = Path(__file__).resolve().with_name("{weights}")
'''


class FrozenModule(nn.Module):
    """An encoder file opened without arguments: fp32, frozen, pinned to evaluation mode. Clips of any length are
    processed in windows, and clips shorter than one frame are extended with silence.

    Attributes:
        sampling_rate (Hz), output_dim, hop_size_in_ms: of the features.
    """

    weights_file: Path

    def __init__(self) -> None:
        super().__init__()
        self.model = open_own(self.weights_file)
        self.sampling_rate = self.model.sampling_rate
        self.output_dim = self.model.output_dim
        self.hop_size_in_ms = self.model.hop_size_in_ms
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModule":
        """Stay in evaluation mode: trainers call ``model.train()`` on everything they hold."""
        return super().train(False)

    def __reduce__(self) -> tuple[Any, ...]:
        # By file rather than by class: the class cannot be imported by name in a worker that was started elsewhere. The
        # weights never change, so they are read again.
        module = sys.modules[type(self).__module__]
        return _reopen, (str(Path(module.__file__ or "").resolve()), str(next(self.parameters()).device))

    def _features(self, audio: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        if audio.dim() not in (1, 2):
            raise ValueError(f"expected audio [B, T] or [T], got {tuple(audio.shape)}")
        batch = audio if audio.dim() == 2 else audio[None]
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            return self.model.encode(batch, lengths)


class XaresModule(FrozenModule):
    """``forward(audio [B, T] or [T]) -> features [B, T', D]`` float32. X-ARES passes no lengths: padding is audio."""

    def forward(self, audio: Tensor) -> Tensor:
        return self._features(audio, None)[0]


class XaresLlmModule(FrozenModule):
    """``forward(audio [B, T], audio_attention_mask [B, T] or None) -> features [B, T', D] float32, mask [B, T']``.

    Both masks are 1 where there is audio. Padding stands at the end and changes no feature.

    Raises:
        ValueError: for a mask of another shape, or with audio behind padding.
    """

    def forward(self, audio: Tensor, audio_attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lengths, mask = None, audio_attention_mask
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask[None]
            if mask.shape != (audio if audio.dim() == 2 else audio[None]).shape:
                raise ValueError(f"expected a mask of shape {tuple(audio.shape)}, got {tuple(mask.shape)}")
            counts = (mask != 0).sum(1)
            if not (length_mask(counts, mask.shape[1], mask.device) == (mask != 0)).all():
                raise ValueError("expected padding at the end of each clip, got a mask with audio behind padding")
            lengths = counts.clamp(min=1)
        features, frames = self._features(audio, lengths)
        kept = length_mask(frames, features.shape[1], frames.device)
        if mask is not None:
            kept &= (counts > 0).cpu()[:, None]
        return features, kept.to(features.device, torch.int64 if mask is None else mask.dtype)


def _open_class(path: str | Path) -> type[FrozenModule]:
    """The encoder class of a generated file, the same one as long as the file is the same."""
    path = Path(path).resolve()
    state = path.stat()
    identity = f"{os.fsdecode(path)} {state.st_mtime_ns} {state.st_size}"
    name = f"_bestrq2_encoder_{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        # Not by the loader: it takes the compiled code of another file of this name, size and second.
        exec(compile(path.read_bytes(), os.fsdecode(path), "exec"), vars(module))
    found = [value for key, value in vars(sys.modules[name]).items() if key.endswith("Encoder")]
    if len(found) != 1:
        raise ConfigError(f"{path}: expected one name ending in 'Encoder', found {len(found)}")
    return found[0]


def _reopen(path: str, device: str) -> nn.Module:
    return _open_class(path)().to(device)


def check_module_name(out: Path, interface: Interface) -> None:
    """
    Raises:
        ConfigError: if ``out`` cannot be imported as a module by its name.
    """
    if out.suffix != ".py" or not out.stem.isidentifier():
        raise ConfigError(
            f"--{interface}: expected a Python file whose name is an identifier, such as my_encoder.py; got "
            f"{printable(str(out))}"
        )


def write_encoder_module(out: Path, config: Config, weights: Mapping[str, Tensor], interface: Interface) -> Path:
    """Write ``out`` (a .py file) and the weights beside it.

    Returns:
        the weights file.

    Raises:
        ConfigError: if ``out`` cannot be imported as a module by its name.
        CheckpointError, OSError: if a file cannot be written.
    """
    check_module_name(out, interface)
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder_weights(weights).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else b"")
    # Settings that no weights show give other features of the same weights.
    settings = (asdict(config.model.front_end), asdict(config.model.encoder), config.data.crop_seconds)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    label = "".join(word.capitalize() for word in re.findall(r"[a-zA-Z0-9]+", config.recipe)) or "Model"
    name = f"{label if label[0].isalpha() else 'M' + label}{digest.hexdigest()[:8]}Encoder"
    beside = out.with_suffix(".safetensors")
    write_encoder_file(beside, config, weights)
    encoder = config.model.encoder
    text = TEMPLATE.format(
        interface="X-ARES" if interface == "xares" else "XARES-LLM",
        name=name,
        description=f"{config.recipe}, width {encoder.width}, {encoder.depth} blocks",
        weights=beside.name,
        base="XaresModule" if interface == "xares" else "XaresLlmModule",
    )
    with whole_file(out) as file:
        file.write(text)
    return beside


def check_encoder_module(path: Path, *, spawn: bool = True) -> list[str]:
    """Everything that the checkers of X-ARES and XARES-LLM ask, and what they miss: data type, hop against duration,
    finite values, the same features alone and in a batch, evaluation mode, use in a spawned process.

    Returns:
        one message for each thing that is wrong.
    """
    problems: list[str] = []
    module = _open_class(path)()
    masked = isinstance(module, XaresLlmModule)
    rate, hop = module.sampling_rate, module.hop_size_in_ms / 1000

    def features(audio: Tensor, lengths: list[int] | None = None) -> Tensor:
        if not masked:
            return module(audio)
        mask = None
        if lengths is not None:
            mask = length_mask(torch.tensor(lengths, device="cpu"), audio.shape[1], audio.device).long()
        values, kept = module(audio, mask)
        if kept.shape != values.shape[:2]:
            problems.append(f"mask of shape {tuple(kept.shape)} for features {tuple(values.shape)}")
        return values

    def expect(fine: bool, message: str) -> None:
        if not fine:
            problems.append(message)

    expect(type(module).__name__.endswith("Encoder"), f"class {type(module).__name__} does not end in 'Encoder'")
    module.train()
    expect(not any(part.training for part in module.modules()), "train() leaves evaluation mode")
    expect(not any(p.requires_grad for p in module.parameters()), "a parameter takes gradients")
    generator = torch.Generator("cpu").manual_seed(0)
    for seconds in (0.01, 0.4, 3.125, 23.7):
        audio = 0.1 * torch.randn(
            2, max(1, round(seconds * rate)), generator=generator, dtype=torch.float32, device="cpu"
        )
        audio[1, audio.shape[1] // 2 :] = 0
        values = features(audio)
        where = f"at {seconds} s"
        expect(values.dtype == torch.float32, f"features are {values.dtype} {where}, expected torch.float32")
        expect(
            values.dim() == 3 and len(values) == 2 and values.shape[2] == module.output_dim,
            f"shape {values.shape} {where}",
        )
        expect(bool(values.isfinite().all()), f"features are not finite {where}")
        frames = values.shape[1]
        expect(frames >= 1, f"no frames {where}")
        if seconds >= hop:
            expect(abs(frames * hop - seconds) <= hop + 1e-6, f"{frames} frames of {hop * 1000:g} ms {where}")
        alone = features(audio[:1])
        error = (alone - values[:1]).norm() / alone.norm()
        expect(bool(error < 1e-5), f"features alone and in a batch differ by {error:.1e} {where}")
        if masked:
            part = audio.shape[1] // 2 + 1
            padded = features(audio.clone(), [part, audio.shape[1]])[:1]
            alone = features(audio[:1, :part])
            error = (padded[:, : alone.shape[1]] - alone).norm() / alone.norm()
            expect(bool(error < 1e-5), f"padding under the mask changes features by {error:.1e} {where}")
    if spawn:
        problems += _check_spawned(
            module, 0.1 * torch.randn(1, rate, generator=generator, dtype=torch.float32, device="cpu")
        )
    return problems


def _spawned(data: bytes, audio: Tensor) -> Tensor:
    torch.set_num_threads(1)
    result = pickle.loads(data)(audio)  # what the parent process has just pickled
    return (result[0] if isinstance(result, tuple) else result).cpu()


def _check_spawned(module: FrozenModule, audio: Tensor) -> list[str]:
    expected = module(audio)
    expected = expected[0] if isinstance(expected, tuple) else expected
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(_spawned, (pickle.dumps(module), audio))
    except Exception as error:  # whatever a worker may raise is the finding
        return [f"cannot be used in a spawned process: {type(error).__name__}: {error}"]
    difference = (found - expected).norm() / expected.norm()
    return [] if difference < 1e-5 else [f"features in a spawned process differ by {difference:.1e}"]
