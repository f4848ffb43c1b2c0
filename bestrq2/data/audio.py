"""One audio file in, one mono float32 waveform out; every fault of a file becomes an :class:`AudioError`."""

import contextlib
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd, isfinite
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from bestrq2.data.archives.opening import open_member
from bestrq2.data.archives.readers import SAMPLING_RATES, SampleReader, Section
from bestrq2.data.containers import (
    begins_as_mp3,
    caf_frames,
    missing_fraction,
    mp3_counts_frames,
    mp3_end,
    ogg_without_end,
)
from bestrq2.data.decoder import Decoder
from bestrq2.data.hidden_audio import audio_behind_end
from bestrq2.data.mistaken import elsewhere, warn_of_levels
from bestrq2.data.mp3_frames import mp3_fault
from bestrq2.errors import AudioError, DataError, check_open_files
from bestrq2.real_content import real_content

__all__ = [
    "AudioDigest",
    "AudioInfo",
    "audio_digest",
    "audio_info",
    "load_audio",
]

SILENCE = 1e-4  # -80 dB of full scale, three steps of a 16-bit file
TRUNCATED_ABOVE = 0.01  # encoders pad and trim the end by some milliseconds; a real cut is larger
LARGEST_SAMPLE = 2.0**31
_LOSSY = ("VORBIS", "OPUS", "MPEG")
_SYSTEM_ERROR = 2  # libsndfile's numbers
_UNKNOWN_FORMAT = (1, 7)  # the second is what it says of a regular file named .mp3: that there is none
_EXACT_SECONDS = 30.0
_PREROLL_SECONDS = 1.0
_MARGIN = 400  # samples at the lower of the two rates; soxr's HQ filter is shorter than 200
_BLOCK = 1 << 18  # samples of all channels decoded at once
_MISSING = "{:.1f} % of the audio bytes are missing"
_UNKNOWN = 1 << 60  # libsndfile gives 2^63 - 1 frames for a stream that does not say


@dataclass(frozen=True)
class AudioInfo:
    """Contents of a header: ``sampling_rate`` in Hz, ``num_samples`` per channel, ``duration`` in seconds."""

    sampling_rate: int
    num_samples: int
    channels: int

    @property
    def duration(self) -> float:
        return self.num_samples / self.sampling_rate


def audio_info(path: str | os.PathLike[str]) -> AudioInfo:
    """Read the header of an audio file; only a stream that states no length is decoded to count its samples.

    The length of an MP3 without a Xing, Info or VBRI tag is an estimate from its first frame.

    Raises:
        AudioError: missing, not readable, empty file, not decodable, no samples, or truncated as far as the container
            tells: the audio chunk of WAV and AIFF and the tag of MP3 promise over 1 % more bytes than there are.
            A cut FLAC is only found by decoding it, but for one that promises ten times what its bytes can hold (a
            damaged header): training would draw it as often as its length says. A cut Ogg lacks the mark of its last
            page.
    """
    with _open(path, check_end=True) as file:
        num_samples = file.frames
        if num_samples >= _UNKNOWN:
            num_samples = sum(len(block) for block in _blocks(file, os.fspath(path), None))
        if num_samples <= 0:
            raise AudioError(path, "no samples")
        return AudioInfo(file.samplerate, num_samples, file.channels)


