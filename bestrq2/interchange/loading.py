"""``bestrq2.load``: one opener for encoders, ours and those of others, and any module with our interface."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bestrq2.config import ConfigError

from .adapters import ForeignEncoder, ModuleAdapter
from .opening import open_own
from .own_code import code_digest
from .transformers_encoder import TransformersEncoder, is_transformers_folder

MOST_NAMES = 10


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    published_positions: bool = False,
    heads: int | None = None,
    hop_length: int | None = None,
    trainable: bool = False,
) -> Any:
    """Open a trained encoder, frozen and in evaluation mode: ``features, lengths = load(source).encode(waveform)``.

    A source is one of these:

    - a run folder, a ``step-*`` folder, a weights file inside of one (``ema.safetensors``), or an encoder file or
      folder that ``bestrq2 export`` wrote;
    - a published BEST-RQ-2 checkpoint: a ``.safetensors`` file, or the folder of its transformers export;
    - a local folder of a transformers audio model (wav2vec 2.0, HuBERT, WavLM, data2vec, wav2vec2-bert, AST, Whisper,
      ...);
    - ``FILE.py``: an X-ARES encoder file, that is one name ending in ``Encoder``;
    - ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``: a class or function that, called without arguments, gives a module
      with our ``encode`` or the X-ARES interface.

    Nothing is downloaded, and pickles are refused. A .py file or module that you name is executed; the code of a
    transformers folder only with ``trust_remote_code``.

    Args:
        source: see above.
        device: where to put it.
        trust_remote_code: run the Python code of a transformers folder.
        published_positions: reproduce a fault of the published inference code; see :class:`~bestrq2.ViTEncoder`.
        heads, hop_length: only for published checkpoints whose heads or hop cannot be known from the file.
        trainable: return one of our encoders for fine-tuning: in training mode, with gradients. Adapters around other
            encoders stay frozen; fine-tune those with their own library.

    Returns:
        a :class:`~bestrq2.ViTEncoder`, a :class:`~bestrq2.ConformerEncoder`, or an adapter around another encoder; all
        are :class:`~bestrq2.interchange.AudioEncoder`: ``encode``, ``encode_layers``, ``sampling_rate``,
        ``output_dim``, ``hop_size_in_ms``, ``depth``.

    Raises:
        CheckpointError: for a missing or damaged file.
        ConfigError: for a pickle, an unknown layout (listing its keys), tensors that do not fit or are not finite, an
            encoder that lacks part of the interface, or an argument that it has no use for.
    """
    text = str(source)
    file, _, name = text.rpartition(".py:")
    encoder: Any
    if file:
        encoder = _adapted(_run_file(Path(f"{file}.py")), name, text)
    elif text.endswith(".py"):
        encoder = _adapted(_run_file(Path(text)), None, text)
    elif ":" in text and not Path(text).exists():
        package, name = text.split(":", 1)
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"{text}: {error}") from error
        encoder = _adapted(module, name, text)
    elif is_transformers_folder(Path(text)):
        encoder = TransformersEncoder(text, trust_remote_code)
    else:
        encoder = open_own(text, published_positions=published_positions, heads=heads, hop_length=hop_length)
        if trainable:
            encoder.requires_grad_(True).train()
    hints = {"published_positions": published_positions, "heads": heads, "hop_length": hop_length}
    given = [
        f"{name}={value}" for name, value in {"trainable": trainable, **hints}.items() if value not in (None, False)
    ]
    if given and isinstance(encoder, ForeignEncoder):
        raise ConfigError(f"{text}: {given[0]} needs an encoder of bestrq2, got {type(encoder).__name__}")
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such device, or its memory is full
        raise ConfigError(f"device={str(device)!r}: {str(error).strip() or type(error).__name__}") from error


open_encoder = load  # its former name


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


def _adapted(module: ModuleType, name: str | None, source: str) -> ModuleAdapter:
    encoder = _make(module, name, source)
    return ModuleAdapter(encoder, source, code_digest(module, encoder))


def _make(module: ModuleType, name: str | None, source: str) -> Any:
    """Call ``name`` of a module, or its one name ending in 'Encoder'."""
    if name is None:
        names = [found for found in vars(module) if found.endswith("Encoder")]
        if len(names) != 1:
            raise ConfigError(f"{source}: expected one name ending in 'Encoder', found {len(names)}: give FILE.py:NAME")
        name = names[0]
    factory = getattr(module, name, None)
    if not callable(factory):
        what = "no" if factory is None else "no class or function"
        raise ConfigError(f"{source.removesuffix(f':{name}')} has {what} {name!r}{_offered(module, name)}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ConfigError(f"{source}: expected a class or function that needs no arguments, but: {error}") from error
    except ValueError:  # of a builtin, which does not tell
        pass
    return factory()


def _offered(module: ModuleType, name: str) -> str:
    """The classes and functions that a module defines, unless they are many, and others of similar names."""
    every = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = [key for key, value in every.items() if getattr(value, "__module__", "") == module.__name__]
    close = difflib.get_close_matches(name, every)
    names = dict.fromkeys([*own, *close] if len(own) <= MOST_NAMES else close)
    return f"; it has {', '.join(names)}" if names else ""
