"""A list of audio files in little memory: every data worker has a copy of it."""

import os
from array import array
from collections.abc import Iterable, Sequence
from math import isnan, nan
from typing import Any, overload

from bestrq2.data.files import AudioFile

__all__ = ["FileTable"]


class FileTable(Sequence[AudioFile]):
    """Audio files by columns: the bytes of each path and 40 more, where an :class:`AudioFile` takes some 400.

    An :class:`AudioFile` is made at every access. Domain, label and sampling rate are kept once for every combination
    of them, so labels of which no two are alike take more.
    """

    def __init__(self, files: Iterable[AudioFile]) -> None:
        self._paths, self._ends = bytearray(), array("q", [0])
        self._times = array("d")  # duration, start and end of each, NaN for None
        self._facts = array("q")  # of each, the place in _known
        known: dict[tuple[str, str, int | None], int] = {}
        for item in files:
            # Surrogates are bytes of names, or out of JSON.
            self._paths += os.fspath(item.path).encode("utf-8", "surrogatepass")
            self._ends.append(len(self._paths))
            self._times.extend(nan if time is None else time for time in (item.duration, item.start, item.end))
            self._facts.append(known.setdefault((item.domain, item.label, item.sampling_rate), len(known)))
        self._known = list(known)

    def __len__(self) -> int:
        return len(self._facts)

    @overload
    def __getitem__(self, index: int) -> AudioFile: ...

    @overload
    def __getitem__(self, index: slice) -> list[AudioFile]: ...

    def __getitem__(self, index: int | slice) -> AudioFile | list[AudioFile]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # from the end where it is negative; IndexError
        path = self._paths[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass")
        duration, start, end = self._times[3 * row : 3 * row + 3]
        domain, label, rate = self._known[self._facts[row]]
        return AudioFile(path, _known_time(duration), rate, domain, label, start, _known_time(end))

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented
        return all(one == two for one, two in zip(self, other))

    __hash__ = None  # type: ignore[assignment]


def _known_time(seconds: float) -> float | None:
    return None if isnan(seconds) else seconds
