"""``--find-batch``: how many clips fit into one pass of this machine, and how many are fastest."""

import gc
import logging
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from bestrq2.config import Config
from bestrq2.data import Batch
from bestrq2.errors import TrainingError
from bestrq2.hardware import (
    choose_device,
    choose_precision,
    describe_device,
    is_out_of_memory,
    keep_freed_memory,
    peak_flops,
    peak_memory,
)
from bestrq2.models import BestRQ, BestRQ2

from .compilation import compile_blocks, compiles
from .distributed import Ranks
from .feeder import Feeder, preparation
from .optimizer import accept_bf16_gradients, clip_gradients, make_optimizer, set_schedule

logger = logging.getLogger(__name__)

LARGEST = 4096
TIMED_SECONDS = 1.5
WORTH = 1.03  # a larger batch has to be this much faster to go on on a CPU


@dataclass(frozen=True)
class Trial:
    """``clips`` in one pass: seconds of a step, the largest memory in MiB (on a GPU of this trial, else of the process
    so far), and matrix-product operations."""

    clips: int
    step_seconds: float
    memory: float
    flops: float

    @property
    def clips_per_second(self) -> float:
        return self.clips / self.step_seconds


def find_batch(config: Config, model: BestRQ2 | BestRQ, ranks: Ranks) -> int:
    """Try 1, 2, 4, ... clips of full length (and between the last that fits and the first that does not), print a table
    and the settings that follow. Nothing is saved. Returns the exit code.

    Raises:
        TrainingError: if not even one clip fits.
    """
    if ranks.size > 1:
        raise TrainingError("--find-batch measures one rank: start it as one process, without torchrun")
    device = choose_device(config.train.device)
    autocast = choose_precision(config.train.precision, device)
    model = model.to(device).train()
    model.quantizer.accept_random()
    if compiles(config.train.compile, device):
        compile_blocks(model)
    if device.type == "cpu":
        keep_freed_memory()
        accept_bf16_gradients(model, config, autocast, ranks.size)
    peak, source = peak_flops(device, autocast)
    logger.info(f"Passes of {config.data.crop_seconds:g} s clips, {config.recipe}, on {describe_device(device)}")
    logger.info(f"MFU: share of {peak / 1e12:.1f} TFLOP/s ({source})")
    logger.info("   clips     s/step    clips/s   peak MiB    MFU")
    trials: list[Trial] = []
    clips, failed = 1, LARGEST + 1
    why = f"{LARGEST} clips is the most that is tried"
    while clips < failed:
        if (problem := _would_not_fit(trials, clips, device)) is not None:
            why = problem
            break
        trial = measure(config, model, clips, device, autocast)
        if trial is None:
            logger.info(f"{clips:8d}   out of memory")
            why, failed = f"{clips} clips do not fit", clips
            largest = trials[-1].clips if trials else 0
            clips = (largest + failed) // 2 if device.type == "cuda" else failed
            if clips in (largest, failed) or (failed - largest) * 8 < failed:
                break
            continue
        logger.info(
            f"{clips:8d} {trial.step_seconds:10.3f} {trial.clips_per_second:10.1f} {trial.memory:10.0f}"
            f"{trial.flops / trial.step_seconds / peak:7.0%}"
        )
        trials.append(trial)
        if device.type == "cpu" and len(trials) > 2:
            before = max(t.clips_per_second for t in trials[:-2])
            if max(t.clips_per_second for t in trials[-2:]) < WORTH * before:
                why = "more clips are not faster"
                break
        clips = clips * 2 if failed > LARGEST else (clips + failed) // 2
        if clips == trials[-1].clips or (failed <= LARGEST and (failed - trials[-1].clips) * 8 < failed):
            break
    if not trials:
        raise TrainingError(
            f"not one clip of {config.data.crop_seconds:g} s fits ({why}): set "
            "model.encoder.activation_checkpointing=true, a smaller data.crop_seconds or a smaller model"
        )
    _advise(config, model, trials, why)
    return 0