def load_audio(
    path: str | os.PathLike[str],
    sampling_rate: int = 16000,
    *,
    start: float = 0.0,
    duration: float | None = None,
) -> np.ndarray:
    """Decode (a part of) an audio file to mono float32 at ``sampling_rate``.

    Channels are averaged. Integer formats are divided by their full scale (int16 by 32768); nothing is clipped or
    normalised. Other rates are resampled by soxr's HQ filter.

    A part is what ``load_audio(path, sampling_rate)[round(start * sampling_rate):][:round(duration * sampling_rate)]``
    would be, but only the needed samples and the filter's margin are decoded, on the same resampling grid. It is equal
    to 1e-6 for WAV, AIFF and FLAC at any position, and for Ogg, Opus and MP3 in their first 30 seconds, where decoding
    from the beginning is as cheap. Beyond, lossy formats are entered by seeking, with one second of pre-roll for the
    decoder's state; libsndfile then lands some milliseconds off now and then in Vorbis.

    Args:
        path: file of any format libsndfile reads, or the address of a clip in an archive (see ``members``).
        sampling_rate: of the result, in Hz.
        start: first instant, in seconds from the beginning of the file.
        duration: length in seconds; None for the rest of the file. A part that crosses the end is shorter.

    Returns:
        (S,) float32, finite, S >= 1.

    Raises:
        AudioError: for every fault of the file; see ``REASONS``. "truncated" is raised if the header or the decoder
            shows that over 1 % of the promised samples are missing; with ``duration``, a decoder that stops early is
            only noticed if it stops inside the part.
        ValueError: an argument out of range.
    """
    if sampling_rate <= 0:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    if not (isfinite(start) and start >= 0):
        raise ValueError(f"start must be a time in seconds >= 0, got {start}")
    if duration is not None and not (isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be positive seconds or None, got {duration}")
    name = os.fspath(path)
    with _open(name, check_end=start == 0 and duration is None) as file:
        # Blocks of p input samples are blocks of q output samples, so whole blocks keep the resampling grid.
        common = gcd(file.samplerate, sampling_rate)
        p, q = file.samplerate // common, sampling_rate // common
        margin = 0 if p == q else -(-_MARGIN * max(p, q) // (q * p))  # blocks
        first = round(start * sampling_rate)
        last = None if duration is None else first + max(1, round(duration * sampling_rate))
        block = max(0, first // q - margin)
        stop = None if last is None else (-(-last // q) + margin) * p
        samples = _read(file, name, block * p, stop)
        if p != q and samples.size:
            samples = soxr.resample(samples, file.samplerate, sampling_rate, quality="HQ")
        offset = first - block * q
        waveform = samples[offset : None if last is None else offset + last - first]
        if waveform.size == 0:
            raise AudioError(name, "no samples", f"nothing from {start:.3f} s on" if start else "")
    return np.ascontiguousarray(waveform, dtype=np.float32)


@dataclass(frozen=True)
class AudioDigest:
    """Results of full decoding: real length, largest magnitude over time after the mono mix, hash of the samples."""

    info: AudioInfo
    peak: float
    sha256: str


def audio_digest(path: str | os.PathLike[str]) -> AudioDigest:
    """Decode a whole file in bounded memory. Equal hashes mean equal mono samples at an equal rate in any container.

    Raises:
        AudioError: as :func:`load_audio`.
    """
    with _open(path, check_end=True) as file:
        digest = hashlib.sha256(str(file.samplerate).encode())
        num_samples, peak = 0, 0.0
        for block in _blocks(file, os.fspath(path), None):
            digest.update(block.tobytes())
            num_samples += len(block)
            peak = max(peak, float(np.abs(block).max()))
        if num_samples == 0:
            raise AudioError(path, "no samples")
        return AudioDigest(AudioInfo(file.samplerate, num_samples, file.channels), peak, digest.hexdigest())


@contextlib.contextmanager
def _open(path: str | os.PathLike[str], check_end: bool = False) -> Iterator[soundfile.SoundFile | SampleReader]:
    """Open a file or a clip in an archive and check what its header promises; every fault becomes an AudioError."""
    name = os.fspath(path)
    missing, frames, start = 0.0, None, b""
    try:
        with contextlib.ExitStack() as stack:
            member = open_member(name)
            file: soundfile.SoundFile | SampleReader
            if member is None:
                _check_regular(name)
                with open(name, "rb") as opened:
                    noisy = name.lower().endswith(".mp3") and not begins_as_mp3(opened)
                    missing, frames, hidden, early, size, start = _promises(opened, check_end)
                # As bytes, because soundfile cannot encode file names that are not UTF-8.
                with _quiet(noisy):
                    file = stack.enter_context(Decoder(os.fsencode(name) if os.name == "posix" else name))
            elif isinstance(member, SampleReader):
                file, check_end, hidden, early = member, False, None, None
            else:
                content = stack.enter_context(member)
                missing, frames, hidden, early, size, start = _promises(content, check_end)
                stack.callback(_raise_failure, content)
                file = stack.enter_context(Decoder(content))
            low, high = SAMPLING_RATES
            if not low <= file.samplerate <= high:
                raise AudioError(name, "not decodable", f"sampling rate {file.samplerate} Hz")
            if check_end and file.subtype.startswith("MPEG"):
                hidden = hidden or _in_content(name, lambda content: mp3_fault(content, file.frames))
            if hidden is not None:
                raise AudioError(name, "not decodable", f"{hidden}; only the first part would be read: write it anew")
            if early is not None:
                remedy = "if all is there that you want, write it anew (ffmpeg -i IN -c copy OUT)"
                raise AudioError(name, "truncated", f"the stream was cut or never ended: {early}; {remedy}")
            if missing > TRUNCATED_ABOVE:
                raise AudioError(name, "truncated", _MISSING.format(100 * missing))
            if frames and file.frames < (1 - TRUNCATED_ABOVE) * frames:
                raise AudioError(name, "truncated", f"{file.frames} of {frames} samples")
            if check_end and file.frames < _UNKNOWN and size < _least_bytes(file) and not _has_end(file):
                seconds = file.frames / file.samplerate
                raise AudioError(
                    name, "truncated", f"{size} bytes are not the {seconds:.0f} s that the header promises"
                )
            yield file
    except (AudioError, DataError):  # a DataError, which is a RuntimeError, is no fault of the file
        raise
    except FileNotFoundError as error:
        raise AudioError(name, "missing", elsewhere(name)) from error
    except UnicodeEncodeError as error:
        raise AudioError(
            name, "missing", f"the locale ({error.encoding}) has no such letter: set LC_ALL=C.UTF-8"
        ) from error
    except OSError as error:
        check_open_files(error)
        raise AudioError(name, "not readable", error.strerror or str(error)) from error
    except soundfile.LibsndfileError as error:
        if member is None and not os.access(name, os.R_OK):
            raise AudioError(name, "not readable", "permission denied") from error
        if member is None and error.code == _SYSTEM_ERROR:
            try:
                open(name, "rb").close()
            except OSError as reason:  # which libsndfile does not give
                check_open_files(reason)
        if missing > 0:
            raise AudioError(name, "truncated", _MISSING.format(100 * missing)) from error
        what = real_content(name) if member is None else ""
        if not what and error.code in _UNKNOWN_FORMAT:
            what = f"no audio in a format that is known; the first bytes are {start.hex(' ')}"
        raise AudioError(name, "not decodable", what or error.error_string.strip()) from error
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise AudioError(name, "not decodable", str(error)) from error


def _promises(file: BinaryIO, check_end: bool) -> tuple[float, int | None, str | None, str | None, int, bytes]:
    """Promises of the container of a file: the share that is missing, samples, and with ``check_end`` audio behind the
    end and an early end; its size and first bytes. It stands at its beginning then."""
    hidden = audio_behind_end(file, mp3_end(file)) if check_end else None
    early = ogg_without_end(file) if check_end else None
    found = missing_fraction(file), caf_frames(file), hidden, early, file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(8)
    file.seek(0)
    return *found, start


def _least_bytes(file: soundfile.SoundFile) -> float:
    """Smallest size of a file of this length, except for silence: 0.1 byte per sample of FLAC, 7 kbit/s of MP3."""
    if file.format == "FLAC":
        return 0.1 * file.frames * file.channels
    rate = 900 if file.subtype.startswith("MPEG") else 40 if file.subtype.startswith(_LOSSY) else 0
    return rate * file.frames / file.samplerate


def _has_end(file: soundfile.SoundFile) -> bool:
    """Return True if there are samples shortly before the stated end. Slow for an MP3, which is read from its start."""
    try:
        with _quiet(file.subtype.startswith("MPEG")):
            file.seek(max(0, file.frames - file.samplerate))
            found = len(file.read(file.samplerate, dtype="float32"))
            file.seek(0)
    except soundfile.LibsndfileError:
        return False
    return found > 0


def _check_regular(name: str) -> None:
    status = os.stat(name)
    # Opening a pipe or a device could block forever.
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(name, "not readable", "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if status.st_size == 0:
        raise AudioError(name, "empty file")


def _raise_failure(content: BinaryIO) -> None:
    """An I/O error that the decoder saw as the end of its file."""
    section = content.raw if isinstance(content, io.BufferedReader) else None
    if isinstance(section, Section) and section.failure is not None:
        raise section.failure


def _read(file: soundfile.SoundFile | SampleReader, path: str, start: int, stop: int | None) -> np.ndarray:
    """Decode samples [start, stop) of an open file as mono float32; fewer where the file ends."""
    at = 0
    if start:
        lossy = file.subtype.startswith(_LOSSY)
        if not file.seekable():
            pass  # GSM 6.10, G.721, NMS ADPCM: decoded from the beginning
        elif not lossy and file.frames < _UNKNOWN:
            at = min(start, file.frames)
            file.seek(at)
        elif lossy and start > _EXACT_SECONDS * file.samplerate and file.frames < _UNKNOWN:
            at = min(start - int(_PREROLL_SECONDS * file.samplerate), file.frames)
            with _quiet(file.subtype.startswith("MPEG")):
                file.seek(at)
                file.read(min(start - at, 8192), dtype="float32")
                at = file.tell()
    skip = start - at
    wanted = _UNKNOWN if stop is None else stop - start
    if file.frames < _UNKNOWN:
        wanted = min(wanted, max(0, file.frames - start))
    # In place where the size is known and can be believed: a list of blocks and their sum would need twice the memory.
    samples = np.empty(wanted if wanted <= _BLOCK * 4096 else 0, np.float32)
    blocks: list[np.ndarray] = []
    filled = 0
    for block in _blocks(file, path, None if stop is None else stop - at, at):
        rest = block[skip:]
        skip = max(0, skip - len(block))
        if blocks or filled + len(rest) > len(samples):
            blocks.append(rest)
        else:
            samples[filled : filled + len(rest)] = rest
            filled += len(rest)
    return np.concatenate([samples[:filled], *blocks]) if blocks else samples[:filled]


def _blocks(
    file: soundfile.SoundFile | SampleReader, path: str, count: int | None, position: int = 0
) -> Iterator[np.ndarray]:
    """Decode up to ``count`` samples from ``position``, where the file stands, in bounded blocks, checked and mixed to
    mono. (Some formats cannot tell where they stand.)"""
    promised = file.frames if file.frames < _UNKNOWN else None
    wanted = promised if count is None else (position + count if promised is None else min(position + count, promised))
    size = max(1, _BLOCK // file.channels)
    failure = None
    while failure is None and (wanted is None or position < wanted):
        ask = size if wanted is None else min(size, wanted - position)
        # NaN tells what the decoder wrote before it failed: soundfile raises without the count.
        buffer = np.full((ask, file.channels), np.nan, np.float32)
        try:
            got = len(file.read(out=buffer))
        except soundfile.LibsndfileError as error:
            failure = error.error_string.strip()
            unwritten = np.isnan(buffer).any(axis=1)
            got = int(unwritten.argmax()) if unwritten.any() else ask
        if got == 0:
            break
        position += got
        yield _mono(buffer[:got], path, file.subtype)
    if promised is None:
        # A stream without a stated length ends by an error in some decoders; it has no promise to break.
        if failure and not position:
            raise AudioError(path, "not decodable", failure)
        return
    if wanted is not None and wanted - position > TRUNCATED_ABOVE * promised:
        if not position and failure:
            raise AudioError(path, "not decodable", failure)
        if failure or not file.subtype.startswith("MPEG") or _in_content(path, mp3_counts_frames):
            detail = f"{position} of {promised} samples" + (f": {failure}" if failure else "")
            raise AudioError(path, "truncated", detail)


def _in_content(path: str, look: Callable[[BinaryIO], Any]) -> Any:
    """Result of ``look`` at the bytes of a file or of a clip in an archive."""
    member = open_member(path)
    assert not isinstance(member, SampleReader)
    with open(path, "rb") if member is None else member as content:
        return look(content)


def _mono(block: np.ndarray, path: str, subtype: str) -> np.ndarray:
    """Average (N, channels) to (N,), after checking that every sample can be used."""
    peak = max(float(block.max()), -float(block.min()))
    if not peak <= LARGEST_SAMPLE:  # also true for NaN
        bad = int(block.size - np.isfinite(block).sum())
        if bad:
            raise AudioError(path, "not finite", f"{bad} NaN or infinite of {block.size} samples decoded together")
        raise AudioError(path, "out of range", f"a sample of magnitude {peak:.3g}")
    mono = block[:, 0]
    for channel in range(1, block.shape[1]):  # ten times faster than mean(axis=1) over two columns
        mono = mono + block[:, channel]
    mono = mono if block.shape[1] == 1 else mono / np.float32(block.shape[1])
    warn_of_levels(block, mono, peak, path, subtype)
    return mono


_stderr_lock = threading.Lock()


@contextlib.contextmanager
def _quiet(mp3: bool) -> Iterator[None]:
    """Silence libmpg123 while it finds its way: on every seek in a healthy MP3 it prints an error about bit counts, and
    three lines where it opens something that is none.

    It writes to file descriptor 2 itself and libsndfile offers no switch, so the descriptor points to the null device
    for these milliseconds. Nothing is done without ``mp3``.
    """
    if not mp3:
        yield
        return
    with _stderr_lock, open(os.devnull, "wb") as null:
        try:
            saved = os.dup(2)
        except OSError:  # a daemon without standard error
            yield
            return
        try:
            os.dup2(null.fileno(), 2)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
