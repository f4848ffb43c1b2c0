"""Pretrain an audio encoder.

    python -m bestrq2.train                        # tiny model on the 24 clips of the package, less than a minute
    python -m bestrq2.train --data FOLDER --config best_rq2_small
    python -m bestrq2.train --data clips.csv --config recipe.yaml train.steps=20000 model.masking.ratio=[0.6,0.8]
    python -m bestrq2.train --resume runs/best_rq2_small-001
    python -m bestrq2.train --frozen-encoder runs/best_rq2_small-001    # only a head, on cached embeddings

Everything about a run is in its folder: configuration, versions, metrics.csv, TensorBoard events, report.png and
checkpoints.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

# Threads that wait must not spin: on a laptop whose other core is busy, spinning made small models 2.7 times slower.
# OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import nn
from tqdm import tqdm

from bestrq2 import ops
from bestrq2.checkpoint import Checkpoint, CheckpointError, newest_intact, save_checkpoint
from bestrq2.config import Config, ConfigError, config_to_dict, load_config, recipe_names, with_overrides
from bestrq2.data import AudioError, Batch, CropDataset, DataError, ManifestError, batches
from bestrq2.hashing import mix
from bestrq2.layers.code_usage import CodeUsage
from bestrq2.layers.conformer import ConformerBlock
from bestrq2.layers.transformer import Block
from bestrq2.models import BestRQ, BestRQ2, build_model
from bestrq2.models.build import load_weights
from bestrq2.ops.native import extension_obstacle
from bestrq2.training.data_identity import data_fingerprint
from bestrq2.training.data_source import FIRST_LOOK_CLIPS, fill_statistics, open_dataset
from bestrq2.training.errors import TrainingError
from bestrq2.training.frozen import train_head
from bestrq2.training.hardware import choose_device, choose_precision, describe_device, peak_flops
from bestrq2.training.interrupt import StopSignal
from bestrq2.training.optimizer import learning_rate, make_optimizer, optimizer_tensors, restore_optimizer
from bestrq2.training.report import save_report
from bestrq2.training.run_folder import MetricsLog, RunFolder

DEFAULT_RECIPE = "best_rq2_tiny"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bestrq2.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help=f"a YAML file, or a recipe: {', '.join(recipe_names())}")
    parser.add_argument("--data", help="folder of audio (searched recursively) or a CSV/JSONL manifest")
    parser.add_argument("--resume", nargs="?", const="", metavar="RUN", help="continue a run (default: the newest one)")
    parser.add_argument(
        "--frozen-encoder", metavar="SOURCE", help="train only a head on the embeddings of this encoder"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    parser.add_argument("--name", help="name of the new run folder (default: the recipe and a number)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=1000 data.crop_seconds=4")
    # Intermixed, so that overrides may stand before, between and behind the options.
    options = parser.parse_intermixed_args(arguments)
    try:
        overrides = list(options.overrides)
        if options.data is not None:
            # Quoted: a folder may be called "a: b" or "2024".
            overrides.append(f"data.source={json.dumps(options.data)}")
        if options.frozen_encoder is not None:
            overrides.append(f"frozen.source={json.dumps(options.frozen_encoder)}")
        if options.resume is not None:
            if options.config or options.name:
                raise ConfigError("--resume takes everything from the run folder: drop --config and --name")
            return resume(RunFolder.existing(options.runs, options.resume or None), overrides)
        config = load_config(options.config or DEFAULT_RECIPE, overrides)
        dataset = open_dataset(config)
        fill_statistics(config, dataset)
        if config.frozen.source:
            return train_head(config, dataset, RunFolder.create(options.runs, options.name, config), None)
        model = seeded_model(config)
        return train(config, model, dataset, RunFolder.create(options.runs, options.name, config), None)
    except (ConfigError, ManifestError, AudioError, DataError, CheckpointError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def resume(run: RunFolder, overrides: list[str]) -> int:
    config = with_overrides(run.read_config(), overrides)
    checkpoint, problems = newest_intact(run.checkpoints)
    for problem in problems:
        print(f"warning: passed over a damaged checkpoint: {problem}", file=sys.stderr)
    if checkpoint is None:
        raise CheckpointError(f"{run.checkpoints}: no intact checkpoint to resume from")
    print(f"Resuming {run.path} from step {checkpoint.step} ({checkpoint.folder.name})")
    dataset = open_dataset(config)
    found, expected = data_fingerprint(dataset), checkpoint.extra["data"]
    if found != expected:
        raise TrainingError(
            f"the training data changed since the checkpoint was written (fingerprint {found} instead of {expected}): "
            "files, durations or crop settings differ. Restore them, or start a new run."
        )
    if overrides:
        run.write_config(config)
    if config.frozen.source:
        return train_head(config, dataset, run, checkpoint)
    model = seeded_model(config)
    return train(config, model, dataset, run, checkpoint)


def seeded_model(config: Config) -> BestRQ2 | BestRQ:
    torch.manual_seed(mix(config.train.seed, 1) >> 1)
    return build_model(config)


@torch.no_grad()
def first_look(model: BestRQ2 | BestRQ, dataset: CropDataset, config: Config, device: torch.device) -> CodeUsage:
    """Code usage of the targets over the first clips, before any training: random targets can start collapsed."""
    usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size, decay=1.0).to(device)
    batch_size = min(16, config.train.batch_size)
    for batch in batches(dataset, batch_size, num_steps=max(1, FIRST_LOOK_CLIPS // batch_size), workers=0):
        patches = model.encoder.patches(batch.waveform.to(device), batch.lengths)
        codes = model.quantizer(patches.values, patches.lengths)
        inside = torch.arange(codes.shape[1]) < patches.lengths[:, None]
        usage.update(codes, inside.to(device))
    return usage


def describe(config: Config, model: BestRQ2 | BestRQ, device: torch.device, autocast: torch.dtype | None) -> None:
    encoder = sum(p.numel() for p in model.encoder.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = "bf16 autocast" if autocast else "fp32"
    print(f"Model: {config.recipe} ({config.model.name}), encoder {encoder:,} parameters, {trained:,} trained")
    print(f"Device: {describe_device(device)}, {precision}; operations: {', '.join(ops.available_backends())}")
    if (missing := extension_obstacle()) is not None:
        print(f"note: the slower PyTorch path runs: {missing}")


def train(
    config: Config, model: BestRQ2 | BestRQ, dataset: CropDataset, run: RunFolder, checkpoint: Checkpoint | None
) -> int:
    """The loop. Returns the exit code: 0, or 128 + signal number after a requested stop."""
    settings = config.train
    device = choose_device(settings.device)
    autocast = choose_precision(settings.precision, device)
    model = model.to(device).train()
    optimizer = make_optimizer(model, config.optimizer)
    usage = CodeUsage(model.quantizer.num_codebooks, model.quantizer.codebook_size).to(device)
    done, audio_seconds, skipped_files, skipped_steps, elapsed = 0, 0.0, 0, 0, 0.0
    if checkpoint is not None:
        load_weights(model, checkpoint.weights(), checkpoint.folder)
        tensors = checkpoint.training_state()
        restore_optimizer(model, optimizer, tensors)
        usage.load_state_dict({name: tensors[f"usage.{name}"] for name in usage.state_dict()})
        done, elapsed = checkpoint.step, checkpoint.extra["elapsed_seconds"]
        audio_seconds, skipped_files = checkpoint.extra["audio_seconds"], checkpoint.extra["skipped_files"]
        skipped_steps = checkpoint.extra["skipped_steps"]
    describe(config, model, device, autocast)
    if settings.compile:
        for module in model.modules():
            if isinstance(module, (Block, ConformerBlock)):
                module.compile(dynamic=True)
    peak, peak_source = peak_flops(device, autocast)
    print(f"Run: {run.path} (utilisation against {peak / 1e12:.2f} TFLOP/s, {peak_source})")
    run.write_versions(describe_device(device))
    log = MetricsLog(run.path, done)
    if checkpoint is None:
        look = first_look(model, dataset, config, device)
        found = look.metrics()
        print(
            f"Targets: {found['codes_used']:.0f} of {model.quantizer.codebook_size} codes used by "
            f"{float(look.total):.0f} patches, perplexity {found['perplexity']:.1f}, "
            f"commonest code {found['unigram']:.1%}"
        )
        if (advice := look.advice()) is not None:
            print(f"warning: {advice}", file=sys.stderr)
        log.write({"step": 0, **found, "learning_rate": 0.0})

    def save() -> None:
        training = optimizer_tensors(model, optimizer)
        training.update({f"usage.{name}": tensor for name, tensor in usage.state_dict().items()})
        extra = {
            "audio_seconds": audio_seconds,
            "elapsed_seconds": elapsed + time.perf_counter() - started,
            "skipped_files": skipped_files,
            "skipped_steps": skipped_steps,
            "data": fingerprint,
        }
        parent, weights = run.checkpoints, model.state_dict()
        save_checkpoint(parent, done, weights, training, config_to_dict(config), extra, settings.keep_last)

    fingerprint = data_fingerprint(dataset)
    started = time.perf_counter()
    save_problem: CheckpointError | None = None
    bad_in_a_row = 0
    interval_start, interval_wait, interval_audio, interval_flops = started, 0.0, 0.0, 0.0
    stream = timed(
        batches(
            dataset,
            settings.batch_size,
            start_step=done,
            num_steps=settings.steps - done,
            workers=config.data.workers,
            pin_memory=device.type == "cuda",
        )
    )
    interactive = sys.stderr.isatty()
    bar = tqdm(
        total=settings.steps, initial=done, unit="step", mininterval=0.2 if interactive else 10, dynamic_ncols=True
    )
    with bar, StopSignal() as stop, closing(stream):
        for batch, waited in islice(stream, settings.steps - done):
            step = done
            # Dropout and stochastic depth: a pure function of (seed, step), so that a resumed run repeats them.
            torch.manual_seed(mix(settings.seed, 2, step) >> 1)
            rate = learning_rate(step, settings.steps, config.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                waveform = batch.waveform.to(device, non_blocking=True)
                output = model(waveform, batch.lengths, step, batch.index)
            output.loss.backward()
            limit = config.optimizer.max_grad_norm or float("inf")
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            loss, accuracy, grad_norm = torch.stack((output.loss.detach(), output.accuracy, norm)).tolist()
            if all(map(is_finite, (loss, grad_norm))):
                optimizer.step()
                bad_in_a_row = 0
            else:
                skipped_steps, bad_in_a_row = skipped_steps + 1, bad_in_a_row + 1
                tqdm.write(f"warning: step {step + 1}: loss {loss}, gradient norm {grad_norm}: update skipped")
            optimizer.zero_grad(set_to_none=True)
            usage.update(output.codes, output.plan.predicted_valid())
            done += 1
            bar.update()
            seconds = float(batch.lengths.sum()) / dataset.sampling_rate
            audio_seconds += seconds
            interval_audio, interval_wait = interval_audio + seconds, interval_wait + waited
            interval_flops += model.flops(output.plan)
            skipped_files += report_skips(run, batch)

            if done % settings.log_every == 0 or done == settings.steps:
                now = time.perf_counter()
                row = {
                    "step": done,
                    "loss": loss,
                    "accuracy": accuracy,
                    **usage.metrics(),
                    "grad_norm": grad_norm,
                    "learning_rate": rate,
                    "mask_ratio": output.plan.realised_ratio,
                    "padding_share": 1 - float(batch.lengths.sum()) / batch.waveform.numel(),
                    "audio_seconds": audio_seconds,
                    "audio_seconds_per_second": interval_audio / (now - interval_start),
                    "data_wait": interval_wait / (now - interval_start),
                    "mfu": interval_flops / (now - interval_start) / peak,
                    "skipped_files": skipped_files,
                    "skipped_steps": skipped_steps,
                    "elapsed_seconds": elapsed + now - started,
                }
                log.write(row)
                bar.set_postfix_str(postfix(row), refresh=False)
                interval_start, interval_wait, interval_audio, interval_flops = now, 0.0, 0.0, 0.0
            if done % settings.save_every == 0 or done == settings.steps or stop.requested:
                save_problem = None
                try:
                    save()
                except CheckpointError as error:
                    save_problem = error
                    tqdm.write(f"error: {error}")
            if bad_in_a_row >= settings.max_bad_steps:
                raise TrainingError(
                    f"{bad_in_a_row} steps in a row were not finite: lower optimizer.learning_rate, set "
                    f"optimizer.max_grad_norm=1, or use train.precision=fp32. Checkpoints are in {run.checkpoints}."
                )
            if stop.requested:
                break
    log.close()
    report = save_report(run.path, model.quantizer.codebook_size, f"{config.recipe}, {done} steps")
    if save_problem is not None:
        raise save_problem
    if stop.requested:
        print(f"Stopped by {stop.name} after step {done}; continue with --resume {run.path}")
        return stop.exit_code
    summarise(run, report)
    return 0


def is_finite(value: float) -> bool:
    return value - value == 0.0


def timed(stream: Generator[Batch, None, None]) -> Generator[tuple[Batch, float], None, None]:
    """Each batch with the seconds that the loop waited for it. Closing it ends the data workers."""
    with closing(stream):
        while True:
            start = time.perf_counter()
            try:
                batch = next(stream)
            except StopIteration:
                return
            yield batch, time.perf_counter() - start


def report_skips(run: RunFolder, batch: Batch) -> int:
    """Append the files that could not be read to ``skipped.txt`` and say so; never silent."""
    if batch.skips:
        with (run.path / "skipped.txt").open("a") as file:
            for skip in batch.skips:
                file.write(f"{skip}\n")
                tqdm.write(f"warning: skipped {skip}")
    return len(batch.skips)


def postfix(row: dict[str, float]) -> str:
    return (
        f"loss {row['loss']:.3f}, acc {row['accuracy']:.3f} (unigram {row['unigram']:.3f}), "
        f"ppl {row['perplexity']:.0f}, grad {row['grad_norm']:.2f}, lr {row['learning_rate']:.1e}, "
        f"{row['audio_seconds_per_second']:.0f} s/s, wait {row['data_wait']:.0%}, mfu {row['mfu']:.1%}"
    )


def summarise(run: RunFolder, report: Path | None) -> None:
    from bestrq2.training.run_folder import read_metrics

    rows = [row for row in read_metrics(run.path) if row["loss"]]
    tail = rows[-max(10, len(rows) // 10) :]

    def mean(name: str) -> float:
        return sum(float(row[name]) for row in tail) / len(tail)

    print(
        f"Done: {rows[-1]['step']} steps, {float(rows[-1]['audio_seconds']):.0f} s of audio in "
        f"{float(rows[-1]['elapsed_seconds']):.0f} s; over the last {len(tail)} logged steps masked accuracy "
        f"{mean('accuracy'):.3f} against {mean('unigram'):.3f} for always the commonest code"
    )
    print(f"Features:  python -m bestrq2.embed {run.path} FILES_OR_FOLDER --out features")
    if report is not None:
        print(f"Picture:   {report}")


if __name__ == "__main__":
    sys.exit(main())
