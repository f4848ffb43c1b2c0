"""Columns that ask for other audio than the whole mix at its own speed: a channel, a gain, a tempo.

They cannot be applied, so that such rows are refused. Words under these names, and neutral numbers, are labels.
"""

import re
from contextlib import suppress
from math import isfinite
from typing import Any, Literal

from bestrq2.data.cells import TwiceError, read_json
from bestrq2.errors import ManifestError

__all__ = [
    "CHANNELS",
    "REFUSED",
    "asks_for_first_channel",
    "check_channels",
    "is_a_channel",
    "is_neutral",
    "is_of_channels",
    "is_other_audio",
]

# Numbers under these ask for other audio than the whole mix at its own speed, but for those that are neutral.
REFUSED = {
    "channel": (0, -1),
    "speed": (1,),
    "tempo": (1,),
    "gain": (0, 1),
    "channel_selector": (),
    "channels_to_use": (),
    "channels": (),  # a list of them; a number counts them
}
_SELECTORS = ("channel_selector", "channels_to_use")  # of NeMo: words are refused, too
_FASTEST = 8  # a larger tempo counts beats per minute, a larger speed kilometres an hour
# Names of a channel that other columns may have, too (the channel of a video): there only a number is refused.
CHANNELS = ("ch", "channel_id", "channel_index", "channel_idx", "channel_number")
_NAMES = {*REFUSED, *CHANNELS}
_SIDES = ("left", "right", "l", "r")
_FIRST = ("0", "0.0")


def check_channels(where: str, row: dict[str, Any]) -> None:
    """Refuse a row that asks for other audio.

    Raises:
        ManifestError: it names the column.
    """
    for name in row.keys() & _NAMES:
        value = row[name]
        if is_a_channel(name, value) or is_other_audio(name, value):
            raise ManifestError(
                f"{where}: {name} = {value!r} cannot be applied, channels are averaged and played as they are: "
                "write such clips to files of their own, or rename the column if it says something else, or remove it"
            )


def is_other_audio(column: str, value: Any) -> bool:
    """Return True for what cannot be applied under a name such as ``channel`` or ``tempo``. Labels ("BBC", 120 beats
    per minute) and neutral numbers (a gain of 1) are none, and kept as any other column."""
    known = column.strip().lower()
    return known in REFUSED and _means(known, value) == "other audio"


def is_neutral(column: str, value: Any) -> bool:
    """Return True for a number under such a name that leaves the audio as it is."""
    known = column.strip().lower()
    return known in REFUSED and not (value is None or value == "") and _means(known, value) == "nothing"


def _means(name: str, value: Any) -> Literal["nothing", "label", "other audio"]:
    """Tell what a value under a name of ``REFUSED`` says. Numbers are told by value: 1, 1.0 and "1,0" are one."""
    if name == "channels":
        chosen = _listed(value)
        if not chosen or not any(_is_a_choice(one) for one in chosen):
            return "label" if chosen or not isinstance(value, list) else "nothing"
        return "nothing" if _is_first(chosen) else "other audio"
    text = str(value).strip().lower()
    if value is None or text in ("", "nan") or (name == "channel_selector" and text == "average"):
        return "nothing"
    side = name == "channel" and text in _SIDES
    if name in _SELECTORS or isinstance(value, list | dict) or side:
        return "other audio"
    try:
        number = float(re.sub(r"\s*(?:x|db)$", "", text.replace(",", ".")))  # 0.9x, -3 dB
    except ValueError:
        if not isinstance(value, bool):  # "0/1" is no word
            listed = re.search(r"\d", text) and not re.search(r"[^\W\d_]", text)
            return "other audio" if listed and name != "tempo" else "label"
        number = float(value)
    if number in REFUSED[name]:
        return "nothing"
    return "label" if name in ("tempo", "speed") and number > _FASTEST else "other audio"


def is_of_channels(column: str) -> bool:
    """Return True for a name that this module looks at."""
    return column.strip().lower() in (*REFUSED, *CHANNELS)


def is_a_channel(column: str, value: Any) -> bool:
    """Return True for the number of another channel than the first; -1 is all of them, words are labels."""
    try:
        number = float(value) if column.strip().lower() in CHANNELS and not isinstance(value, bool) else 0.0
        return isfinite(number) and number not in (0, -1)
    except (TypeError, ValueError):
        return False


def _listed(value: Any) -> list[Any] | None:
    """A list, also as the JSON that a table has of it; None for all else."""
    if isinstance(value, str) and value.strip().startswith("["):
        with suppress(ValueError, TwiceError):
            value = read_json(value)
    return list(value) if isinstance(value, list | tuple) else None


def _is_a_choice(value: Any) -> bool:
    """Return True for the number of a channel or its side; other words are names."""
    text = str(value).strip().lower()
    return re.fullmatch(r"-?\d+(?:\.0*)?", text) is not None or text in _SIDES


def _is_first(chosen: list[Any]) -> bool:
    return len(chosen) == 1 and str(chosen[0]).strip() in _FIRST


def asks_for_first_channel(row: dict[str, Any]) -> bool:
    """Return True for channel 0, which is all there is of mono audio, and another signal than the mean of more."""
    if any(name in row and str(row[name]).strip() in _FIRST for name in ("channel", *CHANNELS)):
        return True
    return _is_first(_listed(row.get("channels")) or [])
