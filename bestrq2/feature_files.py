"""Files of features: one array for each audio file with an index, or one Parquet table."""

import csv
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bestrq2.durability import named_in_errors, whole_file, write_array
from bestrq2.errors import ConfigError

__all__ = ["NPY_RESULTS", "PARQUET_RESULTS", "NpyWriter", "ParquetWriter", "Writer"]

NPY_RESULTS, PARQUET_RESULTS = ("clips.npy", "index.csv"), ("features.parquet",)


class Writer(Protocol):
    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None: ...

    def close(self) -> list[Path]: ...

    def discard(self) -> None: ...


class NpyWriter:
    """One array file per audio file, and an index; all in a hidden folder until the last is written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.partial = folder, folder / ".features.partial"
        self.discard()  # what a killed process left
        self.partial.mkdir()
        self.rows: list[dict[str, Any]] = []
        self.clips: list[np.ndarray] = []

    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None:
        path = self.partial / "features" / f"{record['name']}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_array(path, features)
        self.rows.append({**record, "features": str(path.relative_to(self.partial))})
        self.clips.append(clip)

    def close(self) -> list[Path]:
        write_array(self.partial / "clips.npy", np.stack(self.clips))
        with whole_file(self.partial / "index.csv") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        self._remove_earlier()
        # The index last: it makes them results.
        for name in (*(row["features"] for row in self.rows), *NPY_RESULTS):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.partial / name).replace(self.folder / name)
        self.discard()
        return [self.folder / "features", *(self.folder / name for name in NPY_RESULTS)]

    def _remove_earlier(self) -> None:
        """The features that an earlier index names: among the new ones they would pass for these."""
        index = self.folder / NPY_RESULTS[-1]
        try:
            with open(index, encoding="utf-8", newline="") as file:
                earlier = [row["features"] for row in csv.DictReader(file)]
        except (OSError, ValueError, KeyError):  # none, or a file of somebody else
            earlier = []
        index.unlink(missing_ok=True)
        for name in earlier:
            if name and name.startswith("features" + os.sep) and ".." not in Path(name).parts:
                (self.folder / name).unlink(missing_ok=True)

    def discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)


class ParquetWriter:
    """One row per file; ``features`` and ``clip`` are flattened arrays."""

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError("--format parquet needs pyarrow: pip install 'bestrq2[parquet]'") from error
        self.arrow, self.parquet = pyarrow, pyarrow.parquet
        self.path = folder / "features.parquet"
        self.partial = folder / ".features.parquet.partial"
        self.writer: Any = None

    def add(self, record: dict[str, Any], features: np.ndarray, clip: np.ndarray) -> None:
        vector = self.arrow.list_(self.arrow.float32())
        columns = {name: self.arrow.array([value]) for name, value in record.items()}
        columns["clip"] = self.arrow.array([clip.reshape(-1)], vector)
        columns["features"] = self.arrow.array([features.reshape(-1)], vector)
        table = self.arrow.table(columns)
        with named_in_errors(self.path):
            if self.writer is None:
                self.writer = self.parquet.ParquetWriter(self.partial, table.schema)
            self.writer.write_table(table)

    def close(self) -> list[Path]:
        with named_in_errors(self.path):
            self.writer.close()
            self.partial.replace(self.path)
        return [self.path]

    def discard(self) -> None:
        """Remove what was written of an unfinished table."""
        self.partial.unlink(missing_ok=True)
