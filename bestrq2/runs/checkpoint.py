"""Checkpoints: a folder of safetensors and one JSON file, written atomically, verified by checksum when read.

``step-00001000/`` holds ``model.safetensors`` (weights and buffers, quantizer included), ``training.safetensors``
(optimizer moments and counters), with averaging ``ema.safetensors`` (as the first, with averaged weights), and
``state.json`` (step, configuration, SHA-256 of all of them). Nothing in it is executable, and reading never unpickles.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bestrq2.config import recipe_names
from bestrq2.durability import flush_file, flush_folder, save_file
from bestrq2.errors import CheckpointError, byte_count, system_reason
from bestrq2.real_content import real_content

logger = logging.getLogger(__name__)

WEIGHTS, TRAINING, AVERAGED, STATE = "model.safetensors", "training.safetensors", "ema.safetensors", "state.json"
GRAPHS = {".onnx", ".pt2"}  # what `bestrq2 export --onnx` and `--torch-export` write
FORMAT = "bestrq2-checkpoint-1"
PREFIX = "step-"
# Hidden folders that a kill may leave behind: a checkpoint half written, one half deleted.
WRITING, DISCARDED = ".writing-", ".discarded-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        folder: where it is.
        step: completed training steps.
        config: the resolved configuration as nested dictionaries.
        extra: further JSON state of the trainer.
        weights_file: what :meth:`weights` reads: the plain weights or the averaged ones.
    """

    folder: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]
    weights_file: str = WEIGHTS

    def weights(self) -> dict[str, Tensor]:
        return _load_tensors(self.folder / self.weights_file)

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """The moving average of the weights, if the run kept one."""
        return _load_tensors(self.folder / AVERAGED) if (self.folder / AVERAGED).exists() else None

    def training_state(self) -> dict[str, Tensor]:
        return _load_tensors(self.folder / TRAINING)


def save_checkpoint(
    parent: Path,
    step: int,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    config: dict[str, Any],
    extra: dict[str, Any],
    keep_last: int,
    averaged: Mapping[str, Tensor] | None = None,
    keep: Collection[str] = (),
) -> Path:
    """Write ``parent/step-XXXXXXXX`` so that a crash at any moment leaves either all of it or none of it.

    Everything goes to a hidden folder, is flushed to disk, and is then renamed. Checkpoints of earlier steps beyond
    ``keep_last`` are deleted only afterwards, but for those whose folder names are in ``keep``. Those of later steps
    are left alone: a run that skipped a damaged one must not take it for the newest.

    Raises:
        CheckpointError: if the disk is full or the folder cannot be written. Nothing partial remains, and the earlier
            checkpoints are untouched.
    """
    final = parent / f"{PREFIX}{step:08d}"
    partial = parent / f"{WRITING}{final.name}"
    tensors = {WEIGHTS: weights, TRAINING: training} | ({AVERAGED: averaged} if averaged is not None else {})
    needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        checksums = {}
        for name, group in tensors.items():
            save_file({key: value.detach().cpu().contiguous() for key, value in group.items()}, partial / name)
            flush_file(partial / name)
            checksums[name] = _sha256(partial / name)
        state = {"format": FORMAT, "step": step, "files": checksums, "config": config, "extra": extra}
        (partial / STATE).write_text(json.dumps({"sha256": _digest(state), "state": state}, indent=1))
        flush_file(partial / STATE)
        flush_folder(partial)
        if final.exists():  # a resumed run reaches a step again: same content, but possibly the damaged copy
            _discard(final)
        partial.rename(final)
        flush_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(parent).free if parent.exists() else 0
        raise CheckpointError(
            f"could not save the checkpoint of step {step} to {final}: {system_reason(error)} "
            f"({byte_count(needed)} needed, {byte_count(free)} free). Earlier checkpoints are untouched."
        ) from error
    for old in [folder for folder in list_checkpoints(parent) if _step_of(folder) <= step][:-keep_last]:
        if old.name not in keep:
            with suppress(OSError):
                _discard(old)
    return final


def list_checkpoints(parent: Path) -> list[Path]:
    """Checkpoint folders ``step-<number>``, oldest first. Copies under other names are none of ours.

    Raises:
        CheckpointError: if the folder is there and may not be listed, which does not mean that it is empty.
    """
    try:
        with os.scandir(parent) as entries:  # Path.glob takes a folder that it may not read for an empty one
            names = [e.name for e in entries if e.name.removeprefix(PREFIX).isdecimal() and e.name.startswith(PREFIX)]
        return sorted((parent / name for name in names if (parent / name).is_dir()), key=_step_of)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(parent, error) from error


