"""Files of audio that are missing or not what they seem: reasons that a user can act on."""

import logging
import math
import os
import unicodedata

import numpy as np
import soundfile

from bestrq2.data.archives.opening import open_member
from bestrq2.data.archives.readers import SampleReader
from bestrq2.data.files import to_text
from bestrq2.encodings import name_in_another_encoding
from bestrq2.errors import BestRQError, printable

__all__ = ["elsewhere", "warn_of_levels"]

logger = logging.getLogger(__name__)

_LOUD = 64.0  # 36 dB above full scale
_AUDIBLE = 1e-6  # mean square of channels, -60 dB
_CANCELLED = 1e-4  # of their power is left in the mix, -40 dB
_16_IN_32 = 2.0**-16  # full scale of 16 bits within 32: -96 dB
_8_LESS = 2.0**-8  # of 24 bits within 32, or 16 within 24: -48 dB
_LOUD_WITHIN = 2.0**-10  # least peak of 16 bits within 24, which quiet recordings of 24 bits may have, too
_MANY_VALUES = 512  # 24 bits within 32 have 257 values up to there
_MOST_WARNINGS = 20
_MOST_LOOKS = 200  # at whole files, most of which end at their first loud block
_faint: set[str] = set()  # files that were spoken of, in this process
_looked_at: set[str] = set()
_loud: set[str] = set()
_cancelled: set[str] = set()


def warn_of_levels(block: np.ndarray, mono: np.ndarray, peak: float, path: str, subtype: str) -> None:
    """Warn, once a file, of integers that were not divided, of integers that were written with more bits and not
    multiplied, and of channels that cancel each other in the mono mix.

    Args:
        block: (N, channels) finite samples.
        mono: (N,) their mean.
        peak: largest magnitude in ``block``.
        path: of the file, for the message.
        subtype: soundfile's name of how samples are stored.
    """
    if 0 < peak <= _8_LESS and path not in _faint and len(_faint) < _MOST_WARNINGS:
        _warn_of_fewer_bits(block, peak, path, subtype)
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


def _warn_of_fewer_bits(block: np.ndarray, peak: float, path: str, subtype: str) -> None:
    """Warn of integers that fill only the low bits of those that are stored: so faint, and yet so fine."""
    if subtype not in ("PCM_32", "PCM_24") or len(np.unique(block)) <= _MANY_VALUES:
        return
    stored, bits = int(subtype[-2:]), 16
    if not (subtype == "PCM_32" and peak <= _16_IN_32):
        # 24 bits within 32 as recorders write them end in zeros.
        if subtype == "PCM_32" and not np.any(np.mod(block * np.float32(2.0**31), 256)):
            return
        if subtype == "PCM_24" and peak <= _LOUD_WITHIN:
            return
        if path in _looked_at or len(_looked_at) >= _MOST_LOOKS:
            return
        _looked_at.add(path)
        if (peak := _peak_up_to(path, _8_LESS)) > _8_LESS:  # a quiet passage
            return
        bits = stored - 8
    _faint.add(path)
    logger.warning(
        f"{printable(path)}: {stored}-bit samples up to {peak * 2 ** (stored - 1):.0f}, where full scale is "
        f"{2 ** (stored - 1)}: {bits}-bit integers that were not multiplied by {2 ** (stored - bits)}? It is used as "
        f"it is, {'next to silence' if stored - bits == 16 else f'{6 * (stored - bits)} dB too quiet if they are'}"
    )


def _peak_up_to(path: str, limit: float) -> float:
    """The largest magnitude of a whole file, or one above ``limit``; infinity if it cannot be read."""
    try:
        file = open_member(path) or path
        if isinstance(file, SampleReader):
            return float(np.abs(file.stored.astype(np.float64)).max()) * 2.0**-31
        peak = 0.0
        with open(file, "rb") if isinstance(file, str) else file as content, soundfile.SoundFile(content) as opened:
            for block in opened.blocks(1 << 18, dtype="float32"):
                peak = max(peak, float(np.abs(block).max(initial=0)))
                if peak > limit:
                    break
        return peak
    except (BestRQError, OSError, soundfile.SoundFileError, RuntimeError, ValueError):
        return math.inf


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
