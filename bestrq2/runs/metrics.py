"""The log of a run: ``metrics.csv`` and TensorBoard, optionally Weights & Biases."""

import csv
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from bestrq2.config import ConfigError
from bestrq2.durability import replacing
from bestrq2.errors import TrainingError, system_reason

logger = logging.getLogger(__name__)

# The first columns of a new file. Others (validation, probes, codebooks, skip reasons) are added when they first occur.
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
    "memory_gib",
    "skipped_files",
    "skipped_steps",
    "elapsed_seconds",
    "touching_share",
)
WANDB_FILE = "wandb.json"


class MetricsLog:
    """Writes rows of numbers and pictures of one run.

    The CSV is complete after a kill at any moment: a line that was cut off is dropped when it is read, and a new column
    rewrites the file beside the old one before replacing it. While the disk is full, rows wait in memory and are
    written with the next one that fits; TensorBoard and W&B are given up with a warning when they fail, because
    training must not stop for them.

    Args:
        folder: of the run.
        last_step: rows after it, the lost stretch of a resumed run, are dropped.
        wandb: name of a W&B project, or None. The id of the W&B run is kept in ``wandb.json`` of the folder, so that a
            resumed run continues the same one (W&B keeps the rows it has of the lost stretch); a copy of the folder
            gets an id of its own. ``WANDB_MODE=offline`` and W&B's other variables work as usual.
        config: resolved configuration, for W&B.

    Raises:
        ConfigError: if ``wandb`` is asked for and not installed, or does not start.
        TrainingError: if the file cannot be written.
    """

    def __init__(
        self, folder: Path, last_step: int, wandb: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.path = folder, folder / "metrics.csv"
        self._run = _start_wandb(folder, wandb, config) if wandb else None
        self._warned: set[str] = set()
        self._pending: list[dict[str, str]] = []
        self._file: io.FileIO | None = None
        existed = self.path.exists()
        kept = [row for row in read_metrics(folder) if int(row["step"]) <= last_step]
        self.columns = [*COLUMNS, *(name for name in (kept[0] if kept else ()) if name not in COLUMNS)]
        try:
            self._keep_damaged()
            self._replace(kept)
        except OSError as error:
            raise TrainingError(f"{self.path}: the log cannot be written: {system_reason(error)}") from error
        self._board: SummaryWriter | None = None
        try:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1 if existed else None)
        except Exception as error:  # also a name of a folder that is not UTF-8
            self._give_up("TensorBoard", error)

    def write(self, row: Mapping[str, float]) -> None:
        """Log one row: ``step`` and any numbers. Several rows may have the same step; names with a slash, such as
        ``validation/loss``, are grouped by TensorBoard and W&B."""
        step = int(row["step"])
        self._pending.append({name: _short(value) for name, value in row.items()})
        self._save()
        if self._board is not None:
            try:
                for name, value in row.items():
                    if name != "step":
                        self._board.add_scalar(name, value, step)
            except Exception as error:
                self._give_up("TensorBoard", error)
        if self._run is not None:
            try:
                self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)
            except Exception as error:
                self._give_up("W&B", error)

    def has(self, step: int, names: Iterable[str]) -> bool:
        """Return True if a row of this step, written before a kill, has these numbers."""
        rows = [row for row in read_metrics(self.folder) if row["step"] == str(step)]
        return any(all(row.get(name) for name in names) for row in rows)

    def image(self, name: str, step: int, picture: Path | str | np.ndarray) -> None:
        """Log a picture: a PNG file or ``(H, W, 3)`` uint8."""
        if self._board is None and self._run is None:
            return
        if not isinstance(picture, np.ndarray):
            from PIL import Image

            with Image.open(picture) as opened:
                picture = np.asarray(opened.convert("RGB"))
        if self._board is not None:
            try:
                self._board.add_image(name, picture, step, dataformats="HWC")
            except Exception as error:
                self._give_up("TensorBoard", error)
        if self._run is not None:
            try:
                import wandb

                self._run.log({name: wandb.Image(picture)}, step=step)
            except Exception as error:
                self._give_up("W&B", error)

    def flush(self) -> None:
        """Hand everything to the system, so that a kill loses none of it."""
        self._save()
        if self._board is not None:
            try:
                self._board.flush()
            except Exception as error:
                self._give_up("TensorBoard", error)

    def close(self) -> None:
        self._save()
        if self._pending:
            logger.warning(f"{len(self._pending)} rows could not be written to {self.path}")
        if self._file is not None:
            self._file.close()
        try:
            if self._board is not None:
                self._board.close()
        except Exception as error:
            self._give_up("TensorBoard", error)
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            self._give_up("W&B", error)

    def _save(self) -> None:
        """Write the pending rows, all or none; on failure they stay pending."""
        if not self._pending:
            return
        try:
            new = list(dict.fromkeys(name for row in self._pending for name in row if name not in self.columns))
            if new:
                self._replace([*read_metrics(self.folder), *self._pending], [*self.columns, *new])
            else:
                self._append(_as_csv(self._pending, self.columns).encode())
            self._pending = []
        except OSError as error:
            self._warn(
                "metrics.csv", f"{self.path}: {system_reason(error)}; rows are kept in memory until they can be written"
            )

    def _append(self, text: bytes) -> None:
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(text)
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def _keep_damaged(self) -> None:
        """Put a log of which more than the last line is unreadable aside, because it is about to be replaced."""
        lines = self.path.read_bytes().count(b"\n") if self.path.exists() else 0
        if lines - 1 > len(read_metrics(self.folder)):
            aside = self.path.with_name("metrics.damaged.csv")
            shutil.copyfile(self.path, aside)
            self._warn("damaged", f"{self.path} is damaged: its readable rows are kept, and the file as {aside.name}")

    def _replace(self, rows: Sequence[Mapping[str, str]], columns: list[str] | None = None) -> None:
        columns = columns or self.columns
        temporary = self.path.with_suffix(".csv.partial")
        header = _as_csv([dict(zip(columns, columns))], columns)
        with replacing(self.path, temporary):
            temporary.write_bytes((header + _as_csv(rows, columns)).encode())
        if self._file is not None:
            self._file.close()
        self._file = self.path.open("ab", buffering=0)
        self.columns = columns

    def _give_up(self, name: str, error: Exception) -> None:
        if name == "TensorBoard":
            self._board = None
        else:
            self._run = None
        self._warn(name, f"{name} stopped: {type(error).__name__}: {system_reason(error)}; metrics.csv goes on")

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s", message)


