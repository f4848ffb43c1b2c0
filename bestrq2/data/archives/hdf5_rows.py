"""Sampling rates, labels and further columns of an HDF5 file with clips.

Row arrays have one entry for each clip. The clips of a group have names in place of numbers, and HDF5 gives them in the
order of text, in which 10 comes before 2, whatever the order in which they were written. A dataset of text with the
names of all clips states the order of the rows. Without one, rows are used only if every order that they may be in is
the same: of text, of the numbers in the names, and of creation where the file tracks it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bestrq2.data.archives.readers import SAMPLING_RATES
from bestrq2.data.cells import as_cell
from bestrq2.errors import AudioError

__all__ = [
    "LABELS",
    "Rows",
    "clip_rate",
    "further_columns",
    "label_of_clip",
    "labels",
    "lose_attributes",
    "rates_of_clips",
]

LABELS = ("domain", "label", "split")
_RATES = ("samplerate", "samplingrate", "samplingfrequency", "sr", "fs", "framerate", "rate")
_LONGEST = 4096  # numbers of a clip that are kept as a column


class Rows:
    """Row arrays of a file, in the order of its clips: by number, or in a group by name as text."""

    def __init__(self, path: str, file: Any, waveform: Any) -> None:
        self.path, self._file, self._waveform = path, file, waveform
        self.grouped = not hasattr(waveform, "shape")
        self.names: Sequence[Any] = sorted(waveform) if self.grouped else range(len(waveform))
        self._orders: list[list[int]] | None = None

    def aligned(self, column: str, values: Any) -> Any:
        """The values of a row array for the clips in their order.

        Raises:
            AudioError: the order of the rows is open, and makes a difference.
        """
        if not self.grouped:
            return values
        if self._orders is None:
            self._orders = self._possible_orders()
        found, *others = ([values[row] for row in order] for order in self._orders)
        for other in others:
            number = next((n for n, (one, two) in enumerate(zip(found, other)) if one != two), None)
            if number is not None:
                raise AudioError(
                    self.path,
                    "not decodable",
                    f"'{column}' has one row for each clip of the group 'waveform', but the order of the clips is "
                    f"open: for clip {self.names[number]!r} it is {_shown(found[number])} by one order (of text, of "
                    f"numbers, of creation), and {_shown(other[number])} by another. Add a dataset 'names' with the "
                    f"names of the clips in the order of the rows, or {_remedy(column)}",
                )
        return found

    def _possible_orders(self) -> list[list[int]]:
        """For each order that rows may be in, the row of every clip."""
        stated = [order for name in self._file if (order := self._stated_order(self._file[name])) is not None]
        if stated:
            return stated
        found = [list(self.names)]
        if (numeric := _by_numbers(self.names)) is not None:
            found.append(numeric)
        if (created := self._by_creation()) is not None:
            found.append(created)
        different = [names for n, names in enumerate(found) if names not in found[:n]]
        rows = ({name: row for row, name in enumerate(names)} for names in different)
        return [[numbers[name] for name in self.names] for numbers in rows]

    def _stated_order(self, dataset: Any) -> list[int] | None:
        """The row of every clip by a dataset with their names, also as paths or with an extension; or None."""
        if getattr(dataset, "shape", None) != (len(self.names),) or not _is_text(dataset):
            return None
        entries = [_decoded(value) for value in dataset[()]]
        for form in (str, _stem):
            rows = {form(entry): row for row, entry in enumerate(entries)}
            names = [form(name) for name in self.names]
            if len(rows) == len(entries) and rows.keys() == set(names):
                return [rows[name] for name in names]
        return None

    def _by_creation(self) -> list[str] | None:
        import h5py

        group = self._waveform.id
        if not group.get_create_plist().get_link_creation_order() & h5py.h5p.CRT_ORDER_TRACKED:
            return None
        found: list[bytes] = []
        group.links.iterate(found.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
        return [name.decode("utf-8", "surrogateescape") for name in found]


def _by_numbers(names: Sequence[str]) -> list[str] | None:
    """Names by the numbers in them; None where these are no counts: not all have one, or all are of one length, as
    hashes and numbers with leading zeros are."""
    if len({len(name) for name in names}) < 2 or not all(re.search("[0-9]", name) for name in names):
        return None

    def key(name: str) -> list[Any]:
        parts = re.split("([0-9]+)", name)
        return [(len(part.lstrip("0")), part.lstrip("0")) if n % 2 else part for n, part in enumerate(parts)]

    return sorted(names, key=key)


def _remedy(column: str) -> str:
    if column in LABELS or _plain(column) in _RATES:
        return f"write it as an attribute {column!r} of each clip instead, or write numbers in names with leading zeros"
    return "write numbers in names with leading zeros"


def _stem(name: str) -> str:
    base = re.split(r"[/\\]", name)[-1]
    return base.rpartition(".")[0] or base


def _shown(value: Any) -> str:
    value = np.ravel(value)[0] if np.size(value) == 1 else value
    shown = _decoded(value) if isinstance(value, bytes) else as_cell(np.asarray(value).tolist())
    text = f"{value:g}" if isinstance(value, np.floating) else repr(shown)
    return text if len(text) < 60 else text[:60] + " ..."


def _decoded(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


# Sampling rates.


def rates_of_clips(rows: Rows, file: Any, waveform: Any) -> int | list[Any] | None:
    """The sampling rate of all clips, or one for each, or None if none is stated.

    Raises:
        AudioError: it is no sampling rate in Hz, or two that are stated differ.
    """
    holders = ((waveform.attrs, "attribute of waveform"), (file.attrs, "attribute of the file"), (file, "dataset"))
    found = []
    for name, where, value in _stated(holders):
        numbers = _numbers(rows.path, name, value)
        if numbers.size not in (1, len(rows.names)):
            what = f"{name} ({where}): {numbers.size} sample rates of {len(rows.names)} clips"
            raise AudioError(rows.path, "not decodable", what)
        found.append((f"{name} ({where})", numbers))
    if not found:
        return None
    (first, numbers), *others = found
    for other, more in others:
        if np.any(numbers != more):
            differ = f"{first} = {_shown(numbers)} and {other} = {_shown(more)} differ: remove the one that is wrong"
            raise AudioError(rows.path, "not decodable", differ)
    numbers = next((more for _, more in found if more.size == 1), numbers)
    low, high = SAMPLING_RATES
    plausible = (numbers >= low) & (numbers <= high)
    if not plausible.any() and numbers.size:
        what = f"{first} = {_shown(numbers)} is no sampling rate in Hz, which is from {low} to {high}"
        raise AudioError(rows.path, "not decodable", what)
    if numbers.size == 1:
        return int(numbers[0])
    return rows.aligned(first.partition(" (")[0], numbers.tolist())


def clip_rate(path: str, attributes: Any, of_file: Any) -> Any:
    """The sampling rate of a clip in a group: its own, or that of the file."""
    found = [(name, _numbers(path, name, value)) for name, _, value in _stated([(attributes, "attribute")])]
    if not found:
        return of_file
    (first, numbers), *others = found
    for other, more in others:
        if not np.array_equal(numbers, more):
            what = f"{first} = {_shown(numbers)} and {other} = {_shown(more)} differ: remove the one that is wrong"
            raise AudioError(path, "not decodable", what)
    if numbers.size != 1:
        raise AudioError(path, "not decodable", f"{first} has {numbers.size} sample rates of one clip")
    return numbers[0].item()


def _stated(holders: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, place, value) of all that states a sampling rate; ``rate`` only if there is nothing else, for it may be
    another one."""
    found = [
        (name, where, holder[name] if not hasattr(holder[name], "shape") else holder[name][()])
        for holder, where in holders
        for name in sorted(holder, key=lambda name: _RATES.index(_plain(name)) if _plain(name) in _RATES else 99)
        if _is_rate(holder, name)
    ]
    clear = [entry for entry in found if _plain(entry[0]) != "rate"]
    yield from clear or found


