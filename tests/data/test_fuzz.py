"""Fuzzing of all readers: the right result, or an error of ours that names the file; nothing dropped, memory bounded.

CI runs a fixed sample. ``BESTRQ2_FUZZ_SECONDS=3600 pytest -s tests/data/test_fuzz.py`` draws new inputs for so long, in
equal parts for the tests, and prints how many there were.
"""

import contextlib
import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestrq2.data import audio_info, find_audio, load_audio
from bestrq2.data.audio import audio_digest
from bestrq2.data.manifest import read_manifest
from bestrq2.errors import AudioError, BestRQError, ManifestError

from . import reader_fuzzing as fuzz

SECONDS = float(os.environ.get("BESTRQ2_FUZZ_SECONDS", "0"))
TESTS = 5
_LARGEST_GROWTH = 300e6  # bytes; the largest right input has 64 KB


def fuzzed(examples: int, **strategies):
    """A test of inputs (``folder`` and the strategies): a fixed sample, or by hand for a part of the given time."""

    def decorate(check):
        def test(tmp_path):
            tried = 0
            common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

            def run(**options):
                @settings(**common, **options)
                @given(st.fixed_dictionaries(strategies))
                def one(values):
                    nonlocal tried
                    tried += 1
                    check(tmp_path, **values)

                one()

            end = time.monotonic() + SECONDS / TESTS
            with bounded_memory():
                if not SECONDS:
                    run(max_examples=examples, derandomize=True)
                while time.monotonic() < end:
                    run(max_examples=500)
            if SECONDS:
                print(f"\n{check.__name__}: {tried} inputs in {SECONDS / TESTS:.0f} s, no fault")

        test.__name__, test.__doc__ = f"test_{check.__name__}", check.__doc__
        return test

    return decorate


