"""Batches whose loss or gradient was not finite, kept for inspection: ``bestrq2 report --bad-batch FILE``."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bestrq2.data import Batch
from bestrq2.durability import save_file
from bestrq2.errors import TrainingError, system_reason

logger = logging.getLogger(__name__)

FOLDER = "bad_batches"


@dataclass(frozen=True)
class BadBatch:
    """Result of :func:`load_bad_batch`.

    Attributes:
        waveform: ``(B, S)`` as the model got it; lengths, index: ``(B,)`` int64.
        step, rank: where it happened; ``step`` counts completed steps, as in the log.
        loss, grad_norm: what was not finite.
        files: path of every clip, if known.
    """

    waveform: Tensor
    lengths: Tensor
    index: Tensor
    step: int
    rank: int
    loss: float
    grad_norm: float
    files: list[str] = field(default_factory=list)


def save_bad_batch(
    run_folder: Path,
    step: int,
    rank: int,
    batch: Batch,
    loss: float,
    grad_norm: float,
    limit: int = 5,
    files: Sequence[str] | None = None,
) -> Path | None:
    """Write ``bad_batches/step-XXXXXXXX-rank-R.safetensors`` and a ``.json`` beside it, each complete or not at all.

    Returns:
        the path; None when this rank has kept ``limit`` batches already, or if it cannot be written (with a
        warning: training must not stop for this).
    """
    folder = run_folder / FOLDER
    final = folder / f"step-{step:08d}-rank-{rank}.safetensors"
    partial = final.with_suffix(".partial")
    if not final.exists() and len(list(folder.glob(f"step-*-rank-{rank}.safetensors"))) >= limit:
        return None
    tensors = {"waveform": batch.waveform, "lengths": batch.lengths, "index": batch.index}
    # As text: JSON has no NaN.
    facts = {"step": step, "rank": rank, "loss": str(loss), "grad_norm": str(grad_norm), "files": list(files or [])}
    try:
        folder.mkdir(exist_ok=True)
        partial.write_text(json.dumps(facts, indent=1) + "\n")
        partial.replace(final.with_suffix(".json"))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        logger.warning(f"the batch of step {step} could not be kept in {folder}: {system_reason(error)}")
        return None
    return final


def load_bad_batch(path: Path) -> BadBatch:
    """Read what :func:`save_bad_batch` wrote; ``path``: either of its two files.

    Raises:
        TrainingError: if the file cannot be read or is of another kind.
    """
    if path.suffix == ".json":
        path = path.with_suffix(".safetensors")
    try:
        tensors = load_file(path)
        waveform, lengths, index = (tensors[name] for name in ("waveform", "lengths", "index"))
        facts = json.loads(path.with_suffix(".json").read_bytes())
        return BadBatch(
            waveform,
            lengths,
            index,
            int(facts["step"]),
            int(facts["rank"]),
            float(facts["loss"]),
            float(facts["grad_norm"]),
            [str(name) for name in facts["files"]],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: not a batch kept by training: {type(error).__name__}: {error}") from error


def clip_statistics(batch: BadBatch) -> list[dict[str, float]]:
    """Per clip, over its valid samples: ``index``, ``samples``, ``min``, ``max``, ``rms`` (of the finite ones), counts
    ``nan`` and ``inf``, share ``clipped`` (magnitude 1 or more) and share ``zeros``."""
    rows = []
    for samples, length, index in zip(batch.waveform, batch.lengths.tolist(), batch.index.tolist()):
        valid = samples[:length].double()
        finite = valid[valid.isfinite()]
        empty = finite.numel() == 0
        rows.append(
            {
                "index": index,
                "samples": length,
                "min": float("nan") if empty else finite.min().item(),
                "max": float("nan") if empty else finite.max().item(),
                "rms": float("nan") if empty else finite.square().mean().sqrt().item(),
                "nan": int(torch.isnan(valid).sum()),
                "inf": int(torch.isinf(valid).sum()),
                "clipped": 0.0 if empty else (finite.abs() >= 1).double().mean().item(),
                "zeros": 0.0 if empty else (finite == 0).double().mean().item(),
            }
        )
    return rows
