"""Mean and deviation of the log-mel values of your audio, for standardised inputs or targets.

    python -m bestrq2.stats --data FOLDER --config best_rq2_1_base --out stats.yaml
    python -m bestrq2.train --data FOLDER --config my.yaml        # with the numbers under model.front_end

Writes a YAML snippet for a recipe. (With ``normalize: global`` and no numbers, training measures them itself.)
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from bestrq2.config import ConfigError, load_config, recipe_names
from bestrq2.data import AudioError, DataError, ManifestError, batches
from bestrq2.errors import TrainingError
from bestrq2.models import build_encoder
from bestrq2.train import DEFAULT_RECIPE
from bestrq2.training.open_data import open_dataset
from bestrq2.training.statistics import measure_statistics


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bestrq2.stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"YAML file or one of {', '.join(recipe_names())}")
    parser.add_argument(
        "--data", help="folder, manifest, tar shards, .h5 or saved dataset (default: the packaged clips)"
    )
    parser.add_argument(
        "--clips", type=int, default=1000, help="random clips to measure, at most one epoch (default: 1000)"
    )
    parser.add_argument("--out", type=Path, help="YAML file to write (default: print)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    try:
        overrides = [*options.overrides, "model.front_end.normalize=none"]
        if options.data is not None:
            overrides.append(f"data.source={json.dumps(options.data)}")
        config = load_config(options.config, overrides)
        dataset = open_dataset(config)
        if options.clips < 1:
            raise ConfigError(f"--clips: expected at least 1, got {options.clips}")
        clips = min(options.clips, dataset.num_slots)
        size = min(8, clips)
        stream = batches(dataset, size, num_steps=-(-clips // size), workers=config.data.workers)
        progress = tqdm(stream, total=-(-clips // size), desc="measuring", unit="batch")
        found = measure_statistics(build_encoder(config.model).front_end, progress, torch.device("cpu"))
        section = {"normalize": "global", "mean": round(found.mean, 4), "std": round(found.std, 4)}
        text = f"# over {found.frames} frames of {found.clips} clips of {config.data.source or 'the packaged clips'}\n"
        text += OmegaConf.to_yaml(OmegaConf.create({"model": {"front_end": section}}))
        if options.out is None:
            print(text, end="")
        else:
            options.out.write_text(text)
            print(f"mean {found.mean:.2f} dB, deviation {found.std:.2f} dB written to {options.out}")
        return 0
    except (ConfigError, ManifestError, AudioError, DataError, TrainingError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {options.out}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
