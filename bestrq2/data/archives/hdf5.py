"""HDF5 in the published layout: clips as int16 samples in ``waveform``.

``waveform`` is (n, samples), or n arrays of any length, or a group with one dataset for each clip. ``sample_rate``
(also ``sampling_rate``, ``sampling_frequency``, ``sr``, ``fs``, ``framerate`` or ``rate``, in any spelling such as
``Sample Rate``) is an attribute of the file or of ``waveform``, or a dataset of one number or of one for each clip;
without it 32000 Hz, with a note. Lengths of clips that were padded with zeros are refused. A dataset ``domain``,
``label`` or ``split`` with one text for each clip is used, or such an attribute of a clip in a group. Other datasets
with a value or a short row for each, such as the published ``target`` and ``audio_name``, are further columns
(:mod:`bestrq2.data.archives.hdf5_rows`). The address of clip i is ``file.h5::i``, in a group its name.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from bestrq2.data.archives.hdf5_rows import (
    LABELS,
    Rows,
    clip_rate,
    further_columns,
    label_of_clip,
    labels,
    lose_attributes,
    rates_of_clips,
)
from bestrq2.data.archives.readers import SAMPLING_RATES, SampleReader
from bestrq2.data.columns import of_archive
from bestrq2.data.files import AudioFile, Listing, address
from bestrq2.data.splits import split_of_row
from bestrq2.errors import AudioError, DataError, Skip, check_open_files

__all__ = ["DEFAULT_SAMPLE_RATE", "list_hdf5", "open_hdf5_clip"]

DEFAULT_SAMPLE_RATE = 32000  # what the published data loader assumes of files that do not state it
_OPEN_FILES = 16
_LENGTHS = ("length", "lengths", "num_samples", "n_samples", "waveform_length", "waveform_lengths", "audio_length")

_files: OrderedDict[tuple[int, str], tuple[tuple[int, int], "_Opened"]] = (
    OrderedDict()
)  # by process: a handle is not forked
_lock = threading.RLock()  # HDF5 is not safe in threads


class _Opened:
    """An open file and what its clips share, which is read once."""

    def __init__(self, path: str, file: Any) -> None:
        self.path, self.file = path, file

    @cached_property
    def waveform(self) -> Any:
        return _waveforms(self.file, self.path)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.path, self.file, self.waveform)

    @cached_property
    def rates(self) -> int | list[Any] | None:
        return rates_of_clips(self.rows, self.file, self.waveform)

    @cached_property
    def places(self) -> dict[str, int]:
        """The numbers of the clips of a group by name."""
        return {name: number for number, name in enumerate(self.rows.names)}


def _open(path: str) -> _Opened:
    """The open file, from the few that are kept; opened again if it changed on disk. Call it under the lock."""
    try:
        import h5py
        from h5py import File  # noqa: F401  (a folder of that name can be imported, too)
    except ImportError as error:
        raise DataError(f'{path}: HDF5 needs h5py: pip install "bestrq2[hdf5]"') from error
    status = os.stat(path)
    key, stamp = (os.getpid(), path), (status.st_size, status.st_mtime_ns)
    if key in _files and _files[key][0] == stamp:
        _files.move_to_end(key)
        return _files[key][1]
    if key in _files:
        # Closed first, with all clips: libhdf5 knows an open file by its inode, and would give the old one again.
        _files.pop(key)[1].file.close()
    # Without HDF5's file locks, which fail on many network file systems: nothing is written.
    opened = _Opened(path, h5py.File(path, "r", locking=False))
    _files[key] = (stamp, opened)
    while len(_files) > _OPEN_FILES:
        _files.popitem(last=False)  # closed when the last clip of it is gone
    return opened


class _Clip:
    """The samples of a clip that are read when they are asked for: a crop of an hour reads as much as it needs."""

    def __init__(self, file: Any, dataset: Any, row: int | None) -> None:
        self._file, self._dataset, self._row = file, dataset, row  # the file: it must stay open
        self.dtype = dataset.dtype

    def __len__(self) -> int:
        return self._dataset.shape[-1]

    def __getitem__(self, part: slice) -> np.ndarray:
        with _lock:
            return np.asarray(self._dataset[part] if self._row is None else self._dataset[self._row, part])


def _waveforms(file: Any, path: str) -> Any:
    """The dataset or group ``waveform``.

    Raises:
        AudioError: none, or one of another kind.
    """
    import h5py

    waveform = file.get("waveform")
    if waveform is None:
        raise AudioError(
            path, "not decodable", f"no 'waveform' in the file; it has {', '.join(sorted(file)) or 'nothing'}"
        )
    if isinstance(waveform, h5py.Dataset):
        kind = h5py.check_vlen_dtype(waveform.dtype) or waveform.dtype
        dimensions = 1 if h5py.check_vlen_dtype(waveform.dtype) else 2
        if waveform.ndim != dimensions or np.dtype(kind).kind not in "if" or np.dtype(kind) == np.int64:
            raise AudioError(
                path,
                "not decodable",
                f"'waveform' must be int16 (clips, samples), got {kind} {waveform.shape}",
            )
    return waveform


def _check_padding(file: Any, waveform: Any, path: str) -> None:
    """Refuse clips that were padded to the longest of them: the zeros would be audio.

    Raises:
        AudioError: it names the dataset with the lengths.
    """
    count, samples = waveform.shape
    for name in _LENGTHS:
        lengths = file.get(name)
        if getattr(lengths, "shape", None) != (count,) or lengths.dtype.kind not in "iu" or not count:
            continue
        values = lengths[()]
        if values.max() == samples and values.min() < samples:
            detail = f"'{name}' says that clips are padded with zeros: write 'waveform' as arrays of their own length"
            raise AudioError(path, "not decodable", detail)


def list_hdf5(path: str, domain: str = "", *, columns: bool = False) -> Listing:
    """The clips of a file in their order, groups by name; with ``columns``, other datasets are kept with them.

    Raises:
        DataError: h5py is not installed.
    """
    with _lock:
        try:
            return _listed(_open(path), domain, columns)
        except AudioError as error:
            _files.pop((os.getpid(), path), None)  # closed, so that it can be mended
            return Listing([], skips=[error.skip])
        except DataError:  # a RuntimeError
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            check_open_files(error)
            return Listing([], skips=[Skip(path, "damaged archive", str(error))])


def _listed(opened: _Opened, domain: str, columns: bool) -> Listing:
    path, file, waveform, rows, rates = opened.path, opened.file, opened.waveform, opened.rows, opened.rates
    listing = Listing([])
    if not rows.grouped and waveform.ndim == 2:
        _check_padding(file, waveform, path)
    texts = {column: labels(rows, file, column, listing.notes) for column in LABELS}
    others = {}
    if columns:
        used = [column for column in LABELS if column != "split" and texts[column] is not None]
        others = further_columns(rows, file, used, listing.lost)
    low, high = SAMPLING_RATES
    for number, name in enumerate(rows.names):
        where = address(path, name)
        rate = rates[number] if isinstance(rates, list) else rates
        own = {column: "" if (found := texts[column]) is None else found[number] for column in LABELS}
        count = waveform.shape[1] if not rows.grouped and waveform.ndim == 2 else None
        if rows.grouped:
            clip = waveform[name]
            count = int(clip.shape[0]) if getattr(clip, "ndim", 0) == 1 else 0
            rate = clip_rate(where, clip.attrs, rate)
            own = {column: label_of_clip(where, clip.attrs, column, text) for column, text in own.items()}
        if rate is None and path not in listing.unrated:
            listing.unrated.append(path)
        rate = DEFAULT_SAMPLE_RATE if rate is None else rate
        known = count is not None and count > 0 and low <= rate <= high  # else a look at the clip tells the fault
        item = AudioFile(
            where,
            count / int(rate) if known and count is not None else None,
            int(rate) if known else None,
            own["domain"] or domain,
            own["label"],
        )
        if columns:
            row = {column: values[number] for column, values in others.items()}
            if rows.grouped:
                lose_attributes(waveform[name].attrs, listing.lost)
            if texts["split"] is None and own["split"]:
                row["split"] = own["split"]
            item = replace(item, columns=of_archive(row, (), listing.lost))
        listing.files.append(item)
        listing.splits.append(split_of_row({"split": own["split"]}))
    return listing


def open_hdf5_clip(path: str, name: str) -> SampleReader:
    """The samples of one clip.

    Raises:
        AudioError: no such clip, or it cannot be read.
        DataError: h5py is not installed.
    """
    where = address(path, name)
    with _lock:
        try:
            opened = _open(path)
            file, waveform = opened.file, opened.waveform
            rates = DEFAULT_SAMPLE_RATE if opened.rates is None else opened.rates
            if opened.rows.grouped:
                if name not in waveform:
                    raise AudioError(where, "missing", "no such clip in the file")
                clip = waveform[name]
                if getattr(clip, "ndim", 0) != 1 or clip.dtype.kind not in "if" or clip.dtype == np.int64:
                    raise AudioError(where, "not decodable", "not one-dimensional samples")
                rate = rates[opened.places[name]] if isinstance(rates, list) else rates
                return SampleReader(_Clip(file, clip, None), int(clip_rate(where, clip.attrs, rate)))
            if not (name.isascii() and name.isdigit() and int(name) < len(waveform)):
                raise AudioError(where, "missing", f"the file has clips 0 to {len(waveform) - 1}")
            number = int(name)
            samples = _Clip(file, waveform, number) if waveform.ndim == 2 else np.asarray(waveform[number])
            return SampleReader(samples, int(rates[number] if isinstance(rates, list) else rates))
        except AudioError as error:
            raise error if error.path == where else AudioError(where, error.reason, error.detail) from error
        except OSError as error:
            check_open_files(error)
            raise AudioError(where, "not readable", str(error)) from error
        except DataError:  # a RuntimeError
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise AudioError(where, "not decodable", str(error)) from error