def _is_rate(holder: Any, name: str) -> bool:
    """Return True for a sampling rate by its name; ``rate`` may be another one, which begins below 1000."""
    if _plain(name) not in _RATES:
        return False
    value = holder[name]
    if _plain(name) != "rate" or hasattr(value, "keys"):  # a group
        return not hasattr(value, "keys")
    try:
        return float(np.ravel(value[:1] if getattr(value, "ndim", 0) else value)[0]) >= 1000
    except (TypeError, ValueError, IndexError):
        return False


def _numbers(path: str, name: str, value: Any) -> np.ndarray:
    try:
        return np.ravel(np.asarray(value)).astype(np.float64)  # also of text
    except (TypeError, ValueError) as error:
        what = f"{name} = {_shown(value)} is no sampling rate in Hz: write a number"
        raise AudioError(path, "not decodable", what) from error


def _plain(name: str) -> str:
    """``samplerate`` for ``Sample_Rate``, ``sample-rate`` and so on."""
    return name.lower().translate({ord(letter): None for letter in " _-"})


# Labels and other columns.


def labels(rows: Rows, file: Any, column: str, notes: list[str]) -> list[str] | None:
    """One text for each clip by the dataset of this name. None if there is none, or, with a note, if it is no label.

    Raises:
        AudioError: it has another number of rows than there are clips.
        ValueError: for bytes that are not UTF-8.
    """
    found = file.get(column)
    if found is None:
        return None
    count, shape = len(rows.names), getattr(found, "shape", None)
    if shape and shape[0] != count:
        of = f"{shape[0]} rows" if len(shape) == 1 else f"the shape {shape}"
        what = f"'{column}' has {of}, and there are {count} clips: write one value for each clip"
        raise AudioError(rows.path, "not decodable", what)
    if not shape or len(shape) != 1 or not (_is_text(found) or found.dtype.kind in "biuf"):
        what = "an entry for each clip that is no text or number"
        if shape is None:
            what = "a group" if hasattr(found, "keys") else "empty"
        elif not shape:
            what = "a single value"
        elif len(shape) > 1:
            what = f"of the shape (clips, {', '.join(map(str, shape[1:]))})"
        kept = "; it is kept as a further column" if _kept(found, count) else ""
        notes.append(f"HDF5: '{column}' is {what}, so it is no {column}, which is one text or number a clip{kept}")
        return None
    return rows.aligned(column, _texts(found, column) if _is_text(found) else list(map(as_cell, found[()].tolist())))