def clear_leftovers(parent: Path) -> None:
    """Delete what a killed process left half written or half deleted. No other process may be writing there."""
    for pattern in (f"{WRITING}*", f"{DISCARDED}*"):
        for folder in parent.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing that looks like one."""
    hidden = folder.with_name(f"{DISCARDED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint and verify the checksum of every file.

    Raises:
        CheckpointError: if a file is missing, damaged or of another format, naming it.
    """
    state = read_state(folder)
    for name, expected in state["files"].items():
        try:
            actual = _sha256(folder / name)
        except OSError as error:
            raise unreadable(folder / name, error) from error
        if actual != expected:
            what = real_content(folder / name)
            raise CheckpointError(
                f"{folder / name}: damaged ({what or f'checksum {actual[:12]}, expected {expected[:12]}'})"
            )
    return Checkpoint(folder, state["step"], state["config"], state["extra"])


def read_state(folder: Path) -> dict[str, Any]:
    """``step``, ``config``, ``extra`` and the checksums of a checkpoint, without a look at its tensors.

    Raises:
        CheckpointError: if its JSON file is missing, damaged or of another format.
    """
    path = folder / STATE
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    state = document.get("state") if isinstance(document, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not the state of a bestrq2 checkpoint")
    if document.get("sha256") != _digest(state):
        raise CheckpointError(f"{path}: damaged (checksum differs)")
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT!r}, found {state.get('format')!r}")
    for name, kind in (("step", int), ("files", dict), ("config", dict), ("extra", dict)):
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"{path}: {name}: expected {kind.__name__}, found {type(state.get(name)).__name__}")
    return state


def newest_intact(parent: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one message for each newer one that was skipped.

    Raises:
        CheckpointError: if one of these may not be read: it may be whole, and is not skipped.
    """
    problems: list[str] = []
    for folder in reversed(list_checkpoints(parent)):
        try:
            return read_checkpoint(folder), problems
        except CheckpointError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            problems.append(str(error))
    return None, problems


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user means by a path: a ``step-*`` folder, a run folder, or its ``checkpoints`` folder.

    The path of a checkpoint's ``ema.safetensors`` means that checkpoint with its averaged weights.

    Raises:
        CheckpointError: if there is none that is intact, or it may not be read.
    """
    try:
        return _find_checkpoint(path)
    except PermissionError as error:
        raise unreadable(Path(os.fsdecode(error.filename or path)), error) from error


def _find_checkpoint(path: Path) -> Checkpoint:
    if not path.exists():
        hint = ""
        if str(path) in recipe_names():
            hint = f"; this is a recipe, which is trained first: bestrq2 train --config {path} --data FOLDER"
        elif (named := Path("runs") / path).is_dir():
            hint = f"; did you mean {named}?"
        raise CheckpointError(f"{path}: no such file or folder (expected a run folder or a checkpoint){hint}")
    if path.suffix == ".safetensors" and (path.parent / STATE).exists():
        if path.name not in (WEIGHTS, AVERAGED):
            raise CheckpointError(f"{path}: expected {WEIGHTS} or {AVERAGED} of a checkpoint")
        return replace(read_checkpoint(path.parent), weights_file=path.name)
    if (path / STATE).exists():
        return read_checkpoint(path)
    if path.is_file() and path.suffix in GRAPHS:
        raise CheckpointError(
            f"{path}: expected a run folder or a checkpoint, got an exported graph: name the run it came from"
        )
    problems: list[str] = []
    for parent in _parents(path):
        found, messages = newest_intact(parent)
        problems += messages
        if found:
            for problem in problems:
                logger.warning(f"skipped a damaged checkpoint: {problem}; {found.folder.name} is used")
            return found
    detail = f": {'; '.join(problems)}" if problems else " (expected a run folder or a step-* folder with state.json)"
    raise CheckpointError(f"{path}: no intact checkpoint{detail}")


def _parents(path: Path) -> Iterator[Path]:
    if (path / "checkpoints").is_dir():
        yield path / "checkpoints"
    if path.is_dir():
        yield path


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file or folder of a model that could not be read; for want of permission with the remedy."""
    if isinstance(error, PermissionError):
        return CheckpointError(
            f"{path} cannot be read for want of permission; let this user read it (chmod, chown), or run as its owner"
        )
    return CheckpointError(f"{path}: cannot be read: {system_reason(error)}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"
