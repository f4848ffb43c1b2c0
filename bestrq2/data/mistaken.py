"""Files of audio that are missing or not what they seem: reasons that a user can act on."""

import logging
import os
import unicodedata

import numpy as np

from bestrq2.data.files import to_text
from bestrq2.encodings import name_in_another_encoding
from bestrq2.errors import printable

__all__ = ["elsewhere", "warn_of_levels"]

logger = logging.getLogger(__name__)

_LOUD = 64.0  # 36 dB above full scale
_AUDIBLE = 1e-6  # mean square of channels, -60 dB
_CANCELLED = 1e-4  # of their power is left in the mix, -40 dB
_16_BITS = 2.0**-16  # full scale of 16 bits within 32: -96 dB
_MANY_VALUES = 512  # 24 bits within 32 have 257 values up to there
_MOST_WARNINGS = 20
_faint: set[str] = set()  # files that were spoken of, in this process
_loud: set[str] = set()
_cancelled: set[str] = set()


def warn_of_levels(block: np.ndarray, mono: np.ndarray, peak: float, path: str, subtype: str) -> None:
    """Warn, once a file, of integers that were not divided, of 16-bit integers that were written as 32-bit ones, and of
    channels that cancel each other in the mono mix.

    Args:
        block: (N, channels) finite samples.
        mono: (N,) their mean.
        peak: largest magnitude in ``block``.
        path: of the file, for the message.
        subtype: soundfile's name of how samples are stored.
    """
    faint = 0 < peak <= _16_BITS and subtype == "PCM_32" and path not in _faint and len(_faint) < _MOST_WARNINGS
    if faint and len(np.unique(block)) > _MANY_VALUES:  # so faint and yet so fine: no recorder does that
        _faint.add(path)
        logger.warning(
            f"{printable(path)}: 32-bit samples up to {peak * 2**31:.0f}, where full scale is 2147483648: 16-bit "
            "integers that were not multiplied by 65536? It is used as it is, next to silence"
        )
    if peak > _LOUD and path not in _loud and len(_loud) < _MOST_WARNINGS:
        _loud.add(path)
        logger.warning(
            f"{printable(path)}: floating samples up to {peak:.0f}, where full scale is 1: integers that were not "
            "divided? It is used as it is"
        )
    if block.shape[1] == 1 or path in _cancelled or len(_cancelled) >= _MOST_WARNINGS:
        return
    power = float(np.vdot(block, block)) / block.size
    if power > _AUDIBLE and float(np.vdot(mono, mono)) / mono.size < _CANCELLED * power:
        _cancelled.add(path)
        logger.warning(
            f"{printable(path)}: the channels cancel each other, of which the mean is used: invert one of them, or "
            "keep one (ffmpeg -i IN -af 'pan=mono|c0=c0' OUT)"
        )


def elsewhere(name: str) -> str:
    """A hint where a missing file may be: in a folder for audio beside its own (ESC-50), or under the same letters."""
    folder, base = os.path.split(name)
    for beside in ("audio", "wav", "../audio", "../wav"):
        there = os.path.normpath(os.path.join(folder, beside))
        if os.path.isfile(os.path.join(there, base)):
            return f"a file of this name is in {printable(there)}: save the list there, or name that folder in it"
    return _same_letters(name)


def _same_letters(name: str) -> str:
    """A hint if the folder has a file of the same letters in other bytes; empty if there is none.

    The encoding may differ (a manifest in Latin-1, or names out of an old archive), or the Unicode normal form: macOS
    and archives made there write \u00e4 as a and two dots (NFD), most tables as one character (NFC).
    """
    folder, base = os.path.split(name)
    base = to_text(base)
    if base.isascii():
        return ""

    def letters(text: str) -> str:
        return unicodedata.normalize("NFC", name_in_another_encoding(text) or text)

    wanted = letters(base)
    try:
        found = (to_text(entry) for entry in os.listdir(folder or "."))
        other = next((entry for entry in found if letters(entry) == wanted), None)
    except OSError:
        return ""
    if other is None or other == base:
        return ""
    if name_in_another_encoding(base):
        return "a file of this name in UTF-8 is there: save the manifest as UTF-8 (iconv -f CP1252 -t UTF-8)"
    if name_in_another_encoding(other):
        return "a file of this name in Latin-1 is there: rename it (convmv -f cp1252 -t utf-8)"
    form = "NFD" if unicodedata.is_normalized("NFC", base) else "NFC"
    return f"a file of this name in Unicode normal form {form} is there: rename it, or write the manifest in {form}"