def _start_wandb(folder: Path, project: str, config: Mapping[str, Any] | None) -> Any:
    try:
        from wandb import init
    except ImportError as error:  # also where a folder of this name is all there is
        raise ConfigError(
            f"train.wandb={project}: the package wandb cannot be imported ({error}); pip install wandb, or leave "
            "train.wandb out (metrics.csv and TensorBoard are always written)"
        ) from error
    try:
        return init(
            project=project,
            id=_wandb_id(folder, project),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=dict(config) if config else None,
        )
    except Exception as error:  # its own hierarchy of errors: no key, no network, no such entity
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"train.wandb={project}: W&B did not start: {reason}. WANDB_MODE=offline logs without a network."
        ) from error


def _wandb_id(folder: Path, project: str) -> str:
    """The id in ``wandb.json``, or a new one where there is none, or where it belongs to the folder that this one was
    copied from. A folder that was moved keeps its id."""
    here, found = str(folder.resolve()), _wandb_note(folder)
    identifier, home = found.get("id"), found.get("folder", here)
    if identifier is not None and home != here:
        original = Path(home)
        if _wandb_note(original).get("id") == identifier and not original.samefile(folder):
            logger.info(
                f"note: {folder} is a copy of {home}, which W&B knows as {identifier}: the copy gets its own run"
            )
            identifier = None
    if identifier is None or found.get("folder") != here:
        identifier = identifier or uuid.uuid4().hex[:12]
        text = json.dumps({"id": identifier, "project": project, "folder": here})
        (folder / WANDB_FILE).write_text(text + "\n")
    return identifier


def _wandb_note(folder: Path) -> dict[str, str]:
    """Content of ``wandb.json``; empty if it is not there or damaged."""
    try:
        found = json.loads((folder / WANDB_FILE).read_bytes())
        return {name: str(value) for name, value in found.items()} if "id" in found else {}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _as_csv(rows: Iterable[Mapping[str, str]], columns: list[str]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()


def _short(value: float) -> str:
    # Nine digits identify an fp32 exactly, so that resumed loss curves can be compared bit for bit.
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Complete rows of a run's ``metrics.csv``, numbers as text, "" where a row has no such number.

    A last line cut off by a crash is left out. Rows of another kind (validation, probes) have an empty ``loss``.
    """
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    complete = [line for line in text[: text.rfind("\n") + 1].splitlines() if "\0" not in line]
    return [row for row in csv.DictReader(complete) if _is_whole(row)]


def _is_whole(row: Mapping[str | None, str | None]) -> bool:
    """Return True if a line has as many fields as the header, and a step."""
    return (row.get("step") or "").isdecimal() and None not in row and None not in row.values()


def series(rows: Iterable[Mapping[str, str]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one column, where it has a number: two float64 arrays of equal length."""
    found = []
    for row in rows:
        with suppress(ValueError):  # "", or damaged
            found.append((float(row["step"]), float(row.get(name, ""))))
    steps, values = zip(*found) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def skip_metrics(counts: Mapping[str, int]) -> dict[str, int]:
    """Skipped files by reason as columns: ``skipped/<reason>`` for every reason that occurred."""
    return {f"skipped/{reason.replace(' ', '_')}": number for reason, number in counts.items() if number}
