"""Hugging Face datasets on disk: folders of ``save_to_disk`` (.arrow) and .parquet files with an audio column.

They are read with pyarrow, without the ``datasets`` package. The audio column is the one that the file's own metadata
calls Audio, else one with the fields ``bytes`` and ``path``: the bytes of an audio file, or the path of one; else one
of bytes called ``audio``; else one of text that is called ``audio`` or as a path in a manifest. Of several one must be
called ``audio``. Columns ``duration``, ``sampling_rate``, ``domain`` and ``label`` are used if they are there, and
``split`` chooses rows as in a manifest. Where rows name files, ``start``, ``end`` and all other columns mean what they
mean in a manifest (:mod:`bestrq2.data.fields`). Audio in the table itself is taken whole: there such columns say what
it was cut out of. The address of row i is ``file.arrow::i``. A row of an .arrow file is found in constant time; of a
.parquet file a whole row group is read, so for training many rows pack it into tar shards first (``bestrq2 shards``).
"""

import bisect
import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO

from bestrq2.data.archives.arrow_columns import (
    USED,
    audio_columns,
    class_names,
    columns_to_read,
    features,
    is_plain,
    is_text,
    no_audio,
    path_name,
)
from bestrq2.data.cells import as_cell
from bestrq2.data.channels import asks_for_first_channel
from bestrq2.data.columns import of_archive, of_manifest
from bestrq2.data.fields import audio_file, known_columns
from bestrq2.data.files import AudioFile, Listing, address
from bestrq2.data.splits import split_of_row
from bestrq2.errors import AudioError, DataError, Skip, check_open_files, system_reason

__all__ = ["list_arrow", "open_arrow_clip", "saved_dataset_files"]

_OPEN_FILES = 64
_ROW_GROUPS = 4  # kept for each .parquet file

_tables: OrderedDict[tuple[int, str], tuple[tuple[int, int], "_Table"]] = OrderedDict()
_lock = threading.Lock()


