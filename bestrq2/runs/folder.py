"""The folder of a run: configuration, versions, logs, checkpoints and the report."""

import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bestrq2.config import (
    Config,
    ConfigError,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    read_text,
    read_yaml,
)
from bestrq2.data import Skip
from bestrq2.durability import has_utf8_name, replacing
from bestrq2.errors import CheckpointError, TrainingError, counted, printable, system_reason
from bestrq2.outputs import alone_in, check_writable
from bestrq2.runs.checkpoint import list_checkpoints
from bestrq2.version import __version__

from .metrics import MetricsLog, read_metrics

logger = logging.getLogger(__name__)

__all__ = ["MetricsLog", "RunFolder", "git_revision", "installed_version", "read_metrics"]

CHOSEN = "chosen.json"  # keys that the user set when the run was made; config.yaml has all
LIBRARIES = ("torch", "triton", "numpy", "soundfile", "soxr", "safetensors", "omegaconf")


class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: the folder.
        checkpoints: its checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._listed: dict[int, set[str]] = {}  # lines of the lists of skipped files, by rank
        self._told: set[str] = set()  # skipped files that this process has warned of

    @classmethod
    def create(
        cls, runs: Path, name: str | None, config: Config, reuse: bool = False, chosen: Sequence[str] = ()
    ) -> "RunFolder":
        """Make a new folder ``runs/name``, or ``runs/<recipe>-NNN`` with the first free number.

        ``reuse`` allows ``runs/name`` to exist: a run that ended before its first checkpoint begins again. ``chosen``
        are the keys that the user set.

        Raises:
            ConfigError: if ``name`` exists already or the folder cannot be made.
        """
        try:
            runs.mkdir(parents=True, exist_ok=True)
            if name is not None:
                folder = runs / name
                try:
                    folder.mkdir(exist_ok=reuse)
                except FileExistsError:
                    cls.check_new(runs, name)  # its message
                    raise
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
            try:
                run.write_config(config)
                _write(run.path / CHOSEN, json.dumps(list(chosen)) + "\n")
                run.checkpoints.mkdir(exist_ok=reuse)
            except BaseException:
                run.remove_unused()  # its name must not be taken by what is no run
                raise
        except OSError as error:
            raise ConfigError(f"cannot make a run folder in {runs}: {system_reason(error)}") from error
        return run

    @staticmethod
    def check_new(runs: Path, name: str | None, reuse: bool = False) -> None:
        """Refuse what :meth:`create` would refuse, before the work that comes first. Nothing is written.

        Raises:
            ConfigError: if ``name`` is none or exists already, or nothing can be written to ``runs``.
        """
        if name is not None and (name in ("", ".", "..") or os.path.basename(name) != name):
            raise ConfigError(f"--name {name}: expected a name without folders; --runs FOLDER says where runs are made")
        if not has_utf8_name(folder := runs / (name or "")):  # weights could be written there, and not be read
            raise ConfigError(f"--name, --runs: expected names in UTF-8, got {printable(str(folder))}")
        if name is not None and not reuse and folder.exists():
            raise ConfigError(f"--name {name}: {folder} exists; use --resume {shlex.quote(str(folder))} to continue it")
        check_writable("--runs", runs)

    def remove_unused(self) -> bool:
        """Remove the folder of a run that failed before anything was logged; True if it was removed."""
        try:
            if self.checkpoints.is_dir() and any(self.checkpoints.iterdir()):
                return False
            unused = {".lock", "checkpoints", "config.yaml", CHOSEN, "skipped.txt"}
            kept = {path.name for path in self.path.iterdir()} - unused
            if not kept:
                shutil.rmtree(self.path)
            return not kept
        except OSError:
            return False

    @classmethod
    def existing(cls, runs: Path, path: str | None) -> "RunFolder":
        """The run at ``path``, or of that name in ``runs``; without it the one whose checkpoints are newest.

        Raises:
            ConfigError: if there is no run with a checkpoint.
            CheckpointError: without ``path``, if a run in ``runs`` may not be read: it may be the newest.
        """
        if path:
            for folder in (Path(path), runs / path):
                if (folder / "config.yaml").exists() or list_checkpoints(folder / "checkpoints"):
                    return cls(folder)
            raise ConfigError(
                f"--resume {path}: expected a run folder with config.yaml or checkpoints, or the name of one in {runs}"
            )
        written: dict[Path, float] = {}
        for folder in _folders_in(runs):
            try:
                os.stat(folder / "config.yaml")
                checkpoints = list_checkpoints(folder / "checkpoints")
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (CheckpointError, PermissionError) as error:
                reason = error if isinstance(error, CheckpointError) else f"{folder} may not be read"
                raise CheckpointError(f"--resume: {reason}. To continue another run, name it") from error
            if checkpoints:
                written[folder] = max(checkpoint.stat().st_mtime for checkpoint in checkpoints)
        if not written:
            raise ConfigError(f"--resume: no run with a checkpoint in {runs}")
        return cls(max(written, key=lambda folder: written[folder]))

    def write_config(self, config: Config) -> None:
        """
        Raises:
            ConfigError: if the file cannot be written; the one there stays as it was.
        """
        try:
            _write(self.path / "config.yaml", config_to_yaml(config))
        except OSError as error:
            raise ConfigError(f"{self.path / 'config.yaml'} cannot be written: {system_reason(error)}") from error

    def read_config(self, saved: Mapping[str, Any] | None = None) -> Config:
        """The configuration in ``config.yaml``.

        Args:
            saved: the configuration of a checkpoint of this run. It is taken, with a warning, if the file cannot be
                read or lacks entries that ``saved`` has: a file cut short would mean defaults.

        Raises:
            ConfigError: if the file is damaged and ``saved`` is not given, or it may not be read.
        """
        path = self.path / "config.yaml"
        try:
            values = read_yaml(read_text(path, "configuration"), str(path))
        except ConfigError as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            problem = str(error).splitlines()[0] if path.exists() else "there is no such file"
        else:
            missing = _first_missing(values, saved or config_to_dict(Config()))
            if missing is None:
                return config_from_dict(values)
            problem = f"no entry {missing}"
        if saved is None:
            raise ConfigError(f"{path}: damaged or cut short ({problem})")
        logger.warning(f"{path} is damaged or cut short ({problem}); the configuration of the checkpoint is used")
        return config_from_dict(dict(saved))

    def read_chosen(self) -> list[str]:
        """Keys that the user set when the run was made; empty where an earlier version wrote none."""
        try:
            found = json.loads((self.path / CHOSEN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [key for key in found if isinstance(key, str)] if isinstance(found, list) else []

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training into this folder; ``with`` raises TrainingError if one does."""
        refusal = TrainingError(f"{self.path}: another process trains in this run folder; stop it first")
        return alone_in(self.path, refusal, ".lock")

    def report_skips(self, skips: Sequence[Skip], rank: int = 0) -> None:
        """Append the files that could not be read to ``skipped.txt`` (one per rank) and print a warning of each, once:
        a file is drawn again in every epoch. How often is in the log of the run."""
        self.note_skips(skips, rank)
        for text in dict.fromkeys(map(str, skips)):
            if text not in self._told:
                self._told.add(text)
                logger.warning(f"skipped {text}")

    def note_skips(self, skips: Sequence[Skip], rank: int = 0) -> None:
        """Append to ``skipped.txt`` alone, for files that were spoken of already; each file and reason once."""
        path = self.path / ("skipped.txt" if rank == 0 else f"skipped-rank{rank}.txt")
        try:
            if skips and rank not in self._listed:  # also what an earlier start of the run has listed
                there = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
                self._listed[rank] = set(there)
            listed = self._listed.get(rank, set())
            new = [line for line in dict.fromkeys(map(str, skips)) if line not in listed]
            if new:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in new)
                listed.update(new)
        except OSError as error:
            logger.warning(f"{path}, the list of skipped files, could not be written: {system_reason(error)}")

    def resume_command(self) -> str:
        """The command line that continues this run."""
        return f"bestrq2 train --resume {shlex.quote(str(self.path))}"

    def summarise(self, report: Path | None, source: Path | str) -> None:
        """Log the results of the run. ``source`` is the encoder to take features from."""
        rows = [row for row in read_metrics(self.path) if row["loss"]]
        if not rows:
            logger.warning(
                f"the log {self.path / 'metrics.csv'} is gone: if the folder was moved during training, the later "
                f"checkpoints are in {self.checkpoints}"
            )
            return
        tail = rows[-max(10, len(rows) // 10) :]

        def mean(name: str) -> float:
            return sum(float(row[name]) for row in tail) / len(tail)

        last = "the last logged step" if len(tail) == 1 else f"the last {len(tail)} logged steps"
        logger.info(
            f"Done: {counted(int(rows[-1]['step']), 'step')}, {float(rows[-1]['audio_seconds']):.0f} s of audio in "
            f"{float(rows[-1]['elapsed_seconds']):.0f} s; over {last} masked accuracy "
            f"{mean('accuracy'):.3f} against {mean('unigram'):.3f} for always the commonest code"
        )
        logger.info(f"Features:  bestrq2 embed {shlex.quote(str(source))} FILES_OR_FOLDER --out features")
        if report is not None:
            logger.info(f"Report:    {report}")

    def write_versions(self, device: str, processes: int = 1) -> None:
        """Record what this run ran on, appended once per start."""
        record = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(sys.argv),
            "bestrq2": __version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": processor_name(),
            "device": device,
            "threads": torch.get_num_threads(),
            "processes": processes,
            **{name: installed_version(name) for name in LIBRARIES},
        }
        try:
            _write(self.path / "versions.json", json.dumps([*self.read_versions(), record], indent=1) + "\n")
        except OSError as error:
            logger.warning(f"{self.path / 'versions.json'} could not be written: {system_reason(error)}")

    def read_versions(self) -> list[dict[str, Any]]:
        """The record of every start of this run, oldest first."""
        try:
            found = json.loads((self.path / "versions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return found if isinstance(found, list) else []


def _folders_in(runs: Path) -> list[Path]:
    try:
        with os.scandir(runs) as entries:
            return [runs / entry.name for entry in entries if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"--runs {runs}: cannot be listed: {system_reason(error)}") from error


def _first_missing(values: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first key that ``expected`` has and ``values`` has not."""
    for key, entry in expected.items():
        if key not in values:
            return f"{prefix}{key}"
        if isinstance(entry, Mapping):
            inner = values[key] if isinstance(values[key], Mapping) else {}
            if (found := _first_missing(inner, entry, f"{prefix}{key}.")) is not None:
                return found
    return None


def _write(path: Path, text: str) -> None:
    """Replace a file whole: a kill in the middle must not leave a run that cannot be resumed."""
    with replacing(path, path.with_name(path.name + ".partial")) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def processor_name() -> str:
    """Model name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


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