def label_of_clip(path: str, attributes: Any, column: str, of_row: str) -> str:
    """The text of a clip in a group by an attribute of its dataset, or else by its row.

    Raises:
        AudioError: the two differ.
    """
    if column not in attributes:
        return of_row
    value = attributes[column]
    if getattr(value, "shape", ()) is None:  # empty
        return of_row
    own = _decoded(value) if isinstance(value, bytes) else as_cell(np.asarray(value).tolist())
    if of_row and own and own != of_row:
        what = f"the attribute {column!r} is {own!r}, its row in the dataset of this name {of_row!r}"
        raise AudioError(path, "not decodable", what)
    return own or of_row


def lose_attributes(attributes: Any, lost: list[str]) -> None:
    """Add the names of a clip's attributes that are not used to ``lost``, but for those that PyTables and netCDF write
    for themselves (CLASS, DIMENSION_LIST)."""
    for name in attributes:
        if not (name.isupper() or name.startswith("_") or name in LABELS or name in lost or _is_rate(attributes, name)):
            lost.append(name)


def further_columns(rows: Rows, file: Any, used: Sequence[str], lost: list[str]) -> dict[str, Any]:
    """The datasets that are not used, with a text, a number or a short row of numbers for each clip; names of others
    are added to ``lost``."""
    rates = {name for name, where, _ in _stated([(file.attrs, ""), (file, "dataset")]) if where}
    found = {}
    for name in file:
        if name == "waveform" or name in used or name in rates:
            continue
        values = file[name]
        if not _kept(values, len(rows.names)):
            lost.append(name)
            continue
        key = name
        while key in ("domain", "label") or (key != name and key in file):  # a table of one-hot rows, which is none
            key = f"source_{key}"
        found[key] = rows.aligned(name, _texts(values, name) if _is_text(values) else values[()].tolist())
    return found


def _kept(values: Any, count: int) -> bool:
    shape = getattr(values, "shape", None)
    if not shape or shape[0] != count or values.size > _LONGEST * count:
        return False
    return values.dtype.kind in "biuf" or (len(shape) == 1 and _is_text(values))


def _is_text(dataset: Any) -> bool:
    import h5py

    return dataset.dtype.kind == "S" or h5py.check_string_dtype(dataset.dtype) is not None


def _texts(dataset: Any, column: str) -> list[str]:
    found = []
    for number, value in enumerate(dataset[()]):
        try:
            found.append(value.decode("utf-8") if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError as error:
            raise ValueError(f"{column} of clip {number} is not UTF-8: {value[:40]!r}; write it as UTF-8") from error
    return found