@contextlib.contextmanager
def bounded_memory():
    """Fail if the peak of resident memory grows: the kernel counts it anew after a write to clear_refs."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024

    try:
        reset.write_text("5")
        before = peak()
    except OSError:
        yield
        return
    yield
    assert peak() - before < _LARGEST_GROWTH


def decoded(file):
    """(samples, channels) of all that libsndfile gives; None for a stream without a stated length that ends by an
    error, where it does not tell what it gave of the last block."""
    parts = []
    try:
        while len(part := file.read(4096, dtype="float32", always_2d=True)):
            parts.append(part)
    except soundfile.LibsndfileError:
        return None
    return np.concatenate(parts)


def readable(call, *arguments, **options):
    """The result, or None for an AudioError that names the file."""
    try:
        return call(*arguments, **options)
    except AudioError as error:
        assert str(error).startswith(str(arguments[0]))  # noqa: PT017 (most inputs raise none)
        return None


@fuzzed(250, name=st.sampled_from(sorted(fuzz.FORMS)), changes=fuzz.damage)
def audio(folder, name, changes):
    """A damaged audio file."""
    path = folder / name
    path.write_bytes(fuzz.damaged(fuzz.audio_bytes(name), changes))
    info = readable(audio_info, path)
    whole = readable(load_audio, path, fuzz.RATE)
    digest = readable(audio_digest, path)
    part = readable(load_audio, path, fuzz.RATE, start=0.1, duration=0.2)
    for waveform in (whole, part):
        if waveform is not None:
            assert waveform.dtype == np.float32
            assert waveform.ndim == 1
            assert waveform.size > 0
            assert np.isfinite(waveform).all()
    assert part is None or part.size <= round(0.2 * fuzz.RATE)
    assert (whole is None) == (digest is None)
    if whole is not None:
        # All that the decoder gives, and no more than 1 % less than the header says.
        with soundfile.SoundFile(path) as file:
            samples, rate, estimated = decoded(file), file.samplerate, file.format == "MP3"  # whatever its name
        if samples is None:
            return
        assert digest.info.num_samples == len(samples)
        assert digest.info.sampling_rate == rate
        if rate == fuzz.RATE:
            np.testing.assert_allclose(whole, samples.mean(1), atol=1e-5 * max(1, np.abs(samples).max()))
        if info is not None and not estimated:
            assert len(samples) >= 0.99 * info.num_samples - 1
    if part is not None and whole is not None and not name.endswith((".mp3", ".ogg", ".opus")):
        length = min(len(part), len(whole) - 1600)
        np.testing.assert_allclose(part[:length], whole[1600:][:length], atol=2e-6 * max(1, np.abs(whole).max()))


rows = st.lists(fuzz.clips(), min_size=1, max_size=5)


@fuzzed(200, tool=st.sampled_from(sorted(fuzz.TOOLS)), rows=rows)
def manifests(folder, tool, rows):
    """Every row of every tool, exactly."""
    name, write = fuzz.TOOLS[tool]
    write(folder / name, rows)
    got = [(item.path, item.start, item.end) for item in read_manifest(folder / name)]
    wanted = fuzz.expected(folder, tool, rows)
    assert [row[0] for row in got] == [row[0] for row in wanted]
    for (_, start, end), (_, begin, stop) in zip(got, wanted):
        assert start == pytest.approx(begin, abs=1e-9)
        assert (end is None) == (stop is None)
        assert end is None or end == pytest.approx(stop, abs=1e-9)


@fuzzed(200, tool=st.sampled_from(sorted(fuzz.TOOLS)), rows=rows, changes=fuzz.damage)
def damaged_manifests(folder, tool, rows, changes):
    """A damaged manifest: an error that names it, or as many rows as it has lines."""
    name, write = fuzz.TOOLS[tool]
    path = folder / name
    write(path, rows)
    path.write_bytes(fuzz.damaged(path.read_bytes(), changes))
    try:
        got = read_manifest(path)
    except ManifestError as error:
        assert str(folder) in str(error)  # noqa: PT017 (most inputs raise none)
        return
    content = path.read_bytes()
    lines = [line for line in content.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n") if line.strip()]
    if tool == "gzip":
        lines = [line for line in gzip.decompress(content).split(b"\n") if line.strip()]
    if tool in ("NeMo", "Lhotse", "gzip"):
        assert len(got) in (len(lines), 1)  # one object over several lines is a document
    elif tool != "Kaldi" and tool != "SpeechBrain" and b'"' not in content:
        assert len(got) == len(lines) - 1
    for item in got:
        assert item.path
        assert "\0" not in item.path
        assert item.end is None or item.end > item.start >= 0


@fuzzed(60, changes=fuzz.damage)
def tar_shards(folder, changes):
    """A damaged shard: every clip is read, counted as of another kind, or its loss is reported."""
    path = folder / "shard.tar"
    path.write_bytes(fuzz.damaged(fuzz.tar_bytes(), changes))
    try:
        found = find_audio(path)
    except BestRQError as error:
        assert str(path) in str(error)  # noqa: PT017 (most inputs raise none)
        return
    if len(found.files) < 6:
        assert found.skips or found.ignored.total() > 0
    assert all(str(path) in skip.path for skip in found.skips)
    for item in found.files:
        waveform = readable(load_audio, item.path)
        assert waveform is None or waveform.size
    Path(f"{path}.index.json").unlink(missing_ok=True)


@fuzzed(120, name=st.sampled_from(sorted(fuzz.ARCHIVES)), changes=fuzz.damage)
def archives(folder, name, changes):
    """A damaged HDF5, Arrow or Parquet file: every clip is read, or its loss is reported."""
    pytest.importorskip("h5py" if name.endswith(("h5", "hdf5")) else "pyarrow")
    path = folder / name
    path.write_bytes(fuzz.damaged(fuzz.archive_bytes(name), changes))
    try:
        found = find_audio(path)
    except BestRQError as error:
        assert str(path) in str(error)  # noqa: PT017 (most inputs raise none)
        return
    assert len(found.files) >= fuzz.CLIPS or found.skips
    assert all(str(path) in skip.path for skip in found.skips)
    for item in found.files:
        waveform = readable(load_audio, item.path)
        assert waveform is None or (waveform.dtype == np.float32 and waveform.size)


test_audio, test_manifests, test_damaged_manifests = audio, manifests, damaged_manifests
test_tar_shards, test_archives = tar_shards, archives
del audio, manifests, damaged_manifests, tar_shards, archives