class _Table:
    """An open file: rows by number. ``damage`` says what could not be read of it."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(f'{path}: Arrow and Parquet need pyarrow: pip install "bestrq2[datasets]"') from error
        self.path, self.damage = path, ""
        self._parquet: Any = None
        self._groups: OrderedDict[int, Any] = OrderedDict()
        if Path(path).suffix.lower() == ".parquet":
            self._parquet = pyarrow.parquet.ParquetFile(path, memory_map=True)
            self.schema = self._parquet.schema_arrow
            metadata = self._parquet.metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        else:
            self._batches = self._read_stream(pyarrow)
            sizes = [len(batch) for batch in self._batches]
        self._ends = list(accumulate(sizes))
        self.num_rows = self._ends[-1] if self._ends else 0
        self.column, self.rivals = audio_columns(self.schema)

    def _read_stream(self, pyarrow: Any) -> list[Any]:
        """All record batches of an Arrow stream or file: they stay on disk, mapped into memory."""
        source = pyarrow.memory_map(self.path)
        whole_file = False  # with an index of its batches at its end
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file, whole_file = pyarrow.ipc.open_file(source), True
            self.schema = file.schema
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            self.schema = reader.schema
        batches: list[Any] = []
        try:
            for batch in reader:
                batch.validate(full=True)  # damaged offsets would be followed out of the file, and the process die
                batches.append(batch)
            at, size = source.tell(), source.size()
            if not whole_file and (at < size or not _is_closed(source)):
                raise pyarrow.ArrowInvalid(f"the end is missing, or came early, at byte {at} of {size}")
        except (pyarrow.ArrowException, OSError) as error:
            check_open_files(error)
            self.damage = f"{sum(map(len, batches))} rows can be read, then: {error}"
        return batches

    def values(self, columns: list[str]) -> dict[str, list[Any]]:
        """Whole columns as Python values."""
        if self._parquet is not None:
            return self._parquet.read(columns=columns).to_pydict() if columns else {}
        return {name: [v for batch in self._batches for v in batch.column(name).to_pylist()] for name in columns}

    def others(self, known: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
        """The columns beside those and the audio that JSON can hold, dates and decimals as text; names of the rest."""
        import pyarrow

        found, lost = {}, []
        for entry in self.schema:
            if entry.name == self.column or entry.name in known:
                continue
            as_text = pyarrow.types.is_temporal(entry.type) or pyarrow.types.is_decimal(entry.type)
            if not (as_text or is_plain(entry.type)):
                lost.append(entry.name)
                continue
            try:
                parts = [self._parquet.read([entry.name])] if self._parquet is not None else self._batches
                columns = [part.column(entry.name) for part in parts]
                columns = [column.cast(pyarrow.string()) for column in columns] if as_text else columns
                found[entry.name] = [value for column in columns for value in column.to_pylist()]
            except (pyarrow.ArrowInvalid, NotImplementedError):  # a kind of time that has no text
                lost.append(entry.name)
        return found, lost

    def row(self, number: int) -> Any:
        """The audio of one row: a dict with bytes and path, or bytes, or a path."""
        group = bisect.bisect_right(self._ends, number)
        inside = number - (self._ends[group - 1] if group else 0)
        if self._parquet is None:
            return self._batches[group].column(self.column)[inside].as_py()
        if group not in self._groups:
            self._groups[group] = self._parquet.read_row_group(group, columns=[self.column]).column(0)
            while len(self._groups) > _ROW_GROUPS:
                self._groups.popitem(last=False)
        return self._groups[group][inside].as_py()

    @property
    def names_files(self) -> bool:
        """Return True if clips go by the names of their files, where these are all there is, and not by row."""
        return self._parquet is None or is_text(self.schema.field(self.column).type)

    def outside(self) -> list[str | None] | None:
        """The path of every row that names a file, None for those with bytes of their own; None if all have them."""
        import pyarrow

        kind = self.schema.field(self.column).type
        if is_text(kind):
            return self.values([self.column])[self.column]
        if not pyarrow.types.is_struct(kind):
            return None
        if self._parquet is not None:
            empty = [row for number in range(self._parquet.num_row_groups) for row in self._without_bytes(number)]
            if not any(empty):
                return None
            rows = self._parquet.read(columns=[f"{self.column}.path"]).column(self.column).to_pylist()
            paths = [row and row["path"] for row in rows]
        else:
            columns = [batch.column(self.column) for batch in self._batches]
            empty = [row for column in columns for row in column.field("bytes").is_null().to_pylist()]
            paths = [path for column in columns for path in column.field("path").to_pylist()]
        return [path if alone else None for path, alone in zip(paths, empty)] if any(empty) else None

    def _without_bytes(self, number: int) -> list[bool]:
        """For each row of a row group of a .parquet file, True if it has no bytes of its own; by the statistics
        if these say it of all."""
        import pyarrow.compute

        group = self._parquet.metadata.row_group(number)
        columns = map(group.column, range(group.num_columns))
        chunk = next((c for c in columns if c.path_in_schema == f"{self.column}.bytes"), None)
        if chunk is None:
            return [False] * group.num_rows
        found = chunk.statistics
        nulls = found.null_count if found is not None and found.has_null_count else None
        if nulls is None and chunk.total_uncompressed_size > 64 * group.num_rows + 4096:
            nulls = 0  # audio; to read all of it would take long
        if nulls in (0, group.num_rows):
            return [nulls > 0] * group.num_rows
        read = self._parquet.read_row_group(number, columns=[f"{self.column}.bytes"]).column(self.column)
        return pyarrow.compute.is_null(pyarrow.compute.struct_field(read, "bytes")).to_pylist()


def _is_closed(source: Any) -> bool:
    """Return True if an Arrow stream ends with the end-of-stream mark of a closed writer."""
    source.seek(max(0, source.size() - 8))
    return source.read(8) == b"\xff\xff\xff\xff\0\0\0\0"


def _faults() -> tuple[type[Exception], ...]:
    """Exceptions of reading a damaged file; looked up when something was raised, so pyarrow may be missing."""
    try:
        from pyarrow import ArrowException
    except ImportError:  # also where a folder of this name is all there is
        return (OSError,)
    return ArrowException, OSError, ValueError, TypeError, KeyError


def _open(path: str) -> _Table:
    """The open table, from those that are kept; opened again if it changed on disk. Call it under the lock."""
    status = os.stat(path)
    key, stamp = (os.getpid(), path), (status.st_size, status.st_mtime_ns)
    if key not in _tables or _tables[key][0] != stamp:
        _tables[key] = (stamp, _Table(path))
    _tables.move_to_end(key)
    while len(_tables) > _OPEN_FILES:
        _tables.popitem(last=False)
    return _tables[key][1]


def list_arrow(path: str, *, columns: bool = False) -> Listing:
    """The clips of an .arrow or .parquet file in their order; with ``columns``, the others are kept with them.

    Raises:
        DataError: pyarrow is not installed.
        ManifestError: a row that names a file has columns that cannot be followed.
    """
    try:
        with _lock:
            table = _open(path)
            if not table.column:
                return Listing([], skips=[Skip(path, "not decodable", no_audio(table.schema, table.rivals))])
            outside = table.outside()
            chosen = columns_to_read(table.schema, table.column, outside is not None)
            values = table.values(chosen)
            others, lost = table.others(chosen) if columns else ({}, [])
    except _faults() as error:
        check_open_files(error)
        return Listing([], skips=[Skip(path, "damaged archive", str(error).splitlines()[0])])
    names = {column: class_names(features(table.schema).get(column)) for column in (*values, *others)}

    def cell(value: Any, known: Sequence[str] | None) -> Any:
        if known and isinstance(value, list):
            return [cell(one, known) for one in value]
        if known and isinstance(value, int) and -1 <= value < len(known):
            return None if value == -1 else known[value]  # -1: no label, for Hugging Face datasets
        return None if isinstance(value, float) and isnan(value) else value

    def positive(row: dict[str, Any], column: str) -> float | None:
        value = row.get(column)
        return value if isinstance(value, int | float) and value > 0 else None

    files, splits = [], []
    asking: tuple[str, AudioFile] | None = None
    # The name matters: audio_filepath with a duration is a part of its file.
    place = table.column.strip().lower() if path_name(table.column) not in ("", "audio") else "path"
    for number in range(table.num_rows):
        row = {column: cell(values[column][number], names[column]) for column in values}
        known = known_columns(row)
        splits.append(split_of_row(known))
        where = address(path, number)
        every = row | {column: cell(others[column][number], names[column]) for column in others}
        if outside is not None and outside[number]:
            file = audio_file(Path(path), number, known | {place: outside[number]})
            file = file if table.names_files else replace(file, path=where)
            if asking is None and asks_for_first_channel(known):
                asking = where, file
            files.append(replace(file, columns=of_manifest(known_columns(every), lost)) if columns else file)
            continue
        rate = positive(row, "sampling_rate")
        domain, label = (as_cell(row.get(name)) for name in ("domain", "label"))
        duration = positive(row, "duration")
        file = AudioFile(where, duration, None if rate is None else int(rate), domain, label)
        files.append(replace(file, columns=of_archive(every, USED, lost)) if columns else file)
    skips = [Skip(path, "damaged archive", table.damage)] if table.damage else []
    return Listing(files, skips=skips, splits=splits, lost=lost, asking=asking)


def open_arrow_clip(path: str, name: str) -> BinaryIO:
    """The bytes of one row as a file.

    Raises:
        AudioError: no such row, or it has no audio.
        DataError: pyarrow is not installed.
    """
    where = address(path, name)
    try:
        with _lock:
            table = _open(path)
            if not table.column:
                raise AudioError(where, "not decodable", no_audio(table.schema, table.rivals))
            if not (name.isascii() and name.isdigit() and int(name) < table.num_rows):
                raise AudioError(where, "missing", f"the file has rows 0 to {table.num_rows - 1}")
            value = table.row(int(name))
    except _faults() as error:
        check_open_files(error)
        raise AudioError(where, "not readable", str(error).splitlines()[0]) from error
    if isinstance(value, dict):
        content, outside = value.get("bytes"), value.get("path")
    else:
        content, outside = (None, value) if isinstance(value, str) else (value, None)
    if content is None and outside:
        return open(os.path.join(os.path.dirname(path), outside), "rb")
    if not content:
        raise AudioError(where, "empty file", "the row has no audio")
    return io.BytesIO(content)


def saved_dataset_files(folder: str) -> list[str]:
    """The .arrow files of a folder that ``save_to_disk`` wrote, in their order.

    Raises:
        DataError: several splits, files that are not there, or what the folder says of itself cannot be understood.
    """
    splits = os.path.join(folder, "dataset_dict.json")
    try:
        if os.path.isfile(splits):
            with open(splits, encoding="utf-8") as file:
                names = json.load(file)["splits"]
            if len(names) != 1:  # a test set must not be trained on by accident
                raise DataError(
                    f"{folder} has the splits {', '.join(names)}: name those to use, as {folder}/{names[0]}"
                )
            return saved_dataset_files(os.path.join(folder, names[0]))
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        files = [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        check_open_files(error)
        raise DataError(f"{folder}: not a dataset of save_to_disk: {system_reason(error)}") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: a selection of rows, saved by an old version of datasets; save it again")
    for path in files:
        if not os.path.isfile(path):
            raise DataError(f"{path} is missing from the dataset {folder}")
    return files
