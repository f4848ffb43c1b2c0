"""Mean and deviation of the log-mel values of your audio, for standardised inputs or targets.

    bestrq2 stats --data FOLDER --config best_rq2_1_base --out stats.yaml
    bestrq2 train --data FOLDER --config my.yaml        # with the numbers under model.front_end

Writes a YAML snippet for a recipe, to standard output without ``--out``; messages then go to standard error. (With
``normalize: global`` and no numbers, training measures them itself.)
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from bestrq2.command import command, leave, output_closed
from bestrq2.console import progress_bar

# isort: split
import torch

from bestrq2.config import ConfigError, load_config, recipe_names, write_yaml
from bestrq2.data import Batch, batches
from bestrq2.durability import whole_file
from bestrq2.errors import counted, printable
from bestrq2.models import build_encoder
from bestrq2.outputs import add_overwrite, check_new
from bestrq2.train import default_recipe
from bestrq2.training.open_data import open_dataset
from bestrq2.training.statistics import measure_statistics


def _first_clips(stream: Iterable[Batch], clips: int) -> Iterator[Batch]:
    """Batches of ``clips`` clips together: the last one is cut, for batches of similar length may be large."""
    for batch in stream:
        kept = min(clips, len(batch))
        yield replace(batch, waveform=batch.waveform[:kept], lengths=batch.lengths[:kept])
        clips -= kept
        if not clips:
            return


@command
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bestrq2 stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help=f"YAML file or one of {', '.join(recipe_names())} (default: that of train)")
    parser.add_argument(
        "--data", help="folder, manifest, tar shards, .h5 or saved dataset (default: the packaged clips)"
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=1000,
        help="random clips to measure, or crops of data.crop_seconds where training takes these; at most one epoch "
        "(default: 1000)",
    )
    parser.add_argument("--out", type=Path, help="YAML file to write (default: print)")
    add_overwrite(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    if options.out is not None:  # before anything is measured
        check_new("--out", [options.out], options.overwrite)
        options.out.parent.mkdir(parents=True, exist_ok=True)
    elif output_closed():
        raise ConfigError("there is no standard output to print to: name a file with --out")
    try:
        values = {"model.front_end.normalize": "none"}
        if options.data is not None:
            values["data.source"] = options.data
        with contextlib.nullcontext() if options.out else contextlib.redirect_stdout(sys.stderr):
            config = load_config(default_recipe(options), options.overrides, values)
            dataset = open_dataset(config)
            if options.clips < 1:
                raise ConfigError(f"--clips: expected at least 1, got {options.clips}")
            clips = min(options.clips, dataset.num_slots)
            size = min(8, clips)
            # Steps of a few seconds may have fewer clips than that.
            with contextlib.closing(batches(dataset, size, num_steps=clips, workers=config.data.workers)) as stream:
                progress = progress_bar(stream, total=-(-clips // size), desc="measuring", unit="batch")
                first = _first_clips(progress, clips)
                found = measure_statistics(build_encoder(config.model).front_end, first, torch.device("cpu"))
        section = {"normalize": "global", "mean": round(found.mean, 4), "std": round(found.std, 4)}
        origin = printable(str(config.data.source or "the packaged clips"))
        what = "clip" if config.data.batching == "buckets" else "crop"  # of one clip may come several
        text = f"# over {found.frames} frames of {counted(found.clips, what)} of {origin}\n"
        text += write_yaml({"model": {"front_end": section}})
        if options.out is None:
            print(text, end="")
        else:
            check_new("--out", [options.out], options.overwrite)  # another process may have written it meanwhile
            with whole_file(options.out) as file:
                file.write(text)
            print(f"mean {found.mean:.2f} dB, deviation {found.std:.2f} dB written to {options.out}")
        return 0
    except ValueError as error:
        raise ConfigError(str(error)) from error


if __name__ == "__main__":
    leave(main())
