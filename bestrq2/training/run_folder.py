"""The folder of a run: configuration, versions, logs, checkpoints and the report."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from bestrq2.checkpoint import list_checkpoints
from bestrq2.config import Config, ConfigError, config_from_dict, config_to_yaml
from bestrq2.version import __version__

LIBRARIES = ("torch", "triton", "numpy", "soundfile", "soxr", "safetensors", "omegaconf")
COLUMNS = (
    "step",
    "loss",
    "accuracy",
    "unigram",
    "perplexity",
    "codes_used",
    "grad_norm",
    "learning_rate",
    "mask_ratio",
    "padding_share",
    "audio_seconds",
    "audio_seconds_per_second",
    "data_wait",
    "mfu",
    "skipped_files",
    "skipped_steps",
    "elapsed_seconds",
)


class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: the folder.
        checkpoints: its checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, runs: Path, name: str | None, config: Config) -> "RunFolder":
        """Make a new folder ``runs/name``, or ``runs/<recipe>-NNN`` with the first free number.

        Raises:
            ConfigError: if ``name`` exists already or the folder cannot be made.
        """
        try:
            runs.mkdir(parents=True, exist_ok=True)
            if name is not None:
                folder = runs / name
                if folder.exists():
                    raise ConfigError(f"--name {name}: {folder} exists; use --resume {folder} to continue it")
                folder.mkdir()
            else:
                number = 1
                while True:
                    folder = runs / f"{config.recipe}-{number:03d}"
                    try:
                        folder.mkdir()
                        break
                    except FileExistsError:
                        number += 1
            run = cls(folder)
            run.write_config(config)
            run.checkpoints.mkdir()
        except OSError as error:
            raise ConfigError(f"cannot make a run folder in {runs}: {error}") from error
        return run

    @classmethod
    def existing(cls, runs: Path, path: str | None) -> "RunFolder":
        """The run at ``path``, or the one in ``runs`` whose checkpoints are newest.

        Raises:
            ConfigError: if there is no run with a checkpoint.
        """
        if path:
            run = cls(Path(path))
            if not (run.path / "config.yaml").exists():
                raise ConfigError(f"--resume {path}: expected a run folder with config.yaml")
            return run
        found = [cls(p.parent) for p in runs.glob("*/config.yaml")]
        found = [run for run in found if list_checkpoints(run.checkpoints)]
        if not found:
            raise ConfigError(f"--resume: no run with a checkpoint in {runs}")
        return max(found, key=lambda run: max(p.stat().st_mtime for p in list_checkpoints(run.checkpoints)))

    def write_config(self, config: Config) -> None:
        (self.path / "config.yaml").write_text(config_to_yaml(config))

    def read_config(self) -> Config:
        values = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        return config_from_dict(values)  # type: ignore[arg-type]

    def write_versions(self, device: str) -> None:
        """Record what this run ran on, appended once per start."""
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(sys.argv),
            "bestrq2": __version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device,
            "threads": torch.get_num_threads(),
            **{name: installed_version(name) for name in LIBRARIES},
        }
        path = self.path / "versions.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*earlier, record], indent=1))


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Commit of the checkout that bestrq2 is imported from (with "+changes" if it differs), or None outside of one."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, capture_output=True, check=True, timeout=10, env=environment)
        revision = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(
            revision, capture_output=True, text=True, check=True, timeout=10, env=environment
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class MetricsLog:
    """``metrics.csv`` and TensorBoard events of a run. Rows after ``last_step`` (a lost stretch) are dropped."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.csv"
        kept = [row for row in read_metrics(folder) if int(row["step"]) <= last_step]
        temporary = self.path.with_suffix(".csv.partial")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(self.path)
        self.file = self.path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1 if kept else None)

    def write(self, row: Mapping[str, float]) -> None:
        self.writer.writerow({key: _short(value) for key, value in row.items()})
        self.file.flush()
        for key, value in row.items():
            if key != "step":
                self.board.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _short(value: float) -> Any:
    # Nine digits identify an fp32 exactly, so that resumed loss curves can be compared bit for bit.
    return value if isinstance(value, int) else f"{value:.9g}"


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Complete rows of a run's ``metrics.csv`` (a last line cut off by a crash is left out)."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    complete = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(complete) if row.get("step") and None not in row.values()]
