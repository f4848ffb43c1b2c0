"""HDF5 in the published layout: clips as int16 samples in ``waveform``.

``waveform`` is (n, samples), or n arrays of any length, or a group with one dataset for each clip. ``sample_rate``
(also ``sampling_rate``, ``sampling_frequency``, ``sr``, ``fs``, ``framerate`` or ``rate``, in any spelling such as
``Sample Rate``) is an attribute of the file or of ``waveform``, or a dataset of one number or of one for each clip;
without it 32000 Hz, with a note. Lengths of clips that were padded with zeros are refused. A dataset ``domain``,
``label`` or ``split`` with one text for each clip is used. Others with a value or a short row for each, such as the
published ``target`` and ``audio_name``, are further columns. The address of clip i is ``file.h5::i``, in a group its
name.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np

from bestrq2.data.archives.readers import SampleReader
from bestrq2.data.columns import of_archive
from bestrq2.data.files import AudioFile, Listing, address
from bestrq2.data.splits import split_of_row
from bestrq2.errors import AudioError, DataError, Skip, check_open_files

__all__ = ["DEFAULT_SAMPLE_RATE", "list_hdf5", "open_hdf5_clip"]

DEFAULT_SAMPLE_RATE = 32000  # what the published data loader assumes of files that do not state it
_OPEN_FILES = 16
_RATES = ("samplerate", "samplingrate", "samplingfrequency", "sr", "fs", "framerate", "rate")  # the first one counts
_LENGTHS = ("length", "lengths", "num_samples", "n_samples", "waveform_length", "waveform_lengths", "audio_length")
_LONGEST = 4096  # numbers of a clip that are kept as a column

_files: OrderedDict[tuple[int, str], tuple[tuple[int, int], Any]] = OrderedDict()  # by process: a handle is not forked
_lock = threading.RLock()  # HDF5 is not safe in threads


def _open(path: str) -> Any:
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
        _files.pop(key)[1].close()
    # Without HDF5's file locks, which fail on many network file systems: nothing is written.
    file = h5py.File(path, "r", locking=False)
    _files[key] = (stamp, file)
    while len(_files) > _OPEN_FILES:
        _files.popitem(last=False)  # closed when the last clip of it is gone
    return file


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


def _rates(file: Any, waveform: Any) -> Any:
    """Sampling rate of all clips, or a dataset of one for each, or None."""
    for holder in (waveform, file):
        if (stated := _stated_rate(holder.attrs)) is not None:
            return int(stated)
    rates = _stated_rate(file)
    if rates is None:
        return None
    return int(rates[()] if rates.ndim == 0 else rates[0]) if rates.size == 1 else rates


def _stated_rate(holder: Any) -> Any:
    """A sampling rate among attributes or datasets by one of its names, or None."""
    found = [name for name in holder if _is_rate(holder, name)]
    return holder[min(found, key=lambda name: _RATES.index(_plain(name)))] if found else None


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


def _plain(name: str) -> str:
    """``samplerate`` for ``Sample_Rate``, ``sample-rate`` and so on."""
    return name.lower().translate({ord(letter): None for letter in " _-"})


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
            file = _open(path)
            waveform = _waveforms(file, path)
            grouped = not hasattr(waveform, "shape")
            if not grouped and waveform.ndim == 2:
                _check_padding(file, waveform, path)
            names = sorted(waveform) if grouped else list(range(len(waveform)))
            rates = _rates(file, waveform)
            every = rates[()] if hasattr(rates, "shape") else [rates] * len(names)
            domains, labels, splits = (_texts(file, name, len(names)) for name in ("domain", "label", "split"))
            if len(every) != len(names):
                raise AudioError(path, "not decodable", f"{len(every)} sample rates of {len(names)} clips")
            files, unrated = [], False
            for number, name in enumerate(names):
                rate = every[number]
                count = waveform.shape[1] if not grouped and waveform.ndim == 2 else None
                if grouped:
                    count = int(waveform[name].shape[0]) if waveform[name].ndim == 1 else 0
                    rate = _stated_rate(waveform[name].attrs) or rate
                unrated = unrated or rate is None
                rate = DEFAULT_SAMPLE_RATE if rate is None else int(rate)
                known = count is not None and count > 0 and rate > 0
                files.append(
                    AudioFile(
                        address(path, name),
                        count / rate if known and count is not None else None,
                        rate if known else None,
                        domains[number] or domain,
                        labels[number],
                    )
                )
            listing = Listing(files, splits=[split_of_row({"split": text}) for text in splits])
            listing.unrated.extend([path] if unrated else [])
            if columns:
                others = _others(file, len(names), listing.lost)
                for number, item in enumerate(files):
                    row = {name: values[number] for name, values in others.items()}
                    files[number] = replace(item, columns=of_archive(row, (), listing.lost))
            return listing
        except AudioError as error:
            return Listing([], skips=[error.skip])
        except DataError:  # a RuntimeError
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            check_open_files(error)
            return Listing([], skips=[Skip(path, "damaged archive", str(error))])


def _texts(file: Any, column: str, count: int) -> list[str]:
    """One text for each clip, or empty ones if the file has no such dataset.

    Raises:
        ValueError: for bytes that are not UTF-8.
    """
    found = file.get(column)
    if found is None or getattr(found, "shape", None) != (count,):
        return [""] * count
    values = found[()]
    for number, value in enumerate(values):
        if isinstance(value, bytes) and not _is_utf8(value):
            raise ValueError(f"{column} of clip {number} is not UTF-8: {value[:40]!r}; write it as UTF-8")
    return [value.decode("utf-8") if isinstance(value, bytes) else str(value) for value in values]


def _others(file: Any, count: int, lost: list[str]) -> dict[str, list[Any]]:
    """The datasets that are not used, with a text, a number or a short row of numbers for each clip; names of others
    are added to ``lost``."""
    import h5py

    found = {}
    for name in file:
        if name in ("waveform", "domain", "label") or _is_rate(file, name):
            continue
        values = file[name]
        fits = isinstance(values, h5py.Dataset) and values.shape[:1] == (count,) and values.size <= _LONGEST * count
        text = fits and values.ndim == 1 and (h5py.check_string_dtype(values.dtype) or values.dtype.kind == "S")
        if text:
            found[name] = _texts(file, name, count)
        elif fits and values.dtype.kind in "biuf":
            found[name] = values[()].tolist()
        else:
            lost.append(name)
    return found


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def open_hdf5_clip(path: str, name: str) -> SampleReader:
    """The samples of one clip.

    Raises:
        AudioError: no such clip, or it cannot be read.
        DataError: h5py is not installed.
    """
    where = address(path, name)
    with _lock:
        try:
            file = _open(path)
            waveform = _waveforms(file, path)
            rates = DEFAULT_SAMPLE_RATE if (rates := _rates(file, waveform)) is None else rates
            if not hasattr(waveform, "shape"):
                if name not in waveform:
                    raise AudioError(where, "missing", "no such clip in the file")
                clip = waveform[name]
                if getattr(clip, "ndim", 0) != 1 or clip.dtype.kind not in "if" or clip.dtype == np.int64:
                    raise AudioError(where, "not decodable", "not one-dimensional samples")
                if not isinstance(rates, int):
                    rates = rates[sorted(waveform).index(name)]
                return SampleReader(_Clip(file, clip, None), int(_stated_rate(clip.attrs) or rates))
            if not (name.isascii() and name.isdigit() and int(name) < len(waveform)):
                raise AudioError(where, "missing", f"the file has clips 0 to {len(waveform) - 1}")
            number = int(name)
            samples = _Clip(file, waveform, number) if waveform.ndim == 2 else np.asarray(waveform[number])
            return SampleReader(samples, rates if isinstance(rates, int) else int(rates[number]))
        except AudioError as error:
            raise error if error.path == where else AudioError(where, error.reason, error.detail) from error
        except OSError as error:
            check_open_files(error)
            raise AudioError(where, "not readable", str(error)) from error
        except DataError:  # a RuntimeError
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise AudioError(where, "not decodable", str(error)) from error
