"""Pretrain an audio encoder.

    bestrq2 train                        # tiny model on the 24 clips of the package, less than a minute
    bestrq2 train --data FOLDER --config best_rq2_small
    bestrq2 train --data clips.csv --config recipe.yaml train.steps=20000 model.masking.ratio=[0.6,0.8]
    bestrq2 train --resume runs/best_rq2_small-001
    bestrq2 train --find-batch --config best_rq2_small           # what fits, what is fastest
    bestrq2 train --frozen-encoder runs/best_rq2_small-001       # only a head, on cached embeddings
    torchrun --nproc-per-node 8 --max-restarts 3 -m bestrq2 train --config best_rq2_base --data FOLDER --name b --resume

Everything about a run is in its folder: configuration, versions, metrics.csv, TensorBoard events, report.png and
checkpoints. Exit codes: 0 done, 2 an error with a message, 130 or 143 saved and stopped by SIGINT or SIGTERM.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bestrq2.command import command, leave, sentence

# isort: split
import torch

from bestrq2.config import Config, ConfigError, config_from_dict, load_config, recipe_names, with_overrides
from bestrq2.config.describing import describe
from bestrq2.config.loading import chosen_keys
from bestrq2.config.rules import unused_values
from bestrq2.data import CropDataset, DataError
from bestrq2.data.content import changed_files, replaced_files
from bestrq2.data.fingerprint import data_fingerprint
from bestrq2.errors import BestRQError, CheckpointError, TrainingError, printable
from bestrq2.hardware import APPLE, choose_device, choose_precision
from bestrq2.hashing import mix
from bestrq2.interchange.opening import open_teacher
from bestrq2.models import BestRQ, BestRQ2, build_model
from bestrq2.runs.changes import check_resume
from bestrq2.runs.checkpoint import Checkpoint, clear_leftovers, list_checkpoints, newest_intact, read_state
from bestrq2.runs.folder import RunFolder
from bestrq2.runs.metrics import read_metrics
from bestrq2.training.batch_finder import find_batch
from bestrq2.training.distributed import Ranks, shared
from bestrq2.training.frozen import train_head
from bestrq2.training.initial_weights import load_initial, settle_initial
from bestrq2.training.open_data import fill_statistics, open_dataset
from bestrq2.training.optimizer import learning_rate
from bestrq2.training.target_setup import fit_targets, settle_targets
from bestrq2.training.trainer import Trainer

DEFAULT_RECIPE = "best_rq2_tiny"  # for the clips of the package
OWN_DATA_RECIPE = "best_rq2_transfer_small"
NO_OTHER_CLIPS = ("data.source:", "data.workers:")  # the same files elsewhere, or decoded by others, are the same clips


@partial(command, ranks=True)
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        help=f"a YAML file, or a recipe: {', '.join(recipe_names())} (default: "
        f"{OWN_DATA_RECIPE} with --data, else {DEFAULT_RECIPE})",
    )
    parser.add_argument("--data", help="folder of audio, CSV/JSONL manifest, tar shards, HDF5 or Parquet file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue a run (default: the newest one); with --name: continue that one, or begin it",
    )
    parser.add_argument(
        "--frozen-encoder", metavar="ENCODER", help="train only a head on the embeddings of this encoder"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code of ENCODER's transformers folder"
    )
    parser.add_argument(
        "--find-batch", action="store_true", help="measure which batch sizes fit on one rank and how fast they are"
    )
    parser.add_argument(
        "--show-config", action="store_true", help="print every key with its value and one line about it, then exit"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    parser.add_argument("--name", help="name of the new run folder (default: the recipe and a number)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=1000 data.crop_seconds=4")
    # Intermixed, so that overrides may stand before, between and behind the options.
    options = parser.parse_intermixed_args(arguments)
    if options.resume and "=" in options.resume and not Path(options.resume).exists():
        options.overrides.insert(0, options.resume)  # "--resume train.steps=100": an override followed the bare option
        options.resume = ""
    for option, chosen in (("--find-batch", options.find_batch), ("--show-config", options.show_config)):
        if chosen and options.resume is not None:
            parser.error(f"{option} is about a new run: drop --resume (what a run uses is in its config.yaml)")
    if options.show_config:
        print(describe(load_config(default_recipe(options), options.overrides, chosen_values(options))))
        return 0
    ranks = Ranks.start()
    try:
        return run(options, ranks)
    except Exception as error:
        if ranks.size == 1:
            raise
        return ranks.tell_end(error, sentence(error))
    finally:
        ranks.close()


def run(options: argparse.Namespace, ranks: Ranks) -> int:
    if ranks.size > 1 and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and options.resume is None:
        raise shared(
            ConfigError("--max-restarts: torchrun repeats this command line, so it needs --name NAME --resume")
        )
    values = chosen_values(options)
    folder = ranks.from_first(lambda: folder_to_resume(options))
    if folder is not None:
        with alone_in(folder, ranks):
            return resume(folder, options.overrides, values, ranks)
    config = ranks.from_first(lambda: load_config(default_recipe(options), options.overrides, values))
    chosen = ranks.from_first(lambda: chosen_keys(default_recipe(options), options.overrides))
    for text in unused_values(config, chosen):
        ranks.say(f"note: {text}")
    if options.find_batch and config.frozen.source:
        raise shared(
            ConfigError("--find-batch measures pretraining, not the training of a head: drop --frozen-encoder")
        )
    # What would end the run later is refused before the data are read, which may take long.
    ranks.all_agree(lambda: choose_precision(config.train.precision, device_of(config, ranks)))
    if not options.find_batch:
        ranks.from_first(lambda: RunFolder.check_new(options.runs, options.name, options.resume is not None))
    config = ranks.from_first(lambda: settle_initial(config))
    dataset = ranks.from_first(lambda: open_dataset(config))
    config = ranks.from_first(lambda: fill_statistics(config, dataset))
    if options.find_batch:
        return find_batch(config, seeded_model(config), ranks)
    if not config.frozen.source:
        config = ranks.from_first(lambda: settle_targets(config, dataset, device_of(config, ranks)))
    new = ranks.from_first(
        lambda: RunFolder.create(options.runs, options.name, config, options.resume is not None, chosen)
    )
    with alone_in(new, ranks):
        if ranks.is_first:
            new.note_skips(dataset.left_out)
        try:
            with lost_ranks_told(new, ranks):
                return start(config, dataset, new, None, ranks)
        except BaseException as error:
            if ranks.is_first and new.remove_unused() and isinstance(error, KeyboardInterrupt):
                print(f"nothing was saved yet, {new.path} is removed; the same command starts again", file=sys.stderr)
            raise


def default_recipe(options: argparse.Namespace) -> str:
    """The configuration to begin with: ``--config``, or the default for audio of one's own or for the packaged clips.
    A head on a frozen encoder keeps the simple targets: they are not fitted there."""
    if options.config is not None:
        return str(options.config)
    own = options.data is not None or any(text.startswith("data.source=") for text in options.overrides)
    frozen = getattr(options, "frozen_encoder", None)
    return OWN_DATA_RECIPE if own and not frozen else DEFAULT_RECIPE


def chosen_values(options: argparse.Namespace) -> dict[str, Any]:
    """Configuration values that have an option of their own."""
    values: dict[str, Any] = {}
    if options.data is not None:
        values["data.source"] = options.data
    if options.frozen_encoder is not None:
        if not options.frozen_encoder.strip():
            raise ConfigError("--frozen-encoder: expected the place of an encoder, got an empty name")
        values["frozen.source"] = options.frozen_encoder
    if options.trust_remote_code:
        values["frozen.trust_remote_code"] = True
    return values


@contextmanager
def alone_in(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """No other process trains into this folder; what a killed one left half written in it is cleared away."""
    with ExitStack() as stack:
        ranks.from_first(lambda: stack.enter_context(run.locked()))
        ranks.from_first(lambda: clear_leftovers(run.checkpoints))
        yield


def folder_to_resume(options: argparse.Namespace) -> RunFolder | None:
    """The run to continue, or None if a new one begins."""
    if options.resume is None:
        return None
    if options.name is None:
        if options.config:
            raise ConfigError("--resume takes the configuration from the run folder: drop --config")
        return RunFolder.existing(options.runs, options.resume or None)
    if options.resume:
        raise ConfigError(f"--name {options.name} --resume {options.resume}: name the run once")
    named = RunFolder(options.runs / options.name)
    if not list_checkpoints(named.checkpoints):
        return None
    if options.config:
        print(f"note: the configuration of {named.path} is used, not --config {options.config}", file=sys.stderr)
    return named


def resume(run: RunFolder, overrides: list[str], values: dict[str, Any], ranks: Ranks) -> int:
    checkpoint = ranks.from_first(lambda: newest_checkpoint(run))
    saved = None if checkpoint is None else checkpoint.config
    own = ranks.from_first(lambda: run.read_config(saved))
    config = ranks.from_first(lambda: with_overrides(own, overrides, values))
    given = ranks.from_first(lambda: chosen_keys("", overrides))
    chosen = dict.fromkeys((*ranks.from_first(run.read_chosen), *given))
    for text in unused_values(config, chosen):
        # The one seed that was kept of several candidates, for which clips were fitted, is all that a run records.
        if "model.targets.fit_clips" in given or not text.startswith("model.targets.fit_clips "):
            ranks.say(f"note: {text}")
    if checkpoint is None:
        ranks.from_first(lambda: check_never_saved(run, own))
        ranks.say(f"{run.path} ended before its first checkpoint: it begins again")
    else:
        ranks.say(f"Resuming {run.path} from step {checkpoint.step} ({checkpoint.folder.name})")
    changes = []
    if checkpoint is not None:
        before = config_from_dict(checkpoint.config)
        changes = ranks.from_first(lambda: check_resume(before, config, checkpoint.step))
        old_rate, rate = (learning_rate(checkpoint.step, c.train.steps, c.optimizer) for c in (before, config))
        if abs(rate - old_rate) > 1e-6 * old_rate and checkpoint.step < config.train.steps:
            changes.append(f"the learning rate of the next step: {old_rate:.3g} -> {rate:.3g}")
    moved = config.data.source != own.data.source or any(change.startswith("data.source:") for change in changes)
    dataset = ranks.from_first(lambda: reopen_dataset(config, run, moved))
    found = ranks.from_first(lambda: data_fingerprint(dataset))
    expected = found if checkpoint is None else checkpoint.extra.get("data")
    if found != expected:
        told = {} if checkpoint is None else checkpoint.extra
        what = ranks.from_first(lambda: changed_files(dataset.files, told.get("content"), told.get("files")))
        elsewhere = [change for change in changes if change.startswith("data.source:")]
        what = ": ".join([*elsewhere, what or "files, durations or domains differ"])
        deciding = ("data.",) if config.data.batch_seconds is None else ("data.", "train.batch_size:")
        named = [text for text in changes if text.startswith(deciding) and not text.startswith(NO_OTHER_CLIPS)]
        problem = TrainingError(
            f"the clips of every step would be others (fingerprint {found} instead of {expected}): "
            f"{'; '.join(named)}. This cannot change on resume: leave it out, or start a new run."
            if named
            else f"the training data changed since the checkpoint was written (fingerprint {found} instead of "
            f"{expected}): {what}. Restore them, or start a new run, which train.init_from={run.path} lets begin with "
            "these weights."
        )
        raise shared(problem)
    for change in changes:
        ranks.say(f"Changed on resume: {change}")
    if checkpoint is not None:
        recorded = checkpoint.extra.get("content")
        ranks.from_first(lambda: warn_of_replaced(dataset, recorded))
    write = bool(overrides or values or changes)
    if write:
        ranks.all_agree(lambda: open_teacher(config))  # one that is refused must not be left in the run's configuration
    with lost_ranks_told(run, ranks):
        return start(config, dataset, run, checkpoint, ranks, write)


def reopen_dataset(config: Config, run: RunFolder, moved: bool) -> CropDataset:
    """Find the audio of a run again; where its place is gone and no other was named, the error tells how to name it."""
    try:
        return open_dataset(config)
    except DataError as error:
        source = config.data.source
        if moved or not isinstance(source, str) or os.path.exists(source) or "{" in source:
            raise
        raise DataError(
            f"{source}, the data of this run, does not exist. If it was moved, name the new place: "
            f"{run.resume_command()} --data PLACE"
        ) from error


def warn_of_replaced(dataset: CropDataset, recorded: str | None) -> None:
    """Name files that are others than those the checkpoint was trained on, though names and lengths are the same."""
    replaced, compared = replaced_files(dataset.files, recorded)
    if replaced:
        more = f" and {len(replaced) - 1} more" if len(replaced) > 1 else ""
        print(
            f"warning: the content of {printable(replaced[0].path)}{more} changed since the checkpoint was written "
            f"({compared} of {len(dataset.files)} files were compared): the run goes on with what is there now",
            file=sys.stderr,
        )


def check_never_saved(run: RunFolder, config: Config) -> None:
    """Refuse to begin a run again, over its curves, whose checkpoints were deleted.

    Raises:
        CheckpointError: if it was trained beyond the step of its second checkpoint. One that was killed while it wrote
            the first, beside further steps, begins again.
    """
    done = max((int(row["step"]) for row in read_metrics(run.path)), default=0)
    if done > 2 * config.train.save_every:
        raise CheckpointError(
            f"{run.path} was trained for {done} steps, but {run.checkpoints} holds no checkpoint: bring one back, or "
            "start a new run"
        )


def newest_checkpoint(run: RunFolder) -> Checkpoint | None:
    """None if the run ended before it wrote any."""
    checkpoint, problems = newest_intact(run.checkpoints)
    for problem in problems:
        print(f"warning: skipped a damaged checkpoint: {problem}", file=sys.stderr)
    if checkpoint is None and problems:
        raise CheckpointError(f"{run.checkpoints}: no intact checkpoint to resume from")
    if checkpoint is None and not run.checkpoints.is_dir():
        raise CheckpointError(
            f"{run.checkpoints} is gone, and with it what --resume needs: bring it back, or start a new run"
        )
    return checkpoint


def start(
    config: Config,
    dataset: CropDataset,
    run: RunFolder,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
    write: bool = False,
) -> int:
    """Train; with ``write`` the configuration goes to the run folder, once all that can be checked before is."""
    if not config.frozen.source:
        model = seeded_model(config, ranks)
        if checkpoint is None:
            fit_targets(model, config, dataset, device_of(config, ranks), ranks)
            if config.train.init_from is not None:
                ranks.say(ranks.all_agree(lambda: load_initial(model, config)))
        trainer = Trainer(config, model, dataset, run, ranks, checkpoint)
        if write:
            ranks.from_first(lambda: run.write_config(config))
        return trainer.train()
    return train_head(config, dataset, run, checkpoint, ranks, write)


@contextmanager
def lost_ranks_told(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Say from where a run goes on whose other ranks are gone.

    The present step is not saved: counts of codes that a rank made since the last checkpoint are gone with it.

    Raises:
        TrainingError: in place of what gloo says.
    """
    try:
        yield
    except RuntimeError as error:
        told = sentence(error) or ""
        if ranks.size == 1 or isinstance(error, BestRQError) or not told.startswith("another rank"):
            raise
        saved = list_checkpoints(run.checkpoints)
        begin = f"goes on from step {read_state(saved[-1])['step']}" if saved else "begins again: nothing was saved yet"
        raise TrainingError(f"{told.split(' (')[0]}; {run.resume_command()} {begin}") from error


def seeded_model(config: Config, ranks: Ranks | None = None) -> BestRQ2 | BestRQ:
    """The model as training begins: its weights are a function of the configuration, and of a teacher if it has one."""
    teacher = open_teacher(config) if ranks is None else ranks.all_agree(lambda: open_teacher(config))
    torch.manual_seed(mix(config.train.seed, 1) >> 1)
    return build_model(config, teacher)


def device_of(config: Config, ranks: Ranks) -> torch.device:
    device = choose_device(config.train.device, ranks.local_rank)
    if config.train.device == "auto" and device.type == APPLE and ranks.size > 1:
        return torch.device("cpu")  # several ranks cannot exchange gradients of an Apple GPU
    return device


if __name__ == "__main__":
    leave(main())