def measure(
    config: Config, model: BestRQ2 | BestRQ, clips: int, device: torch.device, autocast: torch.dtype | None
) -> Trial | None:
    """Time training steps on noise of the longest length; None if memory does not suffice."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the trials before, also one that did not fit, are not this one
    try:
        return _time_steps(config, model, clips, device, autocast)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:  # the error is gone by now, and with it the frames that held the tensors of a pass that did not fit
        model.zero_grad(set_to_none=True)
        _release_memory(device)


def _time_steps(
    config: Config, model: BestRQ2 | BestRQ, clips: int, device: torch.device, autocast: torch.dtype | None
) -> Trial:
    optimizer = make_optimizer(model, config.optimizer)
    set_schedule(optimizer, 0, config.train.steps, config.optimizer)
    # As in training: the copy and, on a GPU, the preparation of the next batch run beside the step, and take memory.
    prepare = preparation(model, device, autocast) if device.type == "cuda" else None
    times: list[float] = []
    with closing(Feeder(_noise(clips, _samples(config), device), device, prepare)) as feeder:
        batches = iter(feeder)
        while len(times) < 2 or (sum(times[1:]) < TIMED_SECONDS and len(times) < 10):
            start = time.perf_counter()
            batch = next(batches).batch
            ahead = {} if batch.prepared is None else {"prepared": batch.prepared}
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                output = model(*batch.inputs, step=len(times), index=batch.index, **ahead)
            output.objective.backward()
            clip_gradients(model, config.optimizer.max_grad_norm, optimizer=optimizer)
            optimizer.step()
            feeder.prefetch()
            optimizer.zero_grad(set_to_none=True)
            output.loss.item()
            times.append(time.perf_counter() - start)
        if feeder.error is not None:  # the memory of the next batch
            raise feeder.error
    return Trial(clips, min(times[1:]), peak_memory(device), model.flops(output.plan))


def _samples(config: Config) -> int:
    return round(config.data.crop_seconds * config.model.front_end.sampling_rate)


def _noise(clips: int, samples: int, device: torch.device) -> Generator[Batch, None, None]:
    """The same batch of noise for every step, in memory such as the data workers deliver."""
    waveform = 0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(0))
    batch = Batch(waveform, torch.full((clips,), samples), torch.arange(clips))
    if device.type == "cuda":
        batch = batch.pin_memory()
    while True:
        yield batch


def _release_memory(device: torch.device) -> None:
    """Give back what nothing uses, so that a trial does not find memory cut into the pieces of another."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _would_not_fit(trials: list[Trial], clips: int, device: torch.device) -> str | None:
    """On a CPU the kernel kills the process without an exception, so stay below the free memory."""
    if device.type != "cpu" or len(trials) < 2:
        return None
    available = available_memory()
    growth = (trials[-1].memory - trials[-2].memory) / (trials[-1].clips - trials[-2].clips)
    needed = growth * (clips - trials[-1].clips)
    if available is None or needed < 0.8 * available:
        return None
    return f"{clips} clips would need about {needed:.0f} MiB more, {available:.0f} MiB are free"


def available_memory() -> float | None:
    """Free memory of the machine in MiB, if Linux reports it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _advise(config: Config, model: BestRQ2 | BestRQ, trials: list[Trial], why: str) -> None:
    fastest = max(trial.clips_per_second for trial in trials)
    enough = min((t for t in trials if t.clips_per_second >= 0.97 * fastest), key=lambda t: t.clips)
    logger.info(
        f"Largest tried: {max(t.clips for t in trials)} clips ({why}); {enough.clips} are within 3 % of the fastest."
    )
    batch_size = config.train.batch_size
    accumulate = -(-batch_size // enough.clips)
    seconds = batch_size / enough.clips_per_second
    logger.info(
        f"For train.batch_size={batch_size} on one rank: train.accumulate={accumulate} "
        f"({-(-batch_size // accumulate)} clips in one pass, about {seconds:.2f} s per step)"
    )
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    room = f"{gradients / 2**20:.0f} MiB for the gradients, which DDP keeps (several ranks)"
    if accumulate > 1:
        room += f"; {2 * batch_size * _samples(config) * 4 / 2**20:.0f} MiB for the waveforms of this step and the next"
    logger.info(f"Not in the table: {room}.")
