"""One opener for encoders: ours, those of others, and any module with our interface."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bestrq2.config import ConfigError

from .adapters import AudioEncoder, ModuleAdapter
from .opening import load
from .transformers_encoder import TransformersEncoder, is_transformers_folder


def open_encoder(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    heads: int | None = None,
    hop_length: int | None = None,
) -> AudioEncoder:
    """A frozen encoder in evaluation mode, with our interface, from any of these:

    - whatever :func:`bestrq2.load` opens: a run folder, an exported file or folder, a published checkpoint;
    - a local folder of a transformers audio model (wav2vec 2.0, HuBERT, WavLM, data2vec, wav2vec2-bert, AST, Whisper,
      ...); see :mod:`.transformers_encoder` for the rules;
    - ``FILE.py``: an X-ARES encoder file, that is one name ending in ``Encoder``;
    - ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``: a class or function that, called without arguments, gives a module
      with our ``encode`` or the X-ARES interface.

    Nothing is ever downloaded. A .py file or module that you name is executed; a transformers folder's own code only
    with ``trust_remote_code``.

    Args:
        source: see above.
        device: where to put it.
        trust_remote_code: run Python code that a transformers folder brings along.
        heads, hop_length: for published checkpoints, see :func:`bestrq2.load`.

    Returns:
        an encoder with ``encode``, ``encode_layers``, ``sampling_rate``, ``output_dim``, ``hop_size_in_ms``, ``depth``.

    Raises:
        CheckpointError, ConfigError: if there is no such encoder, or it lacks part of the interface.
    """
    text = str(source)
    file, _, name = text.rpartition(".py:")
    encoder: Any
    if file:
        encoder = ModuleAdapter(_make(_run_file(Path(f"{file}.py")), name, text), text)
    elif text.endswith(".py"):
        encoder = ModuleAdapter(_make(_run_file(Path(text)), None, text), text)
    elif ":" in text and not Path(text).exists():
        package, name = text.split(":", 1)
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"{text}: {error}") from error
        encoder = ModuleAdapter(_make(module, name, text), text)
    elif is_transformers_folder(Path(text)):
        encoder = TransformersEncoder(text, trust_remote_code)
    else:
        return load(text, device=device, heads=heads, hop_length=hop_length)
    return encoder.to(device)


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"_bestrq2_source_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}", path
    )
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"{path}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _make(module: ModuleType, name: str | None, source: str) -> Any:
    """Call ``name`` of a module, or its one name ending in 'Encoder'."""
    if name is None:
        names = [found for found in vars(module) if found.endswith("Encoder")]
        if len(names) != 1:
            raise ConfigError(f"{source}: expected one name ending in 'Encoder', found {len(names)}: give FILE.py:NAME")
        name = names[0]
    try:
        factory = getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"{source}: {error}") from error
    return factory()
