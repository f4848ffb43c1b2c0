"""Pictures of the pretraining task: spectrogram, mask, true against predicted codes.

Every picture of a run shows the same clips with the same mask (samples from the beginning of the training order, the
mask of step 0), so that pictures of different steps compare. The model is evaluated on them apart from the training
batch: without gradients, dropout, random numbers, or a change of any state that training reads.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bestrq2.data import Batch, CropDataset, collate
from bestrq2.data.steps import plan_of
from bestrq2.layers.patches import Patches
from bestrq2.models import BestRQ, BestRQ2
from bestrq2.models.best_rq2 import PretrainOutput
from bestrq2.runs.code_colours import code_colours
from bestrq2.runs.metrics import MetricsLog
from bestrq2.runs.pictures import FOLDER, ClipPicture, draw_clips

from .distributed import whole

logger = logging.getLogger(__name__)

TAG = "pictures/codes"


def fixed_batch(dataset: CropDataset, clips: int = 2, candidates: int = 8) -> Batch:
    """The samples that a run's pictures show: of the first ``candidates`` of its training order, the ``clips`` with the
    least silence, in order."""
    plan = plan_of(dataset, 1)  # the first of a step, so that buckets show clips of all lengths
    samples = [dataset[plan.samples(step)[0]] for step in range(max(clips, candidates))]
    order = sorted(samples, key=lambda sample: _audible_blocks(sample.waveform), reverse=True)
    return collate(sorted(order[:clips], key=lambda sample: sample.index)).as_float()


def _audible_blocks(waveform: np.ndarray, block: int = 400) -> int:
    """Blocks of ``block`` samples above -60 dB of full scale."""
    blocks = waveform[: len(waveform) // block * block].reshape(-1, block)
    return int((np.square(blocks, dtype=np.float64).mean(1) > 1e-6).sum())


def fixed_pictures(
    folder: Path | None, model: BestRQ2 | BestRQ, batch: Batch, step: int, log: MetricsLog | None = None
) -> Path | None:
    """Draw ``folder/pictures/step-XXXXXXXX.png`` of ``batch`` under the mask of step 0, and log it.

    Call it inside of the run's autocast, if any. With sharded weights every rank must call it, and all but the first
    with ``folder=None``, which computes and draws nothing.

    Args:
        folder: of the run.
        model: bare, not wrapped for data parallelism.
        batch: from :func:`fixed_batch`.
        step: completed training steps, for the name and the title.

    Returns:
        the path; None without a folder, or if it cannot be written (with a warning).
    """
    device = next(model.parameters()).device
    # Compiled blocks would be compiled once more for this shape and mode.
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        output = model(batch.waveform.to(device), batch.lengths, step=0, index=batch.index)
        clips = clip_pictures(model, batch, output)
    if folder is None:
        return None
    path = folder / FOLDER / f"step-{step:08d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        draw_clips(partial, clips, f"step {step}", model.quantizer.codebook_size)
        partial.replace(path)
        if log is not None:
            log.image(TAG, step, path)
    except Exception as error:  # a picture costs no training
        logger.warning(f"{path} could not be written: {error or type(error).__name__}")
        return None
    return path


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode inside; afterwards every module is in the mode that it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def clip_pictures(model: BestRQ2 | BestRQ, batch: Batch, output: PretrainOutput, limit: int = 2) -> list[ClipPicture]:
    """Pictures of the first ``limit`` clips of a batch and of the model's output for it.

    Only the logits of these clips are computed.
    """
    encoder, quantizer, patches, plan = model.encoder, model.quantizer, output.patches, output.plan
    front, rows = encoder.front_end, patches.rows
    clips = min(limit, len(batch))
    waveform = batch.waveform[:clips].to(patches.values.device)
    frames, frame_lengths = front(waveform, batch.lengths[:clips])
    frames = frames * front.std + front.mean
    first = Patches(patches.values[:clips], patches.lengths[:clips], rows)
    true = model.target_codes(waveform, batch.lengths[:clips], first)
    predicted, probability = predict(model, output.hidden[:clips], output.codes[:clips])
    tokens = patches.lengths[:clips].tolist()
    seen_codes = torch.cat([codes[:count] for codes, count in zip(true, tokens)])
    palettes = [
        code_colours(book.cpu().numpy(), seen_codes[:, g].cpu().numpy()) for g, book in enumerate(quantizer.codebook)
    ]
    # A Conformer's token is whole frames; a ViT's may leave out bands at the top.
    height = getattr(encoder, "patch_height", front.num_mels)
    pictures = []
    for clip, count in enumerate(tokens):
        places = plan.predicted[clip, : int(plan.predicted_lengths[clip])].cpu().numpy()

        def grid(values: np.ndarray, rows: int = rows) -> np.ndarray:
            return np.moveaxis(values.reshape(-1, rows, *values.shape[1:]), (0, 1), (1, 0))

        masked = np.ones(count, bool)  # also what is not predicted
        masked[plan.seen[clip, : int(plan.seen_lengths[clip])].cpu().numpy()] = False
        clip_predicted = np.full((count, len(palettes)), -1)
        clip_predicted[places] = predicted[clip, : len(places)].cpu().numpy()
        clip_probability = np.full((count, len(palettes)), np.nan)
        clip_probability[places] = probability[clip, : len(places)].cpu().numpy()
        codes = np.moveaxis(grid(true[clip, :count].cpu().numpy()), 2, 0)
        guesses = np.moveaxis(grid(clip_predicted), 2, 0)
        pictures.append(
            ClipPicture(
                int(batch.index[clip]),
                frames[clip, : int(frame_lengths[clip])].cpu().numpy(),
                front.hop_length / front.sampling_rate,
                front.f_min,
                front.f_max,
                height,
                encoder.patch_dim // height,
                grid(masked),
                codes,
                guesses,
                np.moveaxis(grid(clip_probability), 2, 0),
                np.stack([palette[book] for palette, book in zip(palettes, codes)]),
                np.stack([palette[book] for palette, book in zip(palettes, guesses)]),
            )
        )
    return pictures


def predict(model: BestRQ2 | BestRQ, hidden: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely codes and the probability of the true ones, both ``(B, Np, G)``, from ``hidden (B, Np, D)``."""
    guesses, probabilities = [], []
    weights, biases = whole(model.head.weight), whole(model.head.bias)
    for g, (weight, bias) in enumerate(zip(weights, biases)):
        logits = hidden.float() @ weight.float().T + bias.float()
        guesses.append(logits.argmax(-1))
        probabilities.append(logits.softmax(-1).gather(-1, codes[..., g, None]).squeeze(-1))
    return torch.stack(guesses, -1), torch.stack(probabilities, -1)
